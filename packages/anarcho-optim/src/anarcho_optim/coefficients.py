"""Coefficients of the odd quintic Newton-Schulz iterations that Muon uses.

One row ``(a, b, c)`` is one step of ``X <- aX + b(XX')X + c(XX')^2 X``.

Notable: a variant's safety factor divides the normalised input, so that rounding cannot push a singular value past the interval in which
the iteration converges. ``polar-express-8`` is published without it: its rows are scaled to (a / s, b / s^3, c / s^5) here, all but the
last.

Sources: ``jordan`` is Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/), also torch.optim.Muon's default;
``polar-express`` and ``polar-express-8`` are Amsel, Persson, Musco and Gower, "The Polar Express", arXiv:2505.16932 (safety 2e-2, cushion
2; and the table of the paper's reference implementation with safety 1e-2); ``you`` is Jiacheng You's schedule
(https://x.com/YouJiacheng/status/1905861218138804534).
"""

from __future__ import annotations

from dataclasses import dataclass

Coefficients = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One named Newton-Schulz iteration."""

    coefficients: Coefficients
    """One (a, b, c) triple per step."""
    safety: float = 1.0
    """The normalised input is divided by this factor (1 or slightly more) before the first step."""

    def steps(self, count: int | None) -> Variant:
        """The same iteration with ``count`` steps: the first ones of the table, or the last one repeated; None leaves it as it is."""
        if count is None or count == len(self.coefficients):
            return self
        if count < 1:
            raise ValueError(f"ns_steps is {count}; expected at least one step")
        rows = self.coefficients + self.coefficients[-1:] * (count - len(self.coefficients))
        return Variant(coefficients=rows[:count], safety=self.safety)


def _with_safety(rows: Coefficients, safety: float) -> Coefficients:
    scaled = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1])
    return (*scaled, rows[-1])


VARIANTS: dict[str, Variant] = {
    "jordan": Variant(coefficients=((3.4445, -4.7750, 2.0315),) * 5),
    "polar-express": Variant(
        coefficients=(
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        safety=1.02,
    ),
    "polar-express-8": Variant(
        coefficients=_with_safety(
            (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                (1.875, -1.25, 0.375),
            ),
            1.01,
        ),
        safety=1.01,
    ),
    "you": Variant(
        coefficients=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
}


def variant(name: str) -> Variant:
    """The iteration called ``name``; raises ValueError that lists the known names."""
    if name not in VARIANTS:
        raise ValueError(f"optim.variant is {name!r}; expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def iteration(
    name: str, *, ns_steps: int | None = None, ns_coefficients: tuple[float, float, float] | None = None
) -> Variant:
    """The iteration of a group: ``ns_coefficients`` repeated (5 times unless ``ns_steps`` says otherwise), else the variant ``name``."""
    if ns_coefficients is None:
        return variant(name).steps(ns_steps)
    if len(ns_coefficients) != 3:
        raise ValueError(f"ns_coefficients is {ns_coefficients!r}; expected one triple (a, b, c)")
    a, b, c = ns_coefficients
    return Variant(coefficients=((a, b, c),)).steps(5 if ns_steps is None else ns_steps)
