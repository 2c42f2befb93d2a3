"""How well a model answers a task, from the log-probabilities of the possible answers.

The measures are those of lm-evaluation-harness: `accuracy` takes the answer of the largest log-probability (its acc), `accuracy_per_byte`
divides that by the UTF-8 bytes of the answer, without the space before it, so that long answers are not at a disadvantage (its acc_norm).
A last word is right if it is the greedy one, token for token. A preference is right if the chosen answer is the likelier one; equal
log-probabilities are wrong.

Prompts are plain text, each answer behind a space, examples with their answers parted by empty lines. As conversations, questions are
messages of the user and answers those of the assistant; last words are plain text even then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from anarcho_cli.evaluation.encoding import encode_answer, encode_continuation
from anarcho_cli.evaluation.report import Evaluation
from anarcho_cli.evaluation.scoring import Request, Score
from anarcho_cli.evaluation.statistics import Estimate, exponential, mean
from anarcho_cli.evaluation.subject import Subject
from anarcho_cli.evaluation.tasks import LAST_WORD, MULTIPLE_CHOICE, PREFERENCE, LastWord, Question, Task

if TYPE_CHECKING:
    from anarcho_tokenize import AnyTokenizer, Message, Preference

_BETWEEN = "\n\n"


def evaluate_task(subject: Subject, task: Task, *, as_chat: bool = False) -> Evaluation:
    """The task's measures with standard errors over its rows; `as_chat` writes conversations with the chat template."""
    requests, measure = _KINDS[task.kind]
    scores = list(subject.scorer.score(requests(subject.tokenizer, task, as_chat)))
    return Evaluation(
        name=task.name,
        kind=task.kind,
        num_items=len(task.items),
        sha256=task.sha256,
        estimates=measure(task, scores),
        counts={
            "shots": len(task.shots),
            "tokens": sum(score.num_tokens for score in scores),
            "cut": sum(score.is_cut for score in scores),
        },
    )


def _question_requests(tokenizer: AnyTokenizer, task: Task, as_chat: bool) -> Iterator[Request]:
    from anarcho_tokenize import Message

    shots: Sequence[Question] = task.shots
    shown = "".join(shot.prompt + _behind(shot.prompt, shot.choices[shot.answer]) + _BETWEEN for shot in shots)
    told = [
        message
        for shot in shots
        for message in (Message("user", shot.asked), Message("assistant", shot.choices[shot.answer]))
    ]
    for question in task.items:
        for choice in question.choices:
            if as_chat:
                prompt = [*told, Message("user", question.asked)]
                yield encode_answer(tokenizer, prompt, [Message("assistant", choice)])
            else:
                yield encode_continuation(tokenizer, shown + question.prompt, _behind(question.prompt, choice))


def _question_measures(task: Task, scores: Sequence[Score]) -> dict[str, Estimate]:
    right, right_per_byte = [], []
    remaining = iter(scores)
    for question in task.items:
        logprobs = [score.logprob for score in islice(remaining, len(question.choices))]
        per_byte = [logprob / _num_bytes(choice) for logprob, choice in zip(logprobs, question.choices, strict=True)]
        right.append(float(_likeliest(logprobs) == question.answer))
        right_per_byte.append(float(_likeliest(per_byte) == question.answer))
    return {"accuracy": mean(right), "accuracy_per_byte": mean(right_per_byte)}


def _last_word_requests(tokenizer: AnyTokenizer, task: Task, as_chat: bool) -> Iterator[Request]:
    del as_chat  # a text goes on as a text
    shots: Sequence[LastWord] = task.shots
    shown = "".join(shot.context + shot.word + _BETWEEN for shot in shots)
    for item in task.items:
        yield encode_continuation(tokenizer, shown + item.context, item.word)


def _last_word_measures(task: Task, scores: Sequence[Score]) -> dict[str, Estimate]:
    del task  # the scores say it all
    return {
        "accuracy": mean([float(score.is_greedy) for score in scores]),
        "word_perplexity": exponential(mean([-score.logprob for score in scores])),
    }


def _preference_requests(tokenizer: AnyTokenizer, task: Task, as_chat: bool) -> Iterator[Request]:
    for pair in task.items:
        for answer in (pair.chosen, pair.rejected):
            if as_chat:
                yield encode_answer(tokenizer, pair.prompt, answer)
            else:
                prompt = _plain(pair.prompt)
                yield encode_continuation(tokenizer, prompt, _behind(prompt, _plain(answer)))


def _preference_measures(task: Task, scores: Sequence[Score]) -> dict[str, Estimate]:
    right, right_per_byte = [], []
    pairs: Iterable[Preference] = task.items
    for pair, chosen, rejected in zip(pairs, scores[::2], scores[1::2], strict=True):
        right.append(float(chosen.logprob > rejected.logprob))
        sizes = (max(1, _num_bytes(_plain(answer))) for answer in (pair.chosen, pair.rejected))
        per_byte = [score.logprob / size for score, size in zip((chosen, rejected), sizes, strict=True)]
        right_per_byte.append(float(per_byte[0] > per_byte[1]))
    return {"accuracy": mean(right), "accuracy_per_byte": mean(right_per_byte)}


def _behind(prompt: str, answer: str) -> str:
    """An answer with a space before it, where neither side has white space already."""
    return answer if not prompt or prompt[-1].isspace() or answer[:1].isspace() else f" {answer}"


def _plain(messages: Sequence[Message]) -> str:
    return _BETWEEN.join(message.content for message in messages)


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _likeliest(values: Sequence[float]) -> int:
    """Index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


_Requests = Callable[["AnyTokenizer", Task, bool], Iterator[Request]]
_Measure = Callable[[Task, Sequence[Score]], dict[str, Estimate]]
_KINDS: Mapping[str, tuple[_Requests, _Measure]] = {
    MULTIPLE_CHOICE: (_question_requests, _question_measures),
    LAST_WORD: (_last_word_requests, _last_word_measures),
    PREFERENCE: (_preference_requests, _preference_measures),
}
