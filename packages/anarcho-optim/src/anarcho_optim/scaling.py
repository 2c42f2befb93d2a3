"""How an orthogonal update is scaled for its matrix's shape; the same for every framework.

Sources: ``original``, Keller Jordan's Muon; ``match_rms_adamw``, Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982;
``spectral``, Yang, Simon and Bernstein, "A spectral condition for feature learning", arXiv:2310.17813.
"""

from __future__ import annotations

import math

ADJUST_LR_FNS = ("original", "match_rms_adamw", "spectral")
"""The names of the scales; the first two are torch.optim.Muon's, whose ``spectral_unclamped`` is another name of the third."""


def shape_scale(name: str | None, rows: int, columns: int) -> float:
    """The factor S by which an orthogonal update of a (rows, columns) matrix is multiplied besides the learning rate; None is ``original``.

    ``original`` is sqrt(max(1, rows / columns)), ``match_rms_adamw`` 0.2 sqrt(max(rows, columns)), ``spectral`` sqrt(rows / columns).
    """
    match name:
        case "original" | None:
            return math.sqrt(max(1.0, rows / columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        case "spectral" | "spectral_unclamped":
            return math.sqrt(rows / columns)
    raise ValueError(f"adjust_lr_fn is {name!r}; expected one of {', '.join(ADJUST_LR_FNS)}")
