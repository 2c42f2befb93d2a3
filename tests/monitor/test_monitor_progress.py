"""What a person sees, on a terminal and in a log file."""

from __future__ import annotations

import io
import math
import random

import pytest
from anarcho_monitor import Progress
from anarcho_monitor.progress import describe, format_count, format_seconds, printable
from anarcho_monitor.remaining import RemainingTime


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_lines_come_first_then_at_intervals_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, stream=stream, tokens_per_step=10, interval_seconds=10, clock=clock)
    for step in range(1, 101):
        clock.now += 1
        progress.write("train", step=step, tokens=step * 10, loss=1.0)
    steps = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert steps == [f"{step}/100" for step in [*range(1, 101, 10), 100]]


def test_a_line_tells_loss_bits_per_byte_speed_memory_and_remaining_time() -> None:
    stream = io.StringIO()
    progress = Progress(100, stream=stream, tokens_per_step=1000, interval_seconds=0)
    progress.write("validation", step=0, tokens=0, loss=2.0, bits_per_byte=1.5)
    progress.write("train", step=40, tokens=40_000, loss=1.25, tokens_per_second=500.0, process_bytes=3 * 2**30)
    assert stream.getvalue().splitlines()[-1] == (
        "step 40/100  loss 1.2500  bits/byte 1.5000  500 tokens/s  3.0 GiB  2 min 0 s left"
    )
    progress.write("train", step=40, tokens=40_000, loss=math.nan, eta_seconds=30.0)
    assert stream.getvalue().splitlines()[-1] == "step 40/100  loss nan  bits/byte 1.5000  30 s left"


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_every_other_kind_has_its_line(make: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = make()
    progress = Progress(10, stream=stream, tokens_per_step=10)
    progress.write("start", step=0, tokens=0, parameters=1234)
    progress.write("train", step=1, tokens=10, loss=2.5)
    progress.write("event", step=1, tokens=10, message="out of memory", fault="memory", micro_batch=4)
    progress.write("sample", step=1, tokens=10, text="[bold]Call me", temperature=0.5)
    progress.close()
    progress.close()
    shown = stream.getvalue()
    assert "step 0  start: parameters 1234" in shown
    assert "step 1  event: out of memory" in shown
    assert "fault" not in shown, "what a message says is not told twice"
    assert "step 1  sample (temperature 0.5):" in shown
    assert "    [bold]Call me" in shown
    assert "2.5000" in shown


def test_a_terminal_gets_a_live_bar_and_a_file_gets_no_escape_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        progress = Progress(10, stream=stream, tokens_per_step=10)
        progress.write("train", step=10, tokens=100, loss=2.5)
        progress.close()
        shown[type(stream)] = stream.getvalue()
    assert "\x1b[" in shown[Terminal]
    assert "10/10" in shown[Terminal]
    assert "\x1b" not in shown[io.StringIO]


def test_a_models_text_cannot_command_the_terminal() -> None:
    hostile = "\x1b]0;owned\x07 \x9b31m a\rb \u202e\ttab\nline"
    assert printable(hostile) == "\\x1b]0;owned\\x07 \\x9b31m a\\rb \\u202e\ttab\nline"
    shown = describe("sample", 1, {"prompt": "\x1b[2J", "text": hostile})
    assert not any(ord(char) < 32 and char not in "\n\t" for char in shown)


def test_a_stream_that_lacks_a_character_shows_a_substitute() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Progress(1, stream=stream, tokens_per_step=1).write("sample", step=1, tokens=1, text="naïve")
    assert b"na?ve" in raw.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3_599, "59 min 59 s"),
        (7_260, "2 h 1 min"),
        (180_000, "2 d 2 h"),
    ],
)
def test_durations_read_in_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (999, "999"), (1234, "1.23k"), (98_765, "98.8k"), (3.4e6, "3.4M")]
)
def test_counts_read_with_three_digits(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("evaluate_every", "evaluate_seconds", "slower_from"),
    [(1001, 0.0, 1001), (50, 10.0, 1001), (100, 8.0, 1001), (50, 5.0, 60)],
)
def test_the_records_alone_give_the_remaining_time_within_a_tenth_once_a_fifth_is_done(
    evaluate_every: int, evaluate_seconds: float, slower_from: int
) -> None:
    clock, total, seen, window = Clock(), 1000, [], []
    remaining = RemainingTime(total, clock=clock)
    for step in range(1, total + 1):
        window.append(
            90.0 if step == 1 else random.Random(step).uniform(0.4, 0.6) + (0.4 if step >= slower_from else 0)
        )
        clock.now += window[-1]
        if step % 10 == 0:
            remaining.trained(step, sum(window) / len(window))
            window = []
            seen.append((step, remaining.seconds, clock.now))
        if step % evaluate_every == 0:
            clock.now += evaluate_seconds
            remaining.validated(step)
    assert seen[0][1] is None
    for step, estimate, at in seen:
        if total / 5 <= step <= total * 0.9:
            assert estimate == pytest.approx(clock.now - at, rel=0.1), f"at step {step}"
    assert seen[-1][1] == pytest.approx(0, abs=10)


def test_a_new_attempt_forgets_the_measurements_of_the_one_before() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, stream=stream, tokens_per_step=10, interval_seconds=0, clock=clock)
    for step in (10, 20):
        clock.now += 10
        progress.write("train", step=step, tokens=0, step_seconds=1.0)
    assert stream.getvalue().splitlines()[-1].endswith("1 min 20 s left")
    clock.now += 5000
    progress.write("start", step=20, tokens=0)
    for step in (30, 40):
        clock.now += 20
        progress.write("train", step=step, tokens=0, step_seconds=2.0)
    assert stream.getvalue().splitlines()[-1].endswith("2 min 0 s left")
