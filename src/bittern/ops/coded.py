"""Layers whose activations become codes in sight of the compiler, so that it fuses them with what makes x.

A layer that multiplies x alone, without smoothing and without a branch, begins on path "a8-fp8" with plain maths:

    peak = 16 · amax of the first 256 |x|, if that covers all |x|, else amax of all
    scale = max(peak · f32(1 / 448), tiny)                                             codes = e4m3(x · (1 / scale))

In eager a kernel reads x for it (`bittern.ops.triton.whole_rows`). Where `torch.compile` traces the layer, these are
torch's operations instead, followed by an operation that takes codes: Inductor appends them to the kernel of LayerNorm
and modulation, which then writes codes, 1 byte a number, where it wrote x in 2. What is saved is a write and a read of
x, 4·M·K bytes; where something else reads x as well its write stays, and results are right all the same.

Everything else stays the opaque `bittern::few_bit_linear`: eager calls, CUDA graphs of them, exported graphs (whose
schemas are promises), gradients, other devices and paths, few tokens, several inputs.

Numbers: the operations are those of `reference.quantize`, and backends that run them one by one have its codes, bit for
bit. Inductor keeps x in float32 within a kernel, where eager rounds it to 16 bits after LayerNorm and again after
modulation, and on a GPU its 1 / scale is an approximate one: codes next to a tie differ. A token that is not finite has
a scale or codes that are not, and so outputs that are not, and no other token has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bittern.errors import UserError
from bittern.ops import dispatch, reference
from bittern.ops.checks import check
from bittern.ops.library import TAGS, library, without_autocast
from bittern.ops.reference import FORETELLERS, foretold

MULTIPLE = 128
"""K is one of this, so that codes are the GEMM's operand as they lie (`triton.config.SCRATCH_MULTIPLE`)."""

MOST_INPUTS = 4096
"""Inductor's reductions over longer rows read them several times, where our own kernel keeps them in registers."""

FEW_TOKENS = 64
"""Up to here launches bound a layer, and what could be fused is small."""

library.define(
    "few_bit_linear_coded(Tensor coded, Tensor token_scales, Tensor codes, Tensor scales, Tensor? bias, "
    "str weight, int? group_size, int? gelu_from, ScalarType dtype) -> Tensor",
    tags=TAGS,
)


def is_open(inputs: Sequence[Tensor], codes: Tensor, smooth: Tensor | None, down: Tensor | None, path: str) -> bool:
    """Whether a call that needs no gradients shows the compiler how its activations become codes."""
    if not torch.compiler.is_compiling() or _is_exported():
        return False
    if path != "a8-fp8" or len(inputs) != 1 or not multiplies_inputs_alone(smooth, down):
        return False
    x = inputs[0]
    # Before anything that would become a guard where nothing can come of it.
    if not has_kernel(x.device, x.dtype):
        return False
    # What does not fit is left to the opaque operation, which says so.
    if x.ndim == 0 or codes.ndim != 2 or x.shape[-1] % MULTIPLE or not 0 < x.shape[-1] <= MOST_INPUTS:
        return False
    return x.shape[:-1].numel() > FEW_TOKENS


def multiplies_inputs_alone(smooth: Tensor | None, down: Tensor | None) -> bool:
    """Whether a layer's 8-bit product is of its inputs as they come, and all that there is."""
    return smooth is None and down is None


@torch.compiler.assume_constant_result
def _is_exported() -> bool:
    # Asked here and not where it is traced: Dynamo of torch 2.11 says yes whatever it traces for.
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel takes codes of inputs of this dtype on a device."""
    if device.type != "cuda":
        return False
    call = dispatch.Call("ternary", device.type, dispatch.device_capability(device), dtype)
    return dispatch.select("a8-fp8", call).coded is not None


def few_bit_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    weight: str,
    group_size: int | None,
    gelu_from: int | None,
) -> Tensor:
    """The layer as what a compiler sees through and what it does not. Arguments as in `bittern.ops.few_bit_linear`."""
    coded, token_scales = quantize(x)
    return torch.ops.bittern.few_bit_linear_coded.default(
        coded, token_scales, codes, scales, bias, weight, group_size, gelu_from, x.dtype
    )


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [*batch, K] in e4m3 and scales [*batch, 1] of the tokens of x, as `reference.quantize` makes them.

    In one pass forward, as a compiler wants it: the reference saves memory by working in place.
    """
    # The compiler knows these; floats of a module may vary, for all it knows, and become inputs of graphs.
    limit, tiny = torch.finfo(torch.float8_e4m3fn).max, torch.finfo(torch.float32).tiny
    wide = x.float()
    magnitudes = wide.abs()
    # As a maximum over all inputs, of which the later count as 0, it is one of the loop that finds the other.
    foretells = torch.arange(x.shape[-1], device=x.device) < FORETELLERS
    first = torch.where(foretells, magnitudes, 0.0).amax(-1, keepdim=True)
    scale = (foretold(first, magnitudes.amax(-1, keepdim=True)) * (1 / limit)).clamp_min(tiny)
    # The cast overflows to NaN, and scaling can leave a maximum one rounding error above the limit.
    codes = (wide * scale.reciprocal()).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return codes.contiguous(), scale


def _check(
    coded: Tensor,
    token_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    weight: str,
    group_size: int | None,
    gelu_from: int | None,
) -> None:
    check([coded], codes, scales, None, None, None, bias, weight, group_size, (), gelu_from)
    if coded.dtype != torch.float8_e4m3fn or coded.shape[-1] % MULTIPLE or coded.shape[-1] == 0:
        raise UserError(
            f"coded is {list(coded.shape)} in {coded.dtype}: expected torch.float8_e4m3fn, its last axis a multiple of "
            f"{MULTIPLE}"
        )
    if token_scales.shape != (*coded.shape[:-1], 1) or token_scales.dtype != torch.float32:
        raise UserError(
            f"token_scales is {list(token_scales.shape)} in {token_scales.dtype}: expected "
            f"{[*coded.shape[:-1], 1]} in torch.float32"
        )
    if token_scales.device != coded.device:
        raise UserError(f"token_scales is on {token_scales.device}: expected {coded.device}, where the codes are")


def _shape(*args: Any) -> Tensor:
    coded, _, codes, *_, dtype = args
    _check(*args[:-1])
    return coded.new_empty(*coded.shape[:-1], codes.shape[0], dtype=dtype)


def _run(*args: Any) -> Tensor:
    coded, _, codes, _, _, weight, group_size, gelu_from, dtype = args
    tensors = [None if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.is_meta) for t in args[:5]]
    signature = ("coded", weight, group_size, gelu_from, dtype, *tensors)
    run = dispatch.planned(signature)
    if run is None:
        _check(*args[:-1])
        rows = coded.shape[:-1].numel()
        call = dispatch.Call(
            weight,
            coded.device.type,
            dispatch.device_capability(coded.device),
            dtype,
            rows,
            group_size or 0,
            1,
            codes.shape[0],
        )
        made = dispatch.select("a8-fp8", call).coded
        run = dispatch.remember(signature, reference.few_bit_linear_coded if made is None else made())
    return run(*args)


for _device in ("CPU", "CUDA"):
    library.impl("few_bit_linear_coded", without_autocast(_run), _device)
torch.library.register_fake("bittern::few_bit_linear_coded", _shape, lib=library)
