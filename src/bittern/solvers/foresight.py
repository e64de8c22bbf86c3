"""The error that layers will have at each of several ranks, foreseen from one SVD instead of solving for each.

A layer with smoothing s and branch U D computes Qa(u) What^T + u (U D)^T for u = x / s, where What stands for the
residual R = W diag(s) - U D. What it misses is, with e = u - Qa(u) and What = R - Delta,

    E |e R^T + Qa(u) Delta^T|^2  =  tr(R M R^T),    M = E[e^T e] + rho diag(E[Qa(u)^2])

if the rounding errors Delta are white and rho times as large as R, squared: the same M by which branches are weighed
(`weighted.py`). Rank r takes the first r singular components out of R, so that one SVD tells all ranks. What is left
out (rounds that alternate branch and codes, better scales of a smaller residual, GPTQ beyond its share in rho)
helps every rank alike, and only ratios count when bytes are dealt out.

No data is read: u is taken as Gaussian, with the channels' magnitudes where they are known and a GELU where there is
one; rho is measured by rounding W diag(s) once; and errors are relative to the layer's output, because nothing tells
how much the model feels a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.formats import KLayout, decode, encode
from bittern.precision import exact_products
from bittern.scheme import Scheme
from bittern.solvers.inputs import rounded, smoothed
from bittern.solvers.lowrank import low_rank, random_start
from bittern.solvers.options import SolverOptions
from bittern.solvers.solve import SMALL, check_weights, data_free_smoothing
from bittern.threads import one_thread

ROWS = 256
"""Gaussian inputs that are rounded to learn the size of their rounding error."""


@torch.no_grad()
def foresee(
    weights: Sequence[Tensor],
    scheme: Scheme,
    options: SolverOptions,
    segments: Sequence[int],
    ranks: Sequence[int],
    seed: int,
    names: Sequence[str],
    magnitudes: Float[Tensor, " k"] | None = None,
) -> list[float]:
    """The squared relative output errors of layers that read one input, times their weights, at each rank.

    Args:
        weights: As for `solve`.
        scheme: Its rank does not count.
        options: How the layers would be solved.
        segments: Lengths of the K-segments.
        ranks: In rising order.
        seed: Of the SVD and of the inputs.
        names: What to call the weights in errors.
        magnitudes: How large the input's channels are, where it is known.

    Raises:
        UserError: as `solve` does.
    """
    layout = scheme.layout(segments)
    check_weights(weights, layout, names)
    if options.smoothing in ("grid", "descent", "columns"):
        scheme = replace(scheme, smooth=False)  # what it will be only data can tell
    smooth = data_free_smoothing(weights, layout, scheme, options, magnitudes)
    target = torch.cat([weight.float() for weight in weights])
    target = target if smooth is None else target * smooth.float()
    with one_thread(target.numel() <= SMALL), exact_products():
        rows = _gaussian(layout, scheme, magnitudes, seed).to(target.device)
        u, ut = smoothed(rows, smooth), rounded(rows, smooth, layout, scheme)
        power = ut.square().mean(dim=0)
        codes, scales = encode(target, layout, options.rule(scheme.weight), scheme.solved_scale_dtype)
        given = float((target.square() @ power).sum())
        missed = float(((target - decode(codes, scales, layout)).square() @ power).sum())
        weight = (u - ut).square().mean(dim=0) + (missed / given if given else 0.0) * power
        sizes = [len(part) for part in weights]
        outputs = [float(part.sum()) for part in torch.split(target.square() @ power, sizes)]

        rests = _residuals(target, ranks, options, seed)
        return [_relative(rest.square() @ weight, outputs, sizes) * layout.k for rest in rests]


def _gaussian(
    layout: KLayout, scheme: Scheme, magnitudes: Float[Tensor, " k"] | None, seed: int
) -> Float[Tensor, "m k"]:
    """Inputs to expect when nothing but their magnitudes is known."""
    rows = random_start(ROWS, layout.k, seed, torch.device("cpu"))
    if magnitudes is not None:
        rows *= magnitudes.float().cpu()
    for segment, shift in zip(layout, scheme.shift or (0.0,) * len(layout.segments), strict=True):
        if shift:  # such a segment comes out of a GELU
            rows[:, segment.logical] = torch.nn.functional.gelu(rows[:, segment.logical])
    return rows


def _relative(missed: Float[Tensor, " n"], outputs: Sequence[float], sizes: Sequence[int]) -> float:
    """Squared errors of single outputs over each layer's squared output, every layer as often as it has outputs."""
    parts = zip(torch.split(missed, list(sizes)), outputs, sizes, strict=True)
    return sum(n * float(part.sum()) / whole for part, whole, n in parts if whole)


def _residuals(
    matrix: Float[Tensor, "n k"], ranks: Sequence[int], options: SolverOptions, seed: int
) -> Iterator[Float[Tensor, "n k"]]:
    """What is left of a matrix without its first components, for each number of them."""
    columns = min(ranks[-1] + options.svd_oversample, *matrix.shape)
    start = random_start(matrix.shape[1], columns, seed, matrix.device)
    branch = low_rank(matrix, ranks[-1], start, options.svd_iterations) if ranks[-1] else None
    rest, taken = matrix, 0
    for rank in ranks:
        if branch is not None and rank > taken:
            rest = torch.addmm(rest, branch.up[:, taken:rank], branch.down[taken:rank], alpha=-1)
        taken = rank
        yield rest
