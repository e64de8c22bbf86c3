"""How a layer is solved: what a recipe may choose beyond the scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bittern.errors import UserError, did_you_mean
from bittern.formats import Rule, int4, nvfp4, ternary
from bittern.scheme import WeightFormat

ScaleRule = Literal["absmax", "search"]
CodeRule = Literal["absmean", "least-squares"]
Smoothing = Literal["none", "span", "modulation", "grid", "descent", "columns"]
Branch = Literal["weights", "outputs"]
Rounding = Literal["nearest", "gptq"]

_INT4_RULES: dict[str, Rule] = {"absmax": int4.absmax, "search": int4.search}
_NVFP4_RULES: dict[str, Rule] = {"absmax": nvfp4.absmax, "search": nvfp4.search}
_TERNARY_RULES: dict[str, Rule] = {"absmean": ternary.absmean, "least-squares": ternary.least_squares}


@dataclass(frozen=True)
class SolverOptions:
    """Choices of the solvers.

    Attributes:
        scales: For int4 and nvfp4: "absmax" (amax / 7 or / 6) or "search" (least squared error).
        codes: For ternary: "absmean" (scale mean |w|, as in BitNet b1.58) or "least-squares" (exact, with its
            scale).
        smoothing: "none"; "span": from the span of each input's weights; "modulation": from that and from the
            magnitude that the model's modulation gives each input; "grid": the candidate of least output error, and
            "descent": gradient descent from there, both for int4; "columns": fitted to the codes in closed form, for
            ternary. The last three need data.
        smoothing_exponent: Power of the span; 0 leaves it out, 1 makes all spans equal.
        activation_exponent: Power of the magnitude; 0 leaves it out, 1 makes all magnitudes equal.
        rounds: How often at most branch and residual are solved again, each given the other.
        branch: What the branch keeps small: the error of "weights", or of "outputs", which needs data.
        rounding: "nearest" codes, or "gptq", which needs data.
        refits: How often at most, while the output error falls, the branch is fitted again to the codes of GPTQ; for
            ternary also the scales and the smoothing, and then codes to them.
        sweeps: For ternary: how often at most coordinate descent passes over the codes of GPTQ.
        sensitivity: Whether output errors count as much as the model's output feels them, which needs data.
        bias_correction: Whether the mean error of each output is taken from its bias, which needs data.
        damping: Share of its mean diagonal that is added to GPTQ's Hessian.
        svd_oversample: Columns that the randomised SVD carries beyond the rank.
        svd_iterations: Its power iterations from a cold start; a later round starts warm and needs one.
    """

    scales: ScaleRule = "search"
    codes: CodeRule = "least-squares"
    smoothing: Smoothing = "none"
    smoothing_exponent: float = 0.5
    activation_exponent: float = 0.5
    rounds: int = 8
    branch: Branch = "weights"
    rounding: Rounding = "nearest"
    refits: int = 0
    sweeps: int = 0
    sensitivity: bool = False
    bias_correction: bool = False
    damping: float = 0.01
    svd_oversample: int = 10
    svd_iterations: int = 4

    def __post_init__(self) -> None:
        for name, known in (
            ("scales", _INT4_RULES),
            ("codes", _TERNARY_RULES),
            ("smoothing", ("none", "span", "modulation", "grid", "descent", "columns")),
            ("branch", ("weights", "outputs")),
            ("rounding", ("nearest", "gptq")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} {value!r}: {did_you_mean(str(value), known)}")
        for name in ("smoothing_exponent", "activation_exponent"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}: expected 0 to 1")
        if not self.damping > 0:
            raise UserError(f"damping {self.damping}: expected more than 0")
        for name in ("rounds", "refits", "sweeps", "svd_oversample", "svd_iterations"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}: expected 0 or more")

    def rule(self, weight: WeightFormat) -> Rule:
        """The function that gives each group of a weight its codes and scale."""
        if weight == "ternary":
            return _TERNARY_RULES[self.codes]
        return (_INT4_RULES if weight == "int4" else _NVFP4_RULES)[self.scales]
