"""The layer on path "a8-fp8" without its prologue: unpack -> 8-bit weight, then one GEMM with codes that are given.

The codes of one segment whose length is a multiple of `config.SCRATCH_MULTIPLE` are the GEMM's operand as they lie.
What is saved is the prologue's floor, M·K·3 bytes of device memory; what is left is that of the GEMM (see `gemm`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.ops import reference
from bittern.ops.triton import config
from bittern.ops.triton.launch import Launches, Recorder, contiguous_rows, describable, on_device_of
from bittern.ops.triton.linear import LayerCall, multiply
from bittern.ops.triton.unpack import unpack_segment


class CodedEightBits:
    """A layer's launches for calls of one signature, found by the first of them."""

    def __init__(self) -> None:
        self._launches: Launches | None = None

    def __call__(
        self,
        coded: Tensor,
        token_scales: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        weight: str,
        group_size: int | None,
        gelu_from: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The layer's output. Arguments as in `bittern::few_bit_linear_coded`."""
        out = coded.new_empty((*coded.shape[:-1], codes.shape[0]), dtype=dtype)
        a, row_scales = coded.reshape(-1, coded.shape[-1]).contiguous(), token_scales.reshape(1, -1).contiguous()
        if not describable(a):
            a = a.clone()
        codes, scales = contiguous_rows(codes), contiguous_rows(scales)
        bias = None if bias is None else contiguous_rows(bias)
        tensors = (a, row_scales, codes, scales, bias, out)
        if self._launches is not None:
            with on_device_of(a):
                if self._launches.repeat(tensors, a.device):
                    return out
        recorder = Recorder(tensors)
        layout = reference.layout_of((a.shape[1],), group_size)
        flat = recorder.part(out, out.view(-1, codes.shape[0]))
        call = LayerCall(
            [a], codes, scales, [None], [None], None, bias, None, flat, weight, layout, "a8-fp8", (), gelu_from
        )
        b, column_scales = recorder.scratch(
            a.device, ((codes.shape[0], a.shape[1]), torch.float8_e4m3fn), ((1, codes.shape[0]), torch.float32)
        )
        (segment,) = layout
        unpack_segment(
            codes,
            scales,
            weight,
            segment,
            b,
            recorder.part(column_scales, column_scales[0]),
            config.unpack_for(config.device_of(a.device), a.shape[1], group_size is not None),
            launch=recorder.launch,
        )
        multiply(recorder, call, a, b, row_scales, column_scales, None)
        self._launches = recorder.launches() or self._launches
        return out
