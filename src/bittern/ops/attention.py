"""Attention in 8 bits: both products take e4m3 operands, as Hopper's and later tensor cores do at twice bf16's rate.

    K'  = k - mean of k over tokens, rounded to k's dtype;  Y_q = q H, Y_k = K' H, H of +1 and -1, n x n
    s_x = 2^ceil(log2(bound of |x| / 448)),  X = e4m3(x / s_x)            for Y_q, Y_k and v, over the whole tensor
    z   = Q K^T · (s_q · s_k · scale / n),  p = exp(z - max z)            in float32, a row of z for a query
    o   = e4m3(256 p) V · s_v / (256 · sum p)                             with the sum over unrounded p
    out = e4m3(o · r) / r,  r = 1 / (2 s_v)                               in q's dtype

Neither of the first two steps changes what is computed, and they decide what is lost. A mean of keys adds the same to
all products of a query (Zhang et al. 2024, SageAttention). H, a Hadamard matrix of the largest power of two that
divides the head, orthogonal over sqrt(n), spreads what few places of queries and keys hold over all (Ashkboos et al.
2024, QuaRot). With both, errors of products fall to a quarter on a model whose products are large
(docs/performance.md).

Scales are found in every call, on the device: nothing saturates, and the host waits for nothing. The bound of v is its
largest magnitude; that of Y_q is sqrt(n) · max |q| over tokens' norms, that of Y_k twice as much of k. Scales are
powers of two. e4m3 has an exponent of its own, the same digits are kept under one scale or another, and so a head or a
picture hardly depends on those beside it, although cuDNN takes one scale for all of a tensor, as long as no number is
more than 1,000 times as large as theirs. Numbers below about 2^-14 of the bound lose digits, below 2^-18 all of them; a
NaN is everybody's. Weights lie in
[0, 1], so that 256 p never saturates; results are means of values, and the values' range, doubled for weights that were
rounded upwards, holds them. On Hopper cuDNN gives 8-bit results only, hence the last rounding; other devices do the
same, to give the same numbers. Queries and keys beyond 1e18, whose squares float32 does not hold, give nothing finite.

NVIDIA's cuDNN computes it (Shah et al. 2024 is the nearest account of how), in tiles, whose maxima replace the row's
while it walks: p is rounded relative to another maximum, by powers of e rather than of two, so that single weights land
on other codes. The plain torch here defines the numbers to within such roundings, not to the bit.

Floor, FLUX.1-dev (24 heads, 4608 tokens, 128): 4 · 24 · 4608^2 · 128 operations, 261 GFLOP, 132 us at 1979 TFLOP/s.
Codes: 85 MB read for the maxima and again for the codes (less what L2 keeps), 42 MB written, 71 us at 3 TB/s; results:
14 MB read and 28 MB written, 14 us.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.errors import UserError
from bittern.ops import dispatch
from bittern.ops.contract import library, without_autocast
from bittern.ops.reference import RANGES, RECIPROCALS

library.define(
    "attention_8bit(Tensor q, Tensor k, Tensor v, float? scale) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)

SOFTMAX_SCALE = 256.0
LEAST_SCALE = 2.0**-60
"""Of codes: a product of three vanishes at 2^-127, and cuDNN multiplies it with infinity where keys end."""
INSTALL = "pip install 'bittern[fp8-attention]'"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_CUDNN = importlib.util.find_spec("cudnn") is not None
_DTYPES = (torch.bfloat16, torch.float16)
_FIRST_CAPABILITY = (9, 0)
_HEAD_MULTIPLE, _LARGEST_HEAD = 16, 128
_SCORES_AT_ONCE = 1 << 25


def attention_8bit(
    q: Float[Tensor, "b l h d"], k: Float[Tensor, "b m h d"], v: Float[Tensor, "b m h d"], scale: float | None = None
) -> Float[Tensor, "b l h d"]:
    """Attention of every query to all keys, in 8 bits.

    Args:
        q: Queries of each image, by token and head; of any strides.
        k: Keys.
        v: Values.
        scale: Multiplies products of queries and keys; 1 / sqrt(d) by default.

    Raises:
        UserError: if shapes, devices or types do not fit together, gradients are wanted, or the GPU does not have it.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise UserError("8-bit attention has no gradients: call the model under torch.no_grad(), or train with another")
    return torch.ops.bittern.attention_8bit.default(q, k, v, scale)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The numbers of `attention_8bit`, in plain torch."""
    batch, tokens, heads, size = q.shape
    (q_codes, q_scale), (k_codes, k_scale), (v_codes, v_scale) = codes_of(q, k, v)
    factor = q_scale * k_scale * (size**-0.5 if scale is None else scale)
    out = q.new_empty(batch * heads, tokens, size, dtype=torch.float32)
    by_head = [x.float().transpose(1, 2).flatten(0, 1) for x in (q_codes, k_codes, v_codes)]
    step = max(1, _SCORES_AT_ONCE // max(1, tokens * k.shape[1]))
    for first in range(0, batch * heads, step):
        qs, ks, vs = (x[first : first + step] for x in by_head)
        z = (qs @ ks.transpose(1, 2)) * factor
        p = (z - z.amax(-1, keepdim=True)).exp()
        sums = _e4m3(p * SOFTMAX_SCALE).float() @ vs
        out[first : first + step] = sums * (v_scale / SOFTMAX_SCALE) / p.sum(-1, keepdim=True)
    r = 0.5 / v_scale
    result = _e4m3(out * r).float() / r
    return result.view(batch, heads, tokens, size).transpose(1, 2).to(q.dtype).contiguous()


def codes_of(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """e4m3 codes of mixed queries, mixed keys less their mean, and values, each with what multiplies its products."""
    n = q.shape[-1] & -q.shape[-1]
    signs = _hadamard(n).to(q.device)
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    apart = (wide_k - wide_k.mean(1, keepdim=True)).to(k.dtype).float()
    numbers = [*((x.reshape(-1, n) @ signs).view(x.shape) for x in (wide_q, apart)), wide_v]
    norms = [x.square().sum(-1).amax().sqrt() * n**0.5 for x in (wide_q, wide_k)]
    scales = [_power(bound) for bound in (norms[0], norms[1] * 2, wide_v.abs().amax())]
    codes = [_e4m3(x * s.reciprocal()) for x, s in zip(numbers, scales, strict=True)]
    return list(zip(codes, (scales[0] / n, *scales[1:]), strict=True))


def _power(bound: Tensor) -> Tensor:
    """The least power of two under which a bound is at most 448."""
    least = (bound * RECIPROCALS["fp8"]).clamp_min(LEAST_SCALE)
    power = ((least.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)
    # An input that is not finite leaves nothing finite.
    return torch.where(least.isnan(), least, power)


def _hadamard(n: int) -> Tensor:
    """Sylvester's matrix of +1 and -1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(*RANGES["fp8"]).to(torch.float8_e4m3fn)


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why cuDNN cannot take tensors that fit together; None if it may. Some it refuses only when it is asked."""
    if not q.is_cuda:
        return f"runs on cuda, not on {q.device.type}"
    capability = dispatch.device_capability(q.device)
    if capability is None or capability < _FIRST_CAPABILITY:
        has = "another maker's GPU" if capability is None else ".".join(map(str, capability))
        return f"needs compute capability 9.0 or more (Hopper), not {has}"
    if not _HAS_CUDNN:
        return f"needs the package nvidia-cudnn-frontend, which is not installed: {INSTALL}"
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    if q.dtype not in _DTYPES:
        return f"takes {', '.join(map(str, _DTYPES))}, not {q.dtype}"
    size = q.shape[-1]
    if size % _HEAD_MULTIPLE or size > _LARGEST_HEAD:
        return f"takes heads of multiples of {_HEAD_MULTIPLE} up to {_LARGEST_HEAD}, not of {size}"
    return None


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise UserError(
            f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)}: expected [images, tokens, "
            "heads, size], alike but for the number of tokens, which keys and values share"
        )
    if len({t.device for t in (q, k, v)}) > 1 or len({t.dtype for t in (q, k, v)}) > 1:
        found = ", ".join(f"{t.dtype} on {t.device}" for t in (q, k, v))
        raise UserError(f"queries, keys and values are {found}: expected one dtype on one device")
    if not q.is_floating_point():
        raise UserError(f"queries, keys and values have dtype {q.dtype}: expected a float type")
    if not k.shape[1]:
        raise UserError("keys and values of no tokens: expected at least one to attend to")


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    _check(q, k, v)
    if not q.numel():
        return q.new_empty(q.shape)
    why = refusal(q, k, v)
    forced = dispatch.forced_backend()
    if why is None and forced in (None, "triton"):
        run: Any = importlib.import_module("bittern.ops.cudnn").attention_8bit
        return run(q, k, v, scale)
    dispatch.want_reference("8-bit attention", ("triton", why or ""))
    if q.is_cuda and forced is None:
        # Nobody wants the reference's time and memory unasked.
        raise UserError(f"8-bit attention {why}")
    return reference_attention(q, k, v, scale)


def _shapes(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    _check(q, k, v)
    return q.new_empty(q.shape)


for _device in ("CPU", "CUDA"):
    library.impl("attention_8bit", without_autocast(_run), _device)
torch.library.register_fake("bittern::attention_8bit", _shapes, lib=library)
