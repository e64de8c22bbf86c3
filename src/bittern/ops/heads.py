"""What happens to queries and keys between their projection and attention: normalization, rotation, one sequence.

    per head vector x:   n = x / sqrt(mean(x^2) + eps) · w,  rounded to x's dtype      (Zhang and Sennrich 2019)
                         y = n · cos + (-n_1, n_0, -n_3, n_2, ...) · sin               (Su et al. 2021)

with w a weight for each stream of tokens (text and image, say), whose results lie one after the other, as joint
attention wants them. In plain torch these are a dozen passes over queries and keys: a quarter of an eager step of
FLUX.1-dev on an H100. A kernel reads and writes them once.

Floor: 4 bytes an element in 16 bits; FLUX's 4608 tokens of 24 x 128, queries and keys, 113 MB or 38 us at 3 TB/s.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bittern.errors import UserError
from bittern.ops import dispatch
from bittern.ops.contract import library

library.define(
    "rotary_heads(Tensor[] q, Tensor[] k, Tensor[] q_weights, Tensor[] k_weights, float eps, Tensor cos, Tensor sin) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LARGEST_HEAD = 256
_DTYPES = (torch.bfloat16, torch.float16)


def rotary_heads(
    q: Sequence[Float[Tensor, "b _ h d"]],
    k: Sequence[Float[Tensor, "b _ h d"]],
    q_weights: Sequence[Float[Tensor, " d"]],
    k_weights: Sequence[Float[Tensor, " d"]],
    eps: float,
    cos: Float[Tensor, "l d"],
    sin: Float[Tensor, "l d"],
) -> tuple[Float[Tensor, "b l h d"], Float[Tensor, "b l h d"]]:
    """Queries and keys by head, normalized, rotated, and the streams' tokens one after the other.

    Args:
        q: Queries of each stream of tokens, of any strides.
        k: Keys, likewise.
        q_weights: The normalization's weight for each stream's queries.
        k_weights: Those for the keys. Where their dtypes differ from the queries', plain torch says how it rounds.
        eps: Added to mean squares.
        cos: Cosines for all tokens in their order, each pair of inputs an angle; float32.
        sin: Sines.

    Raises:
        UserError: if shapes, devices or types do not fit together, or no backend computes it here.
    """
    given = (*q, *k, *q_weights, *k_weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return reference_heads(q, k, q_weights, k_weights, eps, cos, sin)
    return torch.ops.bittern.rotary_heads.default(q, k, q_weights, k_weights, eps, cos, sin)


def reference_heads(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """The numbers of `rotary_heads`, in plain torch."""

    def rotated(streams: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        normed = [
            functional.rms_norm(x, (x.shape[-1],), weight, eps) for x, weight in zip(streams, weights, strict=True)
        ]
        dtype = streams[0].dtype
        n = torch.cat(normed, dim=1).to(torch.promote_types(dtype, torch.float32))
        turned = torch.stack([-n[..., 1::2], n[..., ::2]], dim=-1).flatten(-2)
        # Whatever the strides of the streams, which their concatenation may keep.
        return (n * cos[:, None] + turned * sin[:, None]).to(dtype).contiguous()

    return rotated(q, q_weights), rotated(k, k_weights)


def _check(
    q: Sequence[Tensor], k: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor], cos: Tensor,
    sin: Tensor,
) -> None:  # fmt: skip
    if not len(q) == len(k) == len(q_weights) == len(k_weights) > 0:
        raise UserError(
            f"{len(q)} queries, {len(k)} keys, {len(q_weights)} and {len(k_weights)} weights: expected one of each for "
            "every stream of tokens"
        )
    batch, _, heads, size = q[0].shape
    for x, y in zip(q, k, strict=True):
        if x.shape != y.shape or (x.shape[0], *x.shape[2:]) != (batch, heads, size) or x.dtype != y.dtype:
            raise UserError(
                f"queries {list(x.shape)} and keys {list(y.shape)}: expected equal ones in every stream, of {batch} "
                f"images with {heads} heads of {size}"
            )
    tokens = sum(x.shape[1] for x in q)
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != (tokens, size):
            raise UserError(f"{name} has shape {list(table.shape)}: expected {[tokens, size]} for {tokens} tokens")
    others = [*q, *k, *q_weights, *k_weights, cos, sin]
    if any(t.device != q[0].device for t in others):
        devices = sorted({str(t.device) for t in others})
        raise UserError(f"queries, keys, weights and tables are on {', '.join(devices)}: expected one device")
    if not all(t.is_floating_point() for t in others):
        found = sorted({str(t.dtype) for t in others if not t.is_floating_point()})
        raise UserError(f"queries, keys, weights or tables have dtype {', '.join(found)}: expected float types")
    if size % 2 or any(w.shape != (size,) for w in (*q_weights, *k_weights)):
        raise UserError(f"heads of {size}: expected an even size and weights of that length")


def _run(
    q: Sequence[Tensor], k: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor], eps: float,
    cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, q_weights, k_weights, cos, sin)
    why = refusal(q, k, q_weights, k_weights, cos, sin)
    if why is None and dispatch.forced_backend() in (None, "triton"):
        run: Any = importlib.import_module("bittern.ops.triton.heads").rotary_heads
        return run(q, k, q_weights, k_weights, eps, cos, sin)
    dispatch.want_reference("rotary_heads", ("triton", why or ""))
    return reference_heads(q, k, q_weights, k_weights, eps, cos, sin)


def refusal(
    q: Sequence[Tensor], k: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor], cos: Tensor,
    sin: Tensor,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take tensors that fit together; None if it can. It takes any strides."""
    dtype, size = q[0].dtype, q[0].shape[-1]
    if not q[0].is_cuda:
        return f"runs on cuda, not on {q[0].device.type}"
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    if dtype not in _DTYPES:
        return f"takes {', '.join(map(str, _DTYPES))}, not {dtype}"
    if size > _LARGEST_HEAD or size & (size - 1):
        return f"takes heads of powers of two up to {_LARGEST_HEAD}, not of {size}"
    if not all(t.numel() for t in (*q, *k)):
        return "takes tokens, not none"
    # The reference rounds as the types of its operands say; the kernel knows one way.
    if any(t.dtype != dtype for t in (*q, *k, *q_weights, *k_weights)):
        return f"takes queries, keys and weights of one dtype, not others beside {dtype}"
    if not cos.dtype == sin.dtype == torch.float32:
        return f"takes cos and sin in torch.float32, not {cos.dtype} and {sin.dtype}"
    return None


def _shapes(
    q: Sequence[Tensor], k: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor], eps: float,
    cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, q_weights, k_weights, cos, sin)
    batch, _, heads, size = q[0].shape
    whole = q[0].new_empty(batch, sum(x.shape[1] for x in q), heads, size)
    return whole, torch.empty_like(whole)


for _device in ("CPU", "CUDA"):
    library.impl("rotary_heads", _run, _device)
torch.library.register_fake("bittern::rotary_heads", _shapes, lib=library)
