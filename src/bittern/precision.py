"""How exactly GPUs multiply float32 matrices, and which CPUs multiply 16-bit ones."""

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


def multiplies(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether a device has arithmetic for the products and convolutions of a dtype.

    A CPU that has none, such as one with AVX2 alone, takes ten to twenty times as long for them as in float32.
    """
    if torch.device(device).type != "cpu":
        return True
    # No part of torch's documented interface tells; these are what its own convolutions ask.
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    tell = asked and getattr(torch.ops.mkldnn, asked, None)
    return bool(tell()) if tell else True
