"""Texts that tokenizers get wrong: characters of all planes, combining marks, controls, SentencePiece's own signs, runs of space."""

import random
import sys
import unicodedata

MARKS = [chr(point) for point in range(sys.maxunicode + 1) if unicodedata.combining(chr(point))]
PARTS = [
    *"\0\x01\x1b\x7f\x85\u2581\u2585\ufffd\ufeff\u200b\u200d\u2028\u3000\u00a0\r\t\n <>0123456789aeiouAE,.'",
    *("  ", "   ", "\n\n", "\n\n\n", "\r\n", "<0x0A>", "<0x", "e\u0301", "\u1100\u1161\u11a8", "ﬁ½Å"),
    *(
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "한국어",
        "日本語の",
        "中文",
        "Привет",
        "العربية",
        "हिन्दी",
        " the",
        " of the",
        "whale",
        "naïve café",
    ),
]


def odd_texts(count: int, *, seed: int, extra: tuple[str, ...] = ()) -> list[str]:
    """So many texts of up to 40 parts, equal for equal arguments; `extra` are more parts to mix in."""
    chance = random.Random(seed)
    parts = [*PARTS, *extra]

    def anywhere() -> str:
        ranges = ((0, 0x80), (0, 0x3000), (0, 0xD800), (0xE000, 0x110000))
        return chr(chance.randrange(*chance.choice(ranges)))

    kinds = (
        anywhere,
        lambda: chance.choice(parts),
        lambda: chance.choice((chance.choice(MARKS), chance.choice(parts), chr(chance.randrange(0x20, 0x300)))),
    )
    return ["".join(kinds[number % 3]() for _ in range(chance.randrange(1, 40))) for number in range(count)]
