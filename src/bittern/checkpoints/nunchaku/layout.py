"""Where Nunchaku's packed tensors hold each number: index maps, there and back.

Nunchaku deals tensors out in the order in which its GPU kernels fetch them: tiles of 128 rows, and within a tile the
fragments of one matrix instruction. The stored two-dimensional shapes are nominal; what counts is the flat order. Every
map here is a permutation of axes: the flat tensor has some axes in the stored order, and rows and columns are each a
product of some of them. N and K are multiples of 128 (`PADDING`) and ranks of 16 (`RANK_MULTIPLE`).

A weight's eight neighbours along K share a 32-bit word, the first in the lowest bits, which is bittern's own order of
nibbles: weights move as whole words.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float, Int32, Shaped, UInt8
from torch import Tensor

PADDING = 128
"""Rows and columns of packed tensors are filled up to a multiple of this."""

RANK_MULTIPLE = 16
"""Ranks are multiples of this."""

GROUP = 64
"""Weights under one int4 scale."""

FP4_GROUP = 16
"""Weights under one nvfp4 scale."""


def padded(length: int) -> int:
    """A length with its padding."""
    return -(-length // PADDING) * PADDING


def fill(tensor: Shaped[Tensor, "*_"], shape: Sequence[int], value: float = 0) -> Shaped[Tensor, "*_"]:
    """A tensor with `value` behind each axis, up to a shape; itself where nothing is missing."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    out = tensor.new_full(tuple(shape), value) if value else tensor.new_zeros(tuple(shape))
    out[tuple(slice(length) for length in tensor.shape)] = tensor
    return out


def _deal(flat: Tensor, stored: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> Tensor:
    """A flat tensor in logical order: its axes `stored`, taken in `order`, joined to `shape`."""
    return flat.reshape(tuple(stored)).permute(tuple(order)).reshape(tuple(shape))


def _gather(logical: Tensor, stored: Sequence[int], order: Sequence[int]) -> Tensor:
    """The inverse of `_deal`."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return logical.reshape([stored[axis] for axis in order]).permute(inverse).reshape(-1)


# ---- weights of 4 bits for 4-bit activations

# Stored axes: row tile, column tile, row / 16, row % 8, word % 4, row / 8 % 2, word / 4 % 2.
_WEIGHT_ORDER = (0, 2, 5, 3, 1, 6, 4)


def unpack_weight(stored: Shaped[Tensor, "n half"]) -> UInt8[Tensor, "n half"]:
    """`qweight` as rows of nibbles, even k low; int8 [N, K/2] in any order of axes."""
    n, half = stored.shape
    words = stored.contiguous().view(-1).view(torch.int32)
    rows = _deal(words, _weight_axes(n, half), _WEIGHT_ORDER, (n, half // 4))
    return rows.contiguous().view(torch.uint8)


def pack_weight(codes: UInt8[Tensor, "n half"]) -> Shaped[Tensor, "n half"]:
    """The inverse of `unpack_weight`."""
    n, half = codes.shape
    words = codes.contiguous().view(torch.int32)
    return _gather(words, _weight_axes(n, half), _WEIGHT_ORDER).view(torch.int8).reshape(n, half)


def _weight_axes(n: int, half: int) -> tuple[int, ...]:
    return (n // 128, half // 32, 8, 8, 4, 2, 2)


# ---- scales and vectors

# Stored axes: row tile, group, row / 16, row / 2 % 4, row / 8 % 2, row % 2.
_SCALE_ORDER = (0, 2, 4, 3, 5, 1)


def unpack_scales(stored: Float[Tensor, "groups n"]) -> Float[Tensor, "n groups"]:
    """int4 `wscales`: one row a row of weights."""
    groups, n = stored.shape
    return _deal(stored, (n // 128, groups, 8, 4, 2, 2), _SCALE_ORDER, (n, groups))


def pack_scales(scales: Float[Tensor, "n groups"]) -> Float[Tensor, "groups n"]:
    """The inverse of `unpack_scales`."""
    n, groups = scales.shape
    return _gather(scales, (n // 128, groups, 8, 4, 2, 2), _SCALE_ORDER).reshape(groups, n)


def unpack_vector(stored: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """A bias, smoothing factors, or scales of whole rows."""
    return unpack_scales(stored[None]).reshape(-1)


def pack_vector(vector: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The inverse of `unpack_vector`."""
    return pack_scales(vector[:, None]).reshape(-1)


# Stored axes: row tile, group / 4, row % 8, row / 8 % 4, row / 32 % 4, group % 4.
_FP4_SCALE_ORDER = (0, 4, 3, 2, 1, 5)


def unpack_fp4_scales(stored: Shaped[Tensor, "groups n"]) -> Shaped[Tensor, "n groups"]:
    """nvfp4 `wscales`, of any type of one byte."""
    groups, n = stored.shape
    return _deal(stored, (n // 128, groups // 4, 8, 4, 4, 4), _FP4_SCALE_ORDER, (n, groups))


def pack_fp4_scales(scales: Shaped[Tensor, "n groups"]) -> Shaped[Tensor, "groups n"]:
    """The inverse of `unpack_fp4_scales`."""
    n, groups = scales.shape
    return _gather(scales, (n // 128, groups // 4, 8, 4, 4, 4), _FP4_SCALE_ORDER).reshape(groups, n)


# ---- the low-rank branch

# Stored axes: column / 16, rank / 16, rank % 8, column / 2 % 4, rank / 8 % 2, column / 8 % 2, column % 2.
_DOWN_ORDER = (1, 4, 2, 0, 5, 3, 6)
# Stored axes: row / 16, rank / 16, row % 8, rank / 2 % 4, row / 8 % 2, rank / 8 % 2, rank % 2.
_UP_ORDER = (0, 4, 2, 1, 5, 3, 6)


def unpack_down(stored: Float[Tensor, "k r"]) -> Float[Tensor, "r k"]:
    """`lora_down` or `proj_down`: the branch's first factor."""
    k, rank = stored.shape
    return _deal(stored, _branch_axes(k, rank), _DOWN_ORDER, (rank, k))


def pack_down(down: Float[Tensor, "r k"]) -> Float[Tensor, "k r"]:
    """The inverse of `unpack_down`."""
    rank, k = down.shape
    return _gather(down, _branch_axes(k, rank), _DOWN_ORDER).reshape(k, rank)


def unpack_up(stored: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """`lora_up` or `proj_up`: the branch's second factor."""
    return _deal(stored, _branch_axes(*stored.shape), _UP_ORDER, stored.shape)


def pack_up(up: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """The inverse of `unpack_up`."""
    return _gather(up, _branch_axes(*up.shape), _UP_ORDER).reshape(up.shape)


def _branch_axes(length: int, rank: int) -> tuple[int, ...]:
    return (length // 16, rank // 16, 8, 4, 2, 2, 2)


# ---- weights of 4 bits for 16-bit activations

# A word has 8 columns of 32: 8 apart in its four low nibbles, and each one's right neighbour in the high ones.
# Stored axes: row / 4, column tile, row % 4, column / 32 % 2, column / 2 % 4; byte of the word: column / 8 % 4.
_AWQ_ORDER = (0, 2, 1, 3, 5, 4)
# Codes 0..15 and two's complement -8..7 differ by the highest bit of a nibble.
_FLIP = 0x88 - 0x100
# Words that stay in a CPU's cache through all steps.
_BLOCK = 1 << 15


def unpack_awq(stored: Int32[Tensor, "quarter half"]) -> UInt8[Tensor, "n half"]:
    """`qweight` of a W4A16 layer, [N/4, K/2], as rows of nibbles of two's complement: code c is stored c + 8."""
    quarter, half = stored.shape
    flat = stored.reshape(-1)
    bytes_ = torch.empty(flat.numel(), 4, dtype=torch.int8)
    for start in range(0, flat.numel(), _BLOCK):
        words = flat[start : start + _BLOCK]
        pairs = _spread(words & 0xFFFF) | (_spread((words >> 16) & 0xFFFF) << 4)
        bytes_[start : start + _BLOCK] = pairs.view(torch.int8).view(-1, 4) ^ _FLIP
    axes = (quarter, half // 32, 4, 2, 4, 4)
    return _deal(bytes_, axes, _AWQ_ORDER, (4 * quarter, half)).contiguous().view(torch.uint8)


def pack_awq(codes: UInt8[Tensor, "n half"]) -> Int32[Tensor, "quarter half"]:
    """The inverse of `unpack_awq`."""
    n, half = codes.shape
    flat = _gather(codes.view(torch.int8) ^ _FLIP, (n // 4, half // 32, 4, 2, 4, 4), _AWQ_ORDER)
    pairs = flat.view(torch.int32)
    words = _squeeze(pairs & 0x0F0F0F0F) | (_squeeze((pairs >> 4) & 0x0F0F0F0F) << 16)
    return words.reshape(n // 4, half)


def _spread(nibbles: Int32[Tensor, " words"]) -> Int32[Tensor, " words"]:
    """Four nibbles as the low halves of four bytes."""
    pairs = (nibbles | (nibbles << 8)) & 0x00FF00FF
    return (pairs | (pairs << 4)) & 0x0F0F0F0F


def _squeeze(halves: Int32[Tensor, " words"]) -> Int32[Tensor, " words"]:
    """The inverse of `_spread`."""
    pairs = (halves | (halves >> 4)) & 0x00FF00FF
    return (pairs | (pairs >> 8)) & 0xFFFF


def interleave(rows: Shaped[Tensor, "n *_"], splits: int) -> Shaped[Tensor, "n *_"]:
    """Rows of `splits` chunks as Nunchaku orders those of an adaLN linear: one of each chunk in turn."""
    assert rows.shape[0] % splits == 0
    return rows.reshape(splits, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def deinterleave(rows: Shaped[Tensor, "n *_"], splits: int) -> Shaped[Tensor, "n *_"]:
    """The inverse of `interleave`."""
    return interleave(rows, prod(rows.shape[:1]) // splits)
