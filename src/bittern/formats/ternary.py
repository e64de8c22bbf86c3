"""ternary: codes -1, 0, 1 under one scale a group or a row.

`least_squares` is exact. For a support S of k codes the best scale is (sum over S of |w|) / k, and it leaves
the squared error ||w||^2 - (sum over S of |w|)^2 / k; so S holds the k largest |w|, and one sort and one
cumulative sum try every k. No search over the 3^n codes finds better (docs/maths.md has the proof).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.formats.coding import Blocks, Coded, GroupLengths, nearest
from bittern.formats.dtypes import round_to

LOW, HIGH = -1, 1


def on_grid(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The code nearest to each value, as a float."""
    return values.round().clamp_(LOW, HIGH)


def absmean(blocks: Blocks, lengths: GroupLengths, dtype: torch.dtype) -> Coded:
    """Scale mean |w| and the nearest codes, as BitNet b1.58 has them: the usual baseline."""
    mean = blocks.abs().sum(dim=-1, dtype=torch.float64) / lengths
    scales = round_to(mean, dtype)
    return nearest(blocks, scales, LOW, HIGH), scales


def least_squares(blocks: Blocks, lengths: GroupLengths, dtype: torch.dtype) -> Coded:
    """The codes and the stored scale of least squared error.

    Exact after rounding too: for each k the squared error is a parabola in the scale, so that the best stored
    scale is the stored number nearest to the vertex, and k is chosen by the error which that one leaves.
    """
    magnitudes = blocks.abs().sort(dim=-1, descending=True).values
    sums = magnitudes.cumsum(dim=-1, dtype=torch.float64)
    counts = torch.arange(1, blocks.shape[-1] + 1, dtype=torch.float64, device=blocks.device)
    candidates = round_to(sums / counts, dtype).double()
    gains = candidates * (2 * sums - counts * candidates)
    best = gains.argmax(dim=-1, keepdim=True)
    scales = candidates.gather(-1, best)[..., 0].to(dtype)
    return nearest(blocks, scales, LOW, HIGH), scales
