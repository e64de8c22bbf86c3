"""The recipe: a scheme and solver settings for every kind of layer, and the exceptions by path."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bittern.errors import UserError
from bittern.recipes.distillation import Distillation
from bittern.recipes.validation import validated

if TYPE_CHECKING:
    from bittern.scheme import Scheme

SOLVER_FIELDS = (
    "scales",
    "codes",
    "smoothing",
    "smoothing_exponent",
    "activation_exponent",
    "rounds",
    "branch",
    "rounding",
    "refits",
    "sweeps",
    "sensitivity",
    "bias_correction",
    "damping",
    "svd_oversample",
    "svd_iterations",
)
"""The keys that say how a layer is solved; the others say what it is."""

CONVOLUTION: dict[str, Any] = {
    "weight": "int4",
    "group_size": 64,
    "scale_dtype": "bf16",
    "activations": 16,
    "rank": 0,
    "smoothing": "none",
    "branch": "weights",
    "rounding": "nearest",
    "sensitivity": False,
    "shift": 0.0,
    "packing": None,
}
"""What a convolution differs in from a linear unless the recipe says more: 3 x 3 kernels run with 16 bits."""


def solves_with_data(solver: Mapping[str, Any]) -> bool:
    """Whether these solver settings ask for codes, smoothing or a branch that are found with the layer's input."""
    smoothed = solver["smoothing"] in ("grid", "descent", "columns")
    return smoothed or solver["branch"] == "outputs" or solver["rounding"] == "gptq"


def needs_data(solver: Mapping[str, Any]) -> bool:
    """Whether these solver settings need to know the layer's input."""
    return solves_with_data(solver) or solver["bias_correction"]


StoredType = Literal["bf16", "fp16", "fp32"]
ScaleType = Literal["bf16", "fp16", "fp32", "e4m3"]


def _check_rank(rank: object) -> object:
    try:
        whole = isinstance(rank, int) and not isinstance(rank, bool)
        valid = rank >= 0 if whole else not isinstance(rank, bool) and 0 < Fraction(rank) < 1
    except (TypeError, ValueError, ArithmeticError):
        valid = False
    if not valid:
        raise UserError("expected a whole number of 0 or more, or a fraction between 0 and 1 such as 1/96")
    return rank


Rank = Annotated[int | float | str, BeforeValidator(_check_rank)]


def resolve_rank(rank: int | float | str, n: int, k: int) -> int:
    """The rank of an [n, k] layer.

    A whole number is taken as it is; a fraction (0.0104, "1/96") is of min(n, k), rounded to the nearest
    whole number and to at least 1. 1/96 is FLUX's proportion: 32 of 3072.

    Raises:
        UserError: if the rank exceeds min(n, k).
    """
    limit = min(n, k)
    if isinstance(rank, int):
        if rank > limit:
            raise UserError(f"rank {rank} for a {n} x {k} layer: expected at most {limit}; try a fraction")
        return rank
    return max(1, round(Fraction(rank) * limit))


class LayerSpec(BaseModel):
    """What one layer becomes (see `Scheme`) and how it is solved (see `SolverOptions`).

    `scales` is for int4 and nvfp4, `codes` and `sweeps` are for ternary alone, so that a patch may change `weight` by
    itself. `shift` reaches only inputs that come out of a GELU: with it added nothing is negative, and 4-bit
    activations have all 16 codes for what is positive (SVDQuant, arXiv:2411.05007).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    weight: Literal["int4", "nvfp4", "ternary"]
    group_size: int | None = 64
    scale_dtype: ScaleType = "bf16"
    activations: Literal[4, 8, 16] = 16
    rank: Rank = 0
    branch_dtype: StoredType = "bf16"
    shift: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    packing: Literal["nibbles", "e2m1", "crumbs", "trits"] | None = None

    scales: Literal["absmax", "search"] = "search"
    codes: Literal["absmean", "least-squares"] = "least-squares"
    smoothing: Literal["none", "span", "modulation", "grid", "descent", "columns"] = "none"
    smoothing_exponent: float = Field(default=0.5, ge=0, le=1)
    activation_exponent: float = Field(default=0.5, ge=0, le=1)
    rounds: int = Field(default=8, ge=0)
    branch: Literal["weights", "outputs"] = "weights"
    rounding: Literal["nearest", "gptq"] = "nearest"
    refits: int = Field(default=0, ge=0)
    sweeps: int = Field(default=0, ge=0)
    sensitivity: bool = False
    bias_correction: bool = False
    damping: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    svd_oversample: int = Field(default=10, ge=0)
    svd_iterations: int = Field(default=4, ge=0)

    @model_validator(mode="after")
    def _check(self) -> LayerSpec:
        if self.weight != "ternary":
            if self.smoothing == "columns":
                raise UserError("smoothing 'columns' is for ternary weights: expected another")
        elif self.smoothing in ("grid", "descent"):
            raise UserError(f"smoothing {self.smoothing!r} is not for ternary weights: expected 'columns', or none")
        elif solves_with_data(self.solver()):
            if self.rounding != "gptq" or self.smoothing in ("span", "modulation"):
                raise UserError(
                    "ternary weights solved with data: expected rounding 'gptq', and smoothing 'columns' or none"
                )
            if self.sensitivity:
                raise UserError("sensitivity is not for ternary weights: expected false")
        return self

    def scheme(self, n: int, k: int) -> Scheme:
        """The scheme of an [n, k] layer, its rank a whole number; shifts are the architecture's to place."""
        from bittern.scheme import Scheme

        return Scheme(
            weight=self.weight,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
            activations=self.activations,
            rank=resolve_rank(self.rank, n, k),
            branch_dtype=self.branch_dtype,
            smooth=self.smoothing != "none",
            packing=self.packing,
        )

    def solver(self) -> dict[str, Any]:
        """The solver settings, as keyword arguments of `SolverOptions`."""
        return {name: getattr(self, name) for name in SOLVER_FIELDS}


class Recipe(BaseModel):
    """A named description of a whole model's quantization.

    Attributes:
        name: What reports and checkpoints call it.
        summary: One line for people.
        default: The layers inside the blocks.
        samples: (prompt, step) pairs that a recipe with calibrated stages sees.
        rows: Tokens of them that are kept of each layer's input.
        predecessors: Whose outputs a layer is calibrated behind: "full", the 16-bit model's, or "few-bit", those of the
            blocks before it as they were solved.
        modulation: What is different for the adaLN linears, which see one row per image.
        convolution: What is different for convolutions with kernels larger than 1 x 1, and for layers that read the
            residual stream without a norm, beyond `CONVOLUTION`: int4 weights in groups of 64 channels, 16-bit
            activations. Null keeps them in 16 bits. Other 1 x 1 convolutions are treated as linears.
        overrides: What is different for the targets that a glob matches (`*` matches dots too); later
            globs win over earlier ones.
        keep: Globs of targets to leave in 16 bits.
        distillation: How the few-bit model is trained to answer as the original does; None for no training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    summary: str = ""
    samples: int = Field(default=256, ge=1)
    rows: int = Field(default=16384, ge=64)
    predecessors: Literal["full", "few-bit"] = "full"
    default: LayerSpec
    modulation: dict[str, Any] = {}
    convolution: dict[str, Any] | None = {}
    overrides: dict[str, dict[str, Any]] = {}
    keep: list[str] = []
    distillation: Distillation | None = None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        self.default.scheme(1 << 20, 1 << 20)
        _patched(self.default, self.modulation, "modulation").scheme(1 << 20, 1 << 20)
        self._convolution().scheme(1 << 20, 1 << 20)
        for glob, patch in self.overrides.items():
            _patched(self.default, patch, f"overrides[{glob!r}]").scheme(1 << 20, 1 << 20)
        return self

    def spec(self, path: str, *, modulation: bool = False, convolution: bool = False) -> LayerSpec:
        """The spec of the target at `path`: default, then its kind's, then every override that matches."""
        spec = self._convolution() if convolution else self.default
        if modulation:
            spec = _patched(spec, self.modulation, "modulation")
        for glob, patch in self.overrides.items():
            if fnmatchcase(path, glob):
                spec = _patched(spec, patch, f"overrides[{glob!r}]")
        return spec

    def _convolution(self) -> LayerSpec:
        return _patched(self.default, {**CONVOLUTION, **(self.convolution or {})}, "convolution")

    @property
    def calibrated(self) -> bool:
        """Whether prompts have to be drawn: a layer needs to know its input, or the model is trained."""
        if self.distillation is not None:
            return True
        patches = [*self.overrides.values(), self.modulation]
        specs = [self.default, *(_patched(self.default, patch, "patch") for patch in patches)]
        if self.convolution is not None:
            specs.append(self._convolution())
        return any(needs_data(spec.solver()) for spec in specs)

    def keeps(self, path: str) -> bool:
        """Whether a `keep` glob matches `path`."""
        return any(fnmatchcase(path, glob) for glob in self.keep)

    def override(self, **changes: Any) -> Recipe:
        """A copy with some values changed, validated anew; mappings are merged, everything else replaced.

        >>> load("svdquant-fast").override(default={"rank": "1/96"}).name
        'svdquant-fast[default.rank=1/96]'

        Raises:
            UserError: for an unknown key or a value that does not fit.
        """
        label = ", ".join(_labels(changes))
        changes = {"name": f"{self.name}[{label}]" if label else self.name, **changes}
        return validated(Recipe, _merged(self.dump(), changes), f"recipe {self.name}")

    def dump(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as JSON values."""
        return self.model_dump(mode="json")


def _patched(spec: LayerSpec, patch: Mapping[str, Any], where: str) -> LayerSpec:
    return validated(LayerSpec, {**spec.model_dump(), **patch}, where)


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def _labels(changes: Mapping[str, Any], prefix: str = "") -> list[str]:
    labels: list[str] = []
    for key, value in changes.items():
        if isinstance(value, Mapping):
            labels += _labels(value, f"{prefix}{key}.")
        elif prefix or key != "name":
            labels.append(f"{prefix}{key}={value}")
    return labels
