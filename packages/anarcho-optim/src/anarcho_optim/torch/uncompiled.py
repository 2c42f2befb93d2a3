"""What torch.compile must not trace, left alone without loading the compiler.

Notable: torch guards the methods of its optimizers, too, but by loading the compiler at their first call: 2 seconds and 150 MB that a
program which compiles nothing has no use for. Where the compiler is not loaded, nothing is being traced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def compiler_is_loaded() -> bool:
    """Whether anything can be traced in this process."""
    return "torch._dynamo" in sys.modules


def uncompiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, which torch.compile calls as it is."""
    guarded: list[Any] = []

    @functools.wraps(function)
    def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        if not compiler_is_loaded():
            return function(*arguments, **options)
        if not guarded:
            import torch

            guarded.append(torch.compiler.disable(function))
        return guarded[0](*arguments, **options)

    return call


def unguarded(method: Any) -> Callable[..., Any]:
    """A bound method of torch's that is guarded against being traced; while nothing can be, without the guard."""
    inner = getattr(method, "__wrapped__", None)
    if compiler_is_loaded() or inner is None:
        return method
    return functools.partial(inner, method.__self__)
