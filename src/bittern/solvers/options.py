"""How a layer is solved: what a recipe may choose beyond the scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bittern.errors import UserError, did_you_mean
from bittern.formats import Rule, int4, ternary

ScaleRule = Literal["absmax", "search"]
CodeRule = Literal["nearest", "absmean", "least-squares"]
Smoothing = Literal["none", "span"]

_RULES: dict[tuple[str, str, str], Rule] = {
    ("int4", "nearest", "absmax"): int4.absmax,
    ("int4", "nearest", "search"): int4.search,
    ("ternary", "absmean", "absmax"): ternary.absmean,
    ("ternary", "absmean", "search"): ternary.absmean_refit,
    # The nearest codes under the best of all scales are the least-squares codes.
    ("ternary", "nearest", "search"): ternary.least_squares,
    ("ternary", "least-squares", "search"): ternary.least_squares,
}


@dataclass(frozen=True)
class SolverOptions:
    """Choices of the data-free solver.

    Attributes:
        scales: "absmax" takes the format's plain scale (amax / 7; for "absmean" codes the mean |w|); "search" the
            scale of least squared error.
        codes: "nearest" to weight / scale; for ternary also "absmean" (nearest to weight / mean |w|, BitNet's) and
            "least-squares" (jointly with the scale, exact).
        smoothing: "none", or "span": from the span of each input's weights.
        smoothing_exponent: Power of the span; 0 smooths nothing, 1 makes all spans equal.
        rounds: How often at most branch and residual are solved again, each given the other.
        svd_oversample: Columns that the randomised SVD carries beyond the rank.
        svd_iterations: Its power iterations from a cold start; a later round starts warm and needs one.
    """

    scales: ScaleRule = "search"
    codes: CodeRule = "nearest"
    smoothing: Smoothing = "none"
    smoothing_exponent: float = 0.5
    rounds: int = 5
    svd_oversample: int = 10
    svd_iterations: int = 4

    def __post_init__(self) -> None:
        for name, known in (
            ("scales", ("absmax", "search")),
            ("codes", ("nearest", "absmean", "least-squares")),
            ("smoothing", ("none", "span")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} {value!r}: {did_you_mean(str(value), known)}")
        if not 0 <= self.smoothing_exponent <= 1:
            raise UserError(f"smoothing_exponent {self.smoothing_exponent}: expected 0 to 1")
        for name in ("rounds", "svd_oversample", "svd_iterations"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}: expected 0 or more")

    def rule(self, weight_format: str) -> Rule:
        """The function that gives each group its codes and scale.

        Raises:
            UserError: if the format has no such rule.
        """
        rule = _RULES.get((weight_format, self.codes, self.scales))
        if rule is None:
            known = [f"{codes} + {scales}" for name, codes, scales in _RULES if name == weight_format]
            raise UserError(
                f"codes {self.codes!r} with scales {self.scales!r} do not fit {weight_format}: "
                f"expected one of {', '.join(known)}"
            )
        return rule
