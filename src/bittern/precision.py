"""How exactly GPUs multiply float32 matrices."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products() -> Generator[None]:
    """Products of float32 matrices in float32 for the time of the block, also where TF32 is allowed.

    TF32 keeps ten bits of a factor. Users allow it to draw faster (`set_float32_matmul_precision("high")`, or an
    environment variable of torch's), but X^T X then has negative eigenvalues as large as the damping, and no Cholesky
    factor.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
