"""The floating-point types in which scales, smoothing and low-rank factors are stored."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.errors import UserError, did_you_mean

DtypeName = Literal["bf16", "fp16", "fp32", "e4m3"]

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a stored type's short name.

    Raises:
        UserError: if the name is not one of "bf16", "fp16", "fp32", "e4m3".
    """
    if name not in DTYPES:
        raise UserError(f"unknown stored type {name!r}: {did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def round_to(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Each value as the nearest *finite* number of a stored type.

    A plain cast turns 65,520 in fp16 into infinity, which then turns a whole layer into NaN; the nearest
    finite number is also the least-squares choice for a scale.
    """
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)
