"""What all tests share: one computing thread a process, and run-time checks of the model's annotated shapes for tests that turn them on.

Tests run in a process for each core, and are small: more threads would wait for each other, and sums would depend on their number.
The hook of the checks has to be in place before the package is first imported by any test. They are off until a test asks for them,
because they cannot be traced into a compiled graph.
"""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As it is behind a shell's `&`; every process that the tests start would ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import anarcho_model
    import beartype
    import jaxtyping
    import torch  # noqa: F401 - the model needs it
except ImportError:  # Another package is tested alone, without the model.
    pass
else:
    with jaxtyping.install_import_hook(anarcho_model.__name__, f"{beartype.__name__}.beartype"):
        import anarcho_model.directory
        import anarcho_model.generate.torch
        import anarcho_model.torch
        import anarcho_model.weights
    jaxtyping.config.update("jaxtyping_disable", True)
