"""Ternary layers that share an input, and the Gram matrix of that input -> codes, scales, smoothing and a joint branch.

The stages, each of which is reported with the error it leaves:

    nearest   exact least squares of the weight: where it starts
    gptq      codes by GPTQ for the scales of the start
    refit     scales fitted to the codes; then, while the output error falls, codes by GPTQ for these scales, and scales
              again; the smoothing and the branch are fitted in turn with them
    sweeps    coordinate descent over the codes, and scales again
    bias      the mean error of each output taken from its bias  (bias.py)

Every row keeps, of all that was tried, what leaves it the least error. A step that does not lower the error of all
rows together is undone, so that no stage raises it. The error is the layer's output error on *all* tokens that were
recorded, from their Gram matrix; rounding activations to 8 bits is left out: its error is a hundredth of ternary's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.errors import UserError
from bittern.formats import KLayout, dtype_of, encode, round_to, ternary
from bittern.precision import exact_products
from bittern.scheme import Scheme
from bittern.solvers.bias import mean_error
from bittern.solvers.gptq import compensated, ordered_factor
from bittern.solvers.lowrank import random_start
from bittern.solvers.options import SolverOptions
from bittern.solvers.solution import Solution, Stages
from bittern.solvers.solve import SMALL, check_weights
from bittern.solvers.trits import columns, descended, fitted, output_errors, steps_of
from bittern.solvers.weighted import stored, weighted_low_rank
from bittern.threads import one_thread
from bittern.trajectories import Statistics

LEAST_GAIN = 0.002
"""Rounds end when they lower the squared error by a smaller share."""


@dataclass(frozen=True)
class _Draft:
    """The tensors so far; codes in float32 and without padding, all else in its stored type."""

    codes: Float[Tensor, "n k"]
    scales: Float[Tensor, "n groups"]
    smooth: Float[Tensor, " k"] | None
    up: Float[Tensor, "n r"] | None
    down: Float[Tensor, "r k"] | None


@torch.no_grad()
def solve_ternary(
    weights: Sequence[Tensor],
    statistics: Statistics,
    scheme: Scheme,
    options: SolverOptions,
    segments: Sequence[int],
    seed: int,
    names: Sequence[str] | None = None,
) -> tuple[list[Solution], list[Stages]]:
    """Quantizes the weights of layers that read one input to three values, with data.

    Alive at once: eleven float32 copies of the stacked weights, four float32 [k, k] and three float64 ones.

    Args:
        weights: [n_i, k] each, any float type, finite and at most 1e30.
        statistics: Of the input, with its Gram matrix.
        scheme: Formats, group, rank and stored types; ternary.
        options: Which stages, and how.
        segments: Lengths of the K-segments; their sum is k.
        seed: The same seed gives the same result, whatever torch's global random state.
        names: What to call the weights in errors.

    Returns:
        One solution and one table of stages a weight, in order.

    Raises:
        UserError: for weights that are not finite, not float or of the wrong shape, for statistics without a Gram
            matrix, and for a scheme or options that it does not know.
    """
    names = names or [f"weights[{i}]" for i in range(len(weights))]
    layout = scheme.layout(segments)
    check_weights(weights, layout, names)
    if scheme.weight != "ternary":
        raise UserError(f"{names[0]}: expected a ternary scheme, not {scheme.weight}")
    if scheme.smooth and options.smoothing != "columns":
        raise UserError(
            f"{names[0]}: smoothing {options.smoothing!r} of ternary weights with data: expected 'columns' or 'none'"
        )
    if statistics.gram is None:
        raise UserError(f"{names[0]}: ternary codes with data need the Gram matrix of the inputs: record it")
    with one_thread(sum(weight.numel() for weight in weights) <= SMALL), exact_products():
        problem = _Problem(weights, statistics.gram, scheme, options, layout, seed)
        draft, stages = problem.solve()
    rows = [len(weight) for weight in weights]
    ups = [None] * len(rows) if draft.up is None else torch.split(draft.up, rows)
    codes = layout.pad(draft.codes.to(torch.int8))
    parts = zip(torch.split(codes, rows), torch.split(draft.scales, rows), ups, strict=True)
    solutions = [Solution(part, scales, draft.smooth, draft.down, up, layout) for part, scales, up in parts]
    if options.bias_correction:
        pairs = zip(weights, solutions, strict=True)
        biases = [mean_error(weight, solution, statistics.rows, scheme) for weight, solution in pairs]
        solutions = [replace(solution, bias=bias) for solution, bias in zip(solutions, biases, strict=True)]
        problem.note("bias", problem.corrected(draft, torch.cat(biases), statistics), stages)
    return solutions, stages


class _Problem:
    """One solve: what is given, and the steps that make one draft from another."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        gram: Float[Tensor, "k k"],
        scheme: Scheme,
        options: SolverOptions,
        layout: KLayout,
        seed: int,
    ) -> None:
        self.scheme, self.options, self.layout = scheme, options, layout
        self.weight = torch.cat([weight.float() for weight in weights])
        self.sizes = [len(weight) for weight in weights]
        # Sums over any number of tokens, and inputs of any size: the unit does not matter.
        mean = float(gram.diagonal().double().mean())
        self.gram = gram.float() / mean if mean > 0 else torch.zeros_like(gram)
        self.unit = mean
        self.damped = self.gram.clone()
        self.damped.diagonal().add_(options.damping if mean > 0 else 1.0)
        self.branch_dtype = dtype_of(scheme.branch_dtype)
        held = min(scheme.rank + options.svd_oversample, *self.weight.shape)
        self.start = random_start(layout.k, held, seed, self.weight.device)
        self.given = self.sums(output_errors(self.weight, self.gram))

    def solve(self) -> tuple[_Draft, list[Stages]]:
        """The last draft, and the errors after each stage."""
        stages: list[Stages] = [{} for _ in self.sizes]

        def note(stage: str, draft: _Draft) -> None:
            self.note(stage, output_errors(self.missed(draft), self.gram), stages)

        draft = self.nearest()
        note("nearest", draft)
        factor = self.factor(draft)
        draft = self.better(draft, self.by_gptq(draft, factor, fit=False))
        note("gptq", draft)
        error = self.total(draft)
        for turn in range(self.options.refits):
            draft = self.better(draft, self.with_scales(draft)) if turn == 0 else draft
            draft = self.with_branch(self.with_columns(draft))
            if draft.smooth is not None:
                factor = self.factor(draft)
            draft = self.better(draft, self.by_gptq(draft, factor, fit=True))
            before, error = error, self.total(draft)
            if error > (1 - LEAST_GAIN) * before:
                break
        if self.options.refits:
            note("refit", draft)
        for _ in range(self.options.sweeps):
            draft = self.better(draft, self.swept(draft))
            before, error = error, self.total(draft)
            if error > (1 - LEAST_GAIN) * before:
                break
        if self.options.sweeps:
            note("sweeps", draft)
        return draft, stages

    # ---- steps

    def nearest(self) -> _Draft:
        """Where it starts: least squares of the weight, no branch, a smoothing of ones."""
        rule, dtype = self.options.rule(self.scheme.weight), dtype_of(self.scheme.scale_dtype)
        codes, scales = encode(self.weight, self.layout, rule, dtype)
        ones = self.weight.new_ones(self.layout.k).to(self.branch_dtype) if self.scheme.smooth else None
        return _Draft(self.layout.unpad(codes).float(), scales, ones, None, None)

    def by_gptq(self, draft: _Draft, factor: tuple[Tensor, Tensor], fit: bool) -> _Draft:
        """Codes by GPTQ for the draft's scales, and perhaps scales for these codes."""
        codes = compensated(self.target(draft), steps_of(draft.scales, self.layout), *factor, ternary.on_grid)
        found = replace(draft, codes=codes)
        return self.with_scales(found) if fit else found

    def swept(self, draft: _Draft) -> _Draft:
        """Codes by one sweep of coordinate descent, and scales for them."""
        target, gram = self.target(draft), self.smoothed(self.damped, draft)
        codes = descended(target, gram, draft.codes, steps_of(draft.scales, self.layout))
        return self.with_scales(replace(draft, codes=codes))

    def with_scales(self, draft: _Draft) -> _Draft:
        """The best scales for the draft's codes."""
        gram = self.smoothed(self.damped, draft)
        codes, scales = fitted(self.target(draft), gram, draft.codes, draft.scales, self.layout)
        return replace(draft, codes=codes, scales=scales)

    def with_columns(self, draft: _Draft) -> _Draft:
        """The best smoothing for the draft's codes, and scales for both, if that is better."""
        if draft.smooth is None:
            return draft
        wanted = self.weight if draft.up is None else self.weight - self.branch(draft)
        smooth = columns(wanted, self.damped, self.coded(draft), draft.smooth)
        return self.lower(draft, self.with_scales(replace(draft, smooth=round_to(smooth, self.branch_dtype))))

    def with_branch(self, draft: _Draft) -> _Draft:
        """The best branch for the draft's codes, if that is better: a weighted SVD of what they miss."""
        if not self.scheme.rank:
            return draft
        missed = self.weight - self.effective(draft)
        found = weighted_low_rank(missed, self.damped, None, self.scheme.rank, self.start, self.options.svd_iterations)
        up, down = stored(found.up, found.down, self.branch_dtype)
        return self.lower(draft, replace(draft, up=up, down=down))

    def better(self, old: _Draft, new: _Draft) -> _Draft:
        """Of each row's codes and scales those that leave less, all else being equal in both."""
        keep = (self.errors(new) < self.errors(old))[:, None]
        return replace(
            old, codes=torch.where(keep, new.codes, old.codes), scales=torch.where(keep, new.scales, old.scales)
        )

    def lower(self, old: _Draft, new: _Draft) -> _Draft:
        """The draft of least error."""
        return new if self.total(new) < self.total(old) else old

    # ---- what a draft stands for

    def factor(self, draft: _Draft) -> tuple[Tensor, Tensor]:
        """Order of the columns, and factor, for GPTQ on inputs as the draft smooths them."""
        # Damped already, as much as it takes; and damping is of the inputs as they come.
        return ordered_factor(self.smoothed(self.damped, draft), 1e-6)

    def smoothed(self, gram: Float[Tensor, "k k"], draft: _Draft) -> Float[Tensor, "k k"]:
        """The Gram matrix of x / s."""
        if draft.smooth is None:
            return gram
        inverse = draft.smooth.float().reciprocal()
        return gram * inverse[:, None] * inverse

    def branch(self, draft: _Draft) -> Float[Tensor, "n k"]:
        """U D."""
        assert draft.up is not None
        assert draft.down is not None
        return draft.up.float() @ draft.down.float()

    def target(self, draft: _Draft) -> Float[Tensor, "n k"]:
        """What the codes are to carry: (W - U D) diag(s)."""
        rest = self.weight if draft.up is None else self.weight - self.branch(draft)
        return rest if draft.smooth is None else rest * draft.smooth.float()

    def coded(self, draft: _Draft) -> Float[Tensor, "n k"]:
        """What, codes times scales."""
        return draft.codes * steps_of(draft.scales, self.layout)

    def effective(self, draft: _Draft) -> Float[Tensor, "n k"]:
        """What the codes make of the inputs as they come: What diag(1 / s)."""
        coded = self.coded(draft)
        return coded if draft.smooth is None else coded / draft.smooth.float()

    def missed(self, draft: _Draft) -> Float[Tensor, "n k"]:
        """What the layer lacks of its weight."""
        missed = self.weight - self.effective(draft)
        return missed if draft.up is None else missed - self.branch(draft)

    def errors(self, draft: _Draft) -> Float[Tensor, " n"]:
        """Squared output error of each row, on the damped Gram matrix: what is kept small."""
        return output_errors(self.missed(draft), self.damped)

    def total(self, draft: _Draft) -> float:
        """Of all rows."""
        return float(self.errors(draft).sum())

    def corrected(self, draft: _Draft, bias: Float[Tensor, " n"], statistics: Statistics) -> Float[Tensor, " n"]:
        """Squared output error of each row with something added to its output: d H d^T - 2 b sum(d x) + count b^2."""
        missed, bias = self.missed(draft), bias.double()
        if self.unit <= 0:
            return output_errors(missed, self.gram)
        mean = missed.double() @ statistics.rows.mean(dim=0, dtype=torch.float64)
        change = statistics.count / self.unit * (bias.square() - 2 * bias * mean)
        return (output_errors(missed, self.gram) + change).clamp(min=0)

    def note(self, stage: str, errors: Float[Tensor, " n"], stages: list[Stages]) -> None:
        """Writes down each layer's output error over its output, from the squared errors of all rows."""
        for table, part, whole in zip(stages, self.sums(errors), self.given, strict=True):
            table[stage] = float(f"{(part / whole) ** 0.5:.6g}") if whole else 0.0

    def sums(self, rows: Float[Tensor, " n"]) -> list[float]:
        """Of each layer's rows."""
        return [float(part.sum()) for part in torch.split(rows, self.sizes)]
