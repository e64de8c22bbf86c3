"""Few tokens divided by their smoothing, for the 16-bit path.

The maths: out[m, k] = x[m, k] · (1 / s[k]), rounded to the dtype of `out`.

Layout: a program owns 1024 inputs of a token. In the product's loop every program would work 1 / s out for all of K:
that took 14 of 38 us with 18432 x 3072 and one token, where this launch takes 2.

Floor: 4 bytes a number and the smoothing: 64 x 12288 3.2 MB or 1.1 us at 3 TB/s.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bittern.ops.triton.launch import Launch, cdiv, contiguous_rows, launch
from bittern.ops.triton.numerics import reciprocal_of_smooth, rounded

BLOCK_K, WARPS = 1024, 4


def divide(x: Tensor, smooth: Tensor, out: Tensor, launch: Launch = launch) -> None:
    """Fills `out` with x / smooth.

    Args:
        x: Inputs [M, K], rows of any stride.
        smooth: [K].
        out: [M, K] in any float dtype, rows of any stride.
        launch: What launches.
    """
    m, k = x.shape
    x = contiguous_rows(x)
    launch(
        divide_kernel,
        (cdiv(k, BLOCK_K), m),
        (x, smooth, out),
        (k, x.stride(0), out.stride(0)),
        BLOCK_K=BLOCK_K,
        num_warps=WARPS,
    )


@triton.jit
def divide_kernel(x, smooth, out, k, stride_x, stride_out, BLOCK_K: tl.constexpr):
    """See the module."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    token, inside = tl.program_id(1).to(tl.int64), columns < k
    wide = tl.load(x + token * stride_x + columns, mask=inside).to(tl.float32)
    divided = wide * reciprocal_of_smooth(tl.load(smooth + columns, mask=inside, other=1.0))
    tl.store(out + token * stride_out + columns, rounded(divided, out.dtype.element_ty), mask=inside)
