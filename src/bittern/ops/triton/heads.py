"""Queries and keys, normalized and rotated, in one read and one write.

The maths and the floor are in `bittern.ops.heads`. A program owns BLOCK_L tokens of one image: it loads their cosines
and sines once and walks over the heads of their queries and then of their keys, BLOCK_H at a time. Both numbers of a
pair are in one thread, so that a rotation moves nothing. Inputs have any strides but the last, which is 1; the results
are contiguous [b, l, h, d], and a stream is written from its first token in them on.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bittern.ops.triton.launch import Recorder, Remembered, cdiv, contiguous_rows
from bittern.ops.triton.numerics import rounded

BLOCK_L, BLOCK_H, WARPS = 2, 8, 4
_launches = Remembered()


def rotary_heads(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Queries and keys for attention. Arguments as in `bittern.ops.rotary_heads`."""
    batch, _, heads, size = q[0].shape
    out_q = q[0].new_empty(batch, sum(x.shape[1] for x in q), heads, size)
    out_k = torch.empty_like(out_q)
    tensors = [*q, *k, *q_weights, *k_weights, cos, sin, out_q, out_k]
    signature = (eps, len(q), *[(t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors])
    if _launches.repeat(signature, tensors, out_q):
        return out_q, out_k
    recorder = Recorder(tensors)
    first = 0
    cos, sin = contiguous_rows(cos), contiguous_rows(sin)
    for i, (x, y) in enumerate(zip(q, k, strict=True)):
        x, y = contiguous_rows(x), contiguous_rows(y)
        tokens = x.shape[1]
        recorder.launch(
            heads_kernel,
            (cdiv(tokens, BLOCK_L), batch),
            (x, y, contiguous_rows(q_weights[i]), contiguous_rows(k_weights[i]), cos, sin, out_q, out_k),
            (tokens, first, out_q.shape[1], heads, *x.stride()[:3], *y.stride()[:3], cos.stride(0), sin.stride(0)),
            EPS=eps,
            SIZE=size,
            BLOCK_L=BLOCK_L,
            BLOCK_H=BLOCK_H,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        first += tokens
    _launches.keep(signature, recorder)
    return out_q, out_k


@triton.jit
def _turned(
    x, weight, cos, sin, out, tokens, first, out_tokens, heads, stride_b, stride_l, stride_h, stride_cos, stride_sin,
    EPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One of queries and keys."""
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = token < tokens
    # Beyond the last token it is repeated, and not stored.
    token = tl.minimum(token, tokens - 1).to(tl.int64)
    place = tl.arange(0, SIZE)
    cosine = tl.load(cos + (first + token)[:, None] * stride_cos + place[None, :]).to(tl.float32)
    sine = tl.load(sin + (first + token)[:, None] * stride_sin + place[None, :]).to(tl.float32)
    cos_even, cos_odd = cosine.reshape(BLOCK_L, 1, SIZE // 2, 2).split()
    sin_even, sin_odd = sine.reshape(BLOCK_L, 1, SIZE // 2, 2).split()
    scale = tl.load(weight + place).to(tl.float32)[None, None, :]
    from_rows = x + image * stride_b + token[:, None, None] * stride_l + place[None, None, :]
    to_rows = out + ((image * out_tokens + first + token) * heads * SIZE)[:, None, None] + place[None, None, :]
    for start in range(0, heads, BLOCK_H):
        head = (start + tl.arange(0, BLOCK_H))[None, :, None]
        values = tl.load(from_rows + tl.minimum(head, heads - 1) * stride_h)
        wide = values.to(tl.float32)
        power = tl.sum(wide * wide, axis=2) * (1.0 / SIZE)
        normed = wide * tl.rsqrt(power + EPS)[:, :, None] * scale
        normed = rounded(normed, values.dtype).to(tl.float32)
        even, odd = normed.reshape(BLOCK_L, BLOCK_H, SIZE // 2, 2).split()
        turned = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
        result = rounded(turned.reshape(BLOCK_L, BLOCK_H, SIZE), values.dtype)
        tl.store(to_rows + head * SIZE, result, mask=inside[:, None, None] & (head < heads))


@triton.jit
def heads_kernel(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    out_q,
    out_k,
    tokens,
    first,
    out_tokens,
    heads,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_cos,
    stride_sin,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """See the module; one program for each BLOCK_L tokens of each image."""
    _turned(
        q, q_weight, cos, sin, out_q, tokens, first, out_tokens, heads, stride_qb, stride_ql, stride_qh, stride_cos,
        stride_sin, EPS, SIZE, BLOCK_L, BLOCK_H,
    )  # fmt: skip
    _turned(
        k, k_weight, cos, sin, out_k, tokens, first, out_tokens, heads, stride_kb, stride_kl, stride_kh, stride_cos,
        stride_sin, EPS, SIZE, BLOCK_L, BLOCK_H,
    )  # fmt: skip
