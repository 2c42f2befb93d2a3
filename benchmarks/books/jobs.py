"""Jobs: a line of text is one training, a name and what is other than the defaults.

    small-batch tokens_per_step=16384 lr=0.006 qk_norm=true schedule=linear final_lr_fraction=0

Keys are the fields of `Job` and those of `ModelConfig`, `InitConfig` and `OptimConfig`. Some values have a form of their own:

* by stages, from a share of the training tokens on: ``tokens_per_step=8192,16384@0.3,32768@0.6``;
* by name, for the parameters whose names contain it, the first that fits: ``rates=v_proj:0.7,norm:2``;
* lists of numbers: ``averages=8,18``.
"""

from __future__ import annotations

import math
import shlex
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from anarcho_model import InitConfig, ModelConfig
from anarcho_optim import OptimConfig, schedules

Stages = tuple[tuple[float, int], ...]
ByName = tuple[tuple[str, float], ...]
Peer = Literal["adamw", "torch-muon"]

PEER_SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3},
    "torch-muon": {"lr": 2e-3},
}
"""The learning rates of transformers' Llama with AdamW alone, and with torch.optim.Muon for the matrices of the blocks."""
PEER_SCHEDULE: dict[str, Any] = {"schedule": "cosine", "warmup_steps": 30, "final_lr_fraction": 0.05}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training from new weights over the training tokens, each seen once."""

    name: str
    """Of the records and the curve."""
    peer: Peer | None = None
    """Another implementation in place of this project's."""
    model: ModelConfig
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tokens_per_step: Stages = ((0.0, 65536),)
    """Tokens of an optimizer step, by stages; schedules count in steps of the first size."""
    length: Stages = ()
    """Tokens of a sequence, by stages, divisors of the context; without any, the context."""
    micro_tokens: int = 16384
    """Tokens that go through the model at once."""
    growth_power: float = 0.0
    """The learning rate of a step of n times the first size is multiplied by n to this power."""
    momentum_cooldown: float = 0.0
    """Share of the training at whose end Muon's momentum falls linearly to 0.85."""
    averages: tuple[float, ...] = ()
    """Weight averages to evaluate at the end, by the power of their weighting: p has a mean age of 1 / (p + 2) of the training."""
    rates: ByName = ()
    """Factors of learning rates."""
    beta2s: ByName = ()
    """AdamW's second decay."""
    gains: ByName = ()
    """First values of norms' gains, in place of 1."""
    scales: ByName = ()
    """Factors of the first values of matrices."""
    per_head: bool = False
    """Whether Muon takes queries, keys and values head by head."""
    narrow_residual: bool = False
    """Whether the residual stream has the type of the matrix products."""
    float8: bool = False
    """Whether products are in 8-bit floats where that gains."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Of the first weights and of the order of the data."""


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What one optimizer step takes and how."""

    first: int
    """Its first window in the order of the training."""
    count: int
    """Windows, of the context's length."""
    length: int
    """Tokens of the sequences that the windows are cut into."""
    lr_scale: float
    momentum: float


def parse(line: str, *, common: str, model: ModelConfig) -> Job:
    """The job of a line; ``common`` are settings that hold for all jobs where a line says nothing else.

    Raises ValueError that names the job and the key.
    """
    name, *settings = shlex.split(line)
    given: dict[str, str] = {}
    for setting in [*shlex.split(common), *settings]:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"job {name} has {setting!r}; expected key=value")
        given[key] = value
    sections: dict[str, Any] = {"model": model, "init": InitConfig(), "optim": OptimConfig()}
    own: dict[str, Any] = {"name": name}
    peer = given.get("peer")
    if peer is not None:
        if peer not in get_args(Peer):
            raise ValueError(f"job {name} has the peer {peer!r}; expected one of {', '.join(get_args(Peer))}")
        sections["optim"] = OptimConfig(**PEER_SETTINGS[peer], **PEER_SCHEDULE)
        own["micro_tokens"] = 2**16
    changes: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for key, value in given.items():
        home = next((s for s, config in sections.items() if key in {f.name for f in fields(config)}), None)
        if home is not None:
            changes[home][key] = _scalar(value)
        elif key in {f.name for f in fields(Job)} - {"name", *sections}:
            own[key] = _own(key, value, name)
        else:
            raise ValueError(
                f"job {name} has the unknown key {key!r}; expected a field of Job, ModelConfig, InitConfig or OptimConfig"
            )
    try:
        return Job(**own, **{section: replace(config, **changes[section]) for section, config in sections.items()})
    except ValueError as error:
        raise ValueError(f"job {name}: {error}") from None


def read(lines: Iterable[str], *, common: str, model: ModelConfig) -> list[Job]:
    """The jobs of a file's lines; empty ones and what follows a # are left out. Raises ValueError for a name that comes twice."""
    jobs = [parse(text, common=common, model=model) for line in lines if (text := line.split("#")[0].strip())]
    names = [job.name for job in jobs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two jobs have the name {twice}; expected a name of its own for each")
    return jobs


def plan(job: Job, *, windows: int) -> list[PlannedStep]:
    """The steps of a training over so many windows; a last step that they do not fill is left out."""
    context = job.model.context_length
    steps, done = [], 0
    base = _windows(job, job.tokens_per_step[0][1])
    while True:
        progress = done / windows
        size = at(job.tokens_per_step, progress)
        count = _windows(job, size)
        if done + count > windows:
            return steps
        number = done // base
        scale = schedules.lr_scale(job.optim, number, total_steps=windows // base) * (count / base) ** job.growth_power
        momentum = schedules.momentum(job.optim, number)
        if job.momentum_cooldown:
            cooled = max(0.0, 1 - (1 - progress) / job.momentum_cooldown)
            momentum += cooled * (min(0.85, momentum) - momentum)
        length = at(job.length, progress) if job.length else context
        if context % length:
            raise ValueError(f"job {job.name} has sequences of {length} tokens; expected a divisor of {context}")
        steps.append(PlannedStep(first=done, count=count, length=length, lr_scale=scale, momentum=momentum))
        done += count


def at(stages: Stages, progress: float) -> int:
    """The value of the last stage that has begun."""
    return [value for start, value in stages if start <= progress][-1]


def micro_rows(job: Job, step: PlannedStep) -> int:
    """Sequences that go through the model at once: as many as `micro_tokens` holds and divide the step."""
    rows = step.count * (job.model.context_length // step.length)
    return math.gcd(rows, max(1, job.micro_tokens // step.length))


def _windows(job: Job, tokens: int) -> int:
    context = job.model.context_length
    if tokens < 1 or tokens % context:
        raise ValueError(
            f"job {job.name} has steps of {tokens} tokens; expected a multiple of the context of {context}"
        )
    return tokens // context


def _scalar(text: str) -> Any:
    """A value as TOML spells it, ``none``, or a plain string."""
    if text == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _stages(text: str) -> Stages:
    found = []
    for part in text.split(","):
        value, _, start = part.partition("@")
        found.append((float(start or 0), int(value)))
    if found[0][0] != 0 or found != sorted(found, key=lambda stage: stage[0]):
        raise ValueError("stages that begin at 0 and follow each other")
    return tuple(found)


def _by_name(text: str) -> ByName:
    return tuple((name, float(value)) for name, _, value in (part.partition(":") for part in text.split(",")))


_FORMS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("tokens_per_step", "length"), _stages),
    **dict.fromkeys(("rates", "beta2s", "gains", "scales"), _by_name),
    "averages": lambda text: tuple(float(part) for part in text.split(",")),
}


def _own(key: str, text: str, name: str) -> Any:
    if key not in _FORMS:
        return _scalar(text)
    try:
        return _FORMS[key](text)
    except ValueError as error:
        raise ValueError(
            f"job {name} has {key}={text}, which is not of its form ({error}); see books/jobs.py"
        ) from None
