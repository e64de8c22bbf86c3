"""Weights that share an input, and what is known of that input -> codes, scales, smoothing and a joint branch.

The stages, each of which is reported with the error it leaves:

    nearest     nearest codes, no smoothing and no branch: where it starts
    smoothing   s from the 39 candidates, with an SVD branch and nearest codes  (smooth_grid.py)
    descent     s by gradient descent from there                                (smooth_descent.py)
    branch      weighted SVD of W diag(s)                                   (weighted.py)
    gptq        codes of the residual by GPTQ                               (gptq.py)
    refit       reduced-rank regression of the branch, codes fixed          (weighted.py)
    bias        the mean error of each output taken from its bias           (bias.py)

The error is that of the layer's output on a sample of its inputs, over the output itself, both as far as the model's
output feels them where sensitivities are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bittern.errors import UserError
from bittern.formats import KLayout, Rule, decode, dtype_of, encode, int4, nvfp4
from bittern.precision import exact_products
from bittern.scheme import Scheme
from bittern.solvers.bias import mean_error
from bittern.solvers.gptq import gptq
from bittern.solvers.inputs import rounded, smoothed
from bittern.solvers.lowrank import LowRank, low_rank, random_start
from bittern.solvers.options import SolverOptions
from bittern.solvers.smooth_descent import descend
from bittern.solvers.smooth_grid import best_smoothing
from bittern.solvers.solution import Solution, Stages, frobenius
from bittern.solvers.solve import SMALL, check_weights
from bittern.solvers.weighted import Metric, input_weight, refitted, stored, weighted_low_rank
from bittern.threads import one_thread
from bittern.trajectories import Statistics

GRID_ROWS = 256
"""Rows on which smoothing candidates are scored."""

DESCENT_ROWS = 512
"""Rows on which smoothing descends."""

ERROR_ROWS = 2048
"""Rows on which a stage's error is measured."""


@dataclass(frozen=True)
class _Draft:
    """The tensors so far."""

    codes: Int8[Tensor, "n padded_k"]
    scales: Float[Tensor, "n groups"]
    smooth: Float[Tensor, " k"] | None
    up: Float[Tensor, "n r"] | None
    down: Float[Tensor, "r k"] | None


@torch.no_grad()
def solve_calibrated(
    weights: Sequence[Tensor],
    statistics: Statistics,
    scheme: Scheme,
    options: SolverOptions,
    segments: Sequence[int],
    seed: int,
    names: Sequence[str] | None = None,
    sensitivity: Sequence[Float[Tensor, "n n"]] | None = None,
) -> tuple[list[Solution], list[Stages]]:
    """Quantizes the weights of layers that read one input, with data.

    Alive at once: five float32 copies of the stacked weights, four of the rows, three float64 [k, k] and the
    sensitivities in float64.

    Args:
        weights: [n_i, k] each, any float type, finite and at most 1e30.
        statistics: Of the input.
        scheme: Formats, group, rank, activations and stored types; int4 or nvfp4.
        options: Which stages, and how.
        segments: Lengths of the K-segments; their sum is k.
        seed: The same seed gives the same result, whatever torch's global random state.
        names: What to call the weights in errors.
        sensitivity: G of each output (see `trajectories.sensitivities`); None counts all errors alike.

    Returns:
        One solution and one table of stages a weight, in order.

    Raises:
        UserError: for weights that are not finite, not float or of the wrong shape, for options that do not fit the
            scheme, and for ternary.
    """
    names = names or [f"weights[{i}]" for i in range(len(weights))]
    layout = scheme.layout(segments)
    check_weights(weights, layout, names)
    if scheme.weight == "ternary":
        raise UserError(f"{names[0]}: calibrated stages are for int4 and nvfp4, not ternary; leave them out")
    with one_thread(sum(weight.numel() for weight in weights) <= SMALL), exact_products():
        problem = _Problem(weights, statistics, scheme, options, layout, seed, sensitivity)
        draft, stages = problem.solve()
        rows = [weight.shape[0] for weight in weights]
        ups = [None] * len(rows) if draft.up is None else torch.split(draft.up, rows)
        parts = zip(torch.split(draft.codes, rows), torch.split(draft.scales, rows), ups, strict=True)
        solutions = [Solution(codes, scales, draft.smooth, draft.down, up, layout) for codes, scales, up in parts]
        if options.bias_correction:
            pairs = zip(weights, solutions, strict=True)
            biases = [mean_error(weight, solution, statistics.rows, scheme) for weight, solution in pairs]
            solutions = [replace(solution, bias=bias) for solution, bias in zip(solutions, biases, strict=True)]
            problem.note("bias", problem.errors(draft, problem.judged, torch.cat(biases)), stages)
    return solutions, stages


class _Problem:
    """One solve: what is given, and the steps that make one draft from another."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        statistics: Statistics,
        scheme: Scheme,
        options: SolverOptions,
        layout: KLayout,
        seed: int,
        sensitivity: Sequence[Tensor] | None,
    ) -> None:
        self.scheme, self.options, self.layout, self.statistics = scheme, options, layout, statistics
        self.weight = torch.cat([weight.float() for weight in weights])
        self.sizes = [len(weight) for weight in weights]
        self.metric = Metric(sensitivity) if sensitivity is not None else None
        self.rule, self.scale_dtype = options.rule(scheme.weight), scheme.solved_scale_dtype
        self.on_grid = nvfp4.on_grid if scheme.weight == "nvfp4" else int4.on_grid
        self.plain_rule = replace(options, scales="absmax").rule(scheme.weight)
        self.branch_dtype = dtype_of(scheme.branch_dtype)
        columns = min(scheme.rank + options.svd_oversample, *self.weight.shape)
        self.start = random_start(layout.k, columns, seed, self.weight.device)
        self.outputs: dict[int, list[float]] = {}
        self.judged = _spread(statistics.rows, ERROR_ROWS)

    def solve(self) -> tuple[_Draft, list[Stages]]:
        """The last draft, and the errors after each stage."""
        options = self.options
        draft = self.nearest(_Draft(self.weight[:, :0].to(torch.int8), self.weight[:, :0], None, None, None))
        stages: list[Stages] = [{} for _ in self.sizes]

        def note(stage: str) -> float:
            errors = self.errors(draft, self.judged)
            self.note(stage, errors, stages)
            return math.hypot(*errors)

        note("nearest")
        smooth = self.grid() if self.scheme.smooth else None
        if smooth is not None or self.scheme.rank:
            draft = self.nearest(self.plain_branch(smooth))
            note("smoothing")
        if smooth is not None and options.smoothing == "descent":
            smooth = self.descent(smooth)
            draft = self.nearest(self.plain_branch(smooth))
            note("descent")
        u, ut = smoothed(self.statistics.rows, smooth), rounded(self.statistics.rows, smooth, self.layout, self.scheme)
        target = self.weight if smooth is None else self.weight * smooth.float()
        if self.scheme.rank and options.branch == "outputs":
            draft = self.nearest(self.with_branch(self.output_branch(target, u, ut), smooth))
            note("branch")
        if options.rounding == "gptq":
            hessian = self.hessian(ut, smooth)
            draft = self.by_gptq(draft, hessian)
            error = note("gptq")
            for _ in range(options.refits if self.scheme.rank else 0):
                coded = decode(draft.codes, draft.scales, self.layout)
                found = refitted(
                    target, coded, u, ut, self.metric, self.scheme.rank, self.start, options.svd_iterations
                )
                before, draft = draft, self.with_branch(found, smooth, draft)
                now = note("refit")
                if now >= error:
                    draft = before
                    note("refit")
                    break
                error = now
        return draft, stages

    def grid(self) -> Float[Tensor, " k"]:
        """The best smoothing of the grid."""
        inputs = self.statistics.amax.clone()
        for segment, shift in zip(self.layout, self.scheme.shift or (0.0,) * len(self.layout.segments), strict=True):
            inputs[segment.logical] += shift
        rows = _spread(self.statistics.rows, GRID_ROWS)

        def error(smooth: Float[Tensor, " k"]) -> float:
            # Candidates differ by more than the search of scales gives, and it takes most of the time.
            return math.hypot(*self.errors(self.nearest(self.plain_branch(smooth), self.plain_rule), rows))

        spans = self.weight.abs().amax(dim=0)
        return best_smoothing(inputs, spans, self.layout, self.branch_dtype, error)[0]

    def descent(self, start: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """The smoothing by gradient descent from another."""
        rows = _spread(self.statistics.rows, DESCENT_ROWS)

        def residual(smooth: Float[Tensor, " k"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
            rest = self.weight
            if self.scheme.rank:
                u, ut = smoothed(rows, smooth), rounded(rows, smooth, self.layout, self.scheme)
                branch = self.output_branch(self.weight * smooth, u, ut)
                rest = torch.addmm(rest, branch.up, branch.down / smooth, alpha=-1)
            return rest, rest if self.metric is None else self.metric.left(rest)

        powers = None if self.metric is None else self.metric.powers()
        return descend(start, rows, powers, residual, self.layout, self.scheme, self.branch_dtype)

    def output_branch(self, target: Float[Tensor, "n k"], u: Float[Tensor, "m k"], ut: Float[Tensor, "m k"]) -> LowRank:
        """The branch of least expected output error."""
        weight, rank = input_weight(u, ut), self.scheme.rank
        return weighted_low_rank(target, weight, self.metric, rank, self.start, self.options.svd_iterations)

    def plain_branch(self, smooth: Float[Tensor, " k"] | None) -> _Draft:
        """The first singular components of the smoothed weight, as far as its outputs are felt."""
        if not self.scheme.rank:
            return _Draft(self.weight[:, :0].to(torch.int8), self.weight[:, :0], smooth, None, None)
        target = self.weight if smooth is None else self.weight * smooth.float()
        if self.metric is None:
            return self.with_branch(low_rank(target, self.scheme.rank, self.start, self.options.svd_iterations), smooth)
        felt = low_rank(self.metric.left(target), self.scheme.rank, self.start, self.options.svd_iterations)
        return self.with_branch(LowRank(self.metric.unleft(felt.up), felt.down, felt.basis), smooth)

    def with_branch(self, found: LowRank, smooth: Float[Tensor, " k"] | None, draft: _Draft | None = None) -> _Draft:
        """A draft with this branch as stored, reading raw inputs; codes are `draft`'s, or none yet."""
        down = found.down if smooth is None else found.down / smooth.float()
        up, down = stored(found.up, down, self.branch_dtype)
        if draft is not None:
            return replace(draft, up=up, down=down)
        return _Draft(self.weight[:, :0].to(torch.int8), self.weight[:, :0], smooth, up, down)

    def residual(self, draft: _Draft) -> Float[Tensor, "n k"]:
        """What the codes are to carry: (W - U D) diag(s)."""
        rest = self.weight
        if draft.up is not None and draft.down is not None:
            rest = torch.addmm(rest, draft.up.float(), draft.down.float(), alpha=-1)
        return rest if draft.smooth is None else rest * draft.smooth.float()

    def nearest(self, draft: _Draft, rule: Rule | None = None) -> _Draft:
        """Nearest codes of the residual."""
        codes, scales = encode(self.residual(draft), self.layout, rule or self.rule, self.scale_dtype)
        return replace(draft, codes=codes, scales=scales)

    def by_gptq(self, draft: _Draft, hessian: Float[Tensor, "k k"]) -> _Draft:
        """GPTQ's codes of the residual."""
        codes, scales = gptq(
            self.residual(draft), hessian, self.layout, self.rule, self.scale_dtype, self.options.damping, self.on_grid
        )
        return replace(draft, codes=codes, scales=scales)

    def hessian(self, ut: Float[Tensor, "m k"], smooth: Float[Tensor, " k"] | None) -> Float[Tensor, "k k"]:
        """Products of the inputs that the codes meet; of all tokens where these are not rounded."""
        if self.scheme.activations < 16:
            return ut.T @ ut
        inverse = None if smooth is None else smooth.float().reciprocal()
        gram = self.statistics.gram
        if gram is None:
            raise UserError("GPTQ with 16-bit activations needs the Gram matrix of its inputs: record it")
        return gram if inverse is None else gram * inverse[:, None] * inverse

    @staticmethod
    def note(stage: str, errors: Sequence[float], stages: Sequence[Stages]) -> None:
        """Writes the error of each layer into its table."""
        for table, error in zip(stages, errors, strict=True):
            table[stage] = float(f"{error:.6g}")

    def errors(self, draft: _Draft, rows: Float[Tensor, "m k"], bias: Float[Tensor, " n"] | None = None) -> list[float]:
        """Relative output error of each layer, with something added to its bias."""
        wide = rows.float()
        effective = decode(draft.codes, draft.scales, self.layout)
        branch = self.weight
        if draft.up is not None and draft.down is not None:
            branch = torch.addmm(branch, draft.up.float(), draft.down.float(), alpha=-1)
        missed = branch @ wide.T - effective @ rounded(rows, draft.smooth, self.layout, self.scheme).T
        if bias is not None:
            missed -= bias[:, None]
        pairs = zip(self.norms(missed), self.given(wide), strict=True)
        return [missing / whole if whole else 0.0 for missing, whole in pairs]

    def given(self, rows: Float[Tensor, "m k"]) -> list[float]:
        """Size of each layer's output, worked out once for a number of rows."""
        if len(rows) not in self.outputs:
            self.outputs[len(rows)] = self.norms(self.weight @ rows.T)
        return self.outputs[len(rows)]

    def norms(self, outputs: Float[Tensor, "n m"]) -> list[float]:
        """Size of each layer's part, as far as it is felt."""
        felt = outputs if self.metric is None else self.metric.left(outputs)
        return [frobenius(part) for part in torch.split(felt, self.sizes)]


def _spread(rows: Float[Tensor, "m k"], most: int) -> Float[Tensor, "_ k"]:
    """At most so many rows, evenly spread."""
    return rows[:: -(-len(rows) // most)] if len(rows) else rows
