"""Few-bit layers on a CPU: the same numbers as the reference's, in fewer passes over memory.

What bounds a layer of N x K weights and M tokens, for one core with 512-bit vectors: the codes are N · K / 2 bytes at
most, hardly worth counting; each pass that makes float32 numbers of them costs 0.07 ns a weight where these stay in the
core's cache, and twice that where they do not; the product costs M times 0.01 ns in float32, 0.0017 in bf16 and 0.001
in int8 where there are matrix instructions. So few tokens are bound by passes and many by the product:

- Codes are not put in order. Those in the same place of their bytes make a plane [rows, bytes], which one or two
  integer operations take out of the bytes, and inputs are put in the order of the planes instead.
- Codes become numbers in pieces that fit a cache, and numbers meet inputs in blocks of several pieces. The largest
  temporaries are a block of weights and the activations: nothing grows with the layer.
- a8-int8: integers are multiplied as integers (`torch._int_mm`), where the CPU has instructions for that; sums of
  integers are the same in any order. Elsewhere they are multiplied as the reference multiplies them.
- a16: low · up^T and the bias are further columns of the product. Where the CPU has matrix instructions for bf16 and
  the input is bf16, the operands are rounded to it, as on a GPU; otherwise they are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bittern import formats
from bittern.formats import Segment
from bittern.ops import reference
from bittern.ops.dispatch import Kernel

PIECE = 2**18
"""Weights or inputs, for each thread, that become numbers at a time: 1 MiB of float32."""

BLOCK = 2**21
"""Weights of a product, for each thread: enough rows for matrix instructions, few enough for the caches."""

TILE = 2**19
"""Outputs that are made at a time, for each thread."""

FEW_TOKENS = 16
"""Up to here products are so short that their weights had better be in the cache still: blocks are pieces."""

SMALL = 2**19
"""Layers of fewer weights are the reference's: torch's calls are what they wait for, and it makes fewer of them."""

# Sums of so many products of 127 · 128 fit int32, and float32.
_MOST_INPUTS = 2**17
_EXACT_INPUTS = 2**10
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Matrix instructions take columns in such numbers.
_ALIGNED = 32
# What planes hold for each code; see `_planes`.
_UNIT = {"int4": 16, "ternary": 1}


@functools.cache
def multiplies_integers() -> bool:
    """Whether `torch._int_mm` is fast and exact.

    Without instructions for products of int8 it is neither: sums of two products saturate at 16 bits. They can be there
    and be switched off, and so the largest products are tried.
    """
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():  # pyright: ignore[reportPrivateUsage]
        return False
    size = 64
    x = _empty(size, size, dtype=torch.int8).fill_(127)
    sums = _empty(size, size, dtype=torch.int32)
    return all(bool((_sums(x[:m], -x, sums[:m]) == -size * 127 * 127).all()) for m in (1, size))


@functools.cache
def multiplies_bf16() -> bool:
    """Whether products in bf16 are several times as fast as in float32."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


class _Layer(NamedTuple):
    """The tensors of one call; inputs are matrices, scales float32."""

    inputs: list[Tensor]
    segments: list[Segment]
    codes: Tensor
    scales: Tensor
    smooth: Tensor | None
    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    weight: str
    gelu_from: int | None
    y: Tensor

    @property
    def padded_k(self) -> int:
        return self.segments[-1].padded.stop

    @property
    def planes(self) -> int:
        return formats.get(self.weight).codes_per_byte


class _Piece(NamedTuple):
    """Memory for so many rows of codes, which every piece takes again: the codes of one place, and all as numbers."""

    rows: int
    plane: Tensor
    numbers: Tensor


def few_bit_linear(
    inputs: Sequence[Tensor],
    codes: Tensor,
    scales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    weight: str,
    group_size: int | None,
    path: str,
    shift: Sequence[float],
    gelu_from: int | None = None,
) -> Tensor:
    """The layer on path a8-int8 or a16. Arguments as in `bittern.ops.few_bit_linear`."""
    layout = reference.layout_of(tuple(x.shape[-1] for x in inputs), group_size)
    if layout.padded_k > _MOST_INPUTS or layout.padded_k * len(codes) < SMALL:
        return reference.few_bit_linear(
            inputs, codes, scales, smooth, down, up, bias, weight, group_size, path, shift, gelu_from
        )
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    y = flat[0].new_empty(flat[0].shape[0], codes.shape[0])
    layer = _Layer(flat, list(layout), codes, scales.float(), smooth, down, up, bias, weight, gelu_from, y)
    if y.numel():
        (_integers if path == "a8-int8" else _floats)(layer)
    return y.view(*inputs[0].shape[:-1], codes.shape[0])


def _floats(layer: _Layer) -> None:
    """The layer as one product: y = [x / s, low, 1] · [What, U, b]^T."""
    m, k = len(layer.y), layer.padded_k
    many = m > FEW_TOKENS and layer.y.dtype == torch.bfloat16 and multiplies_bf16()
    dtype = torch.bfloat16 if many else torch.float32
    rank = 0 if layer.up is None else layer.up.shape[1]
    width = k + rank + (layer.bias is not None)
    width += -width % _ALIGNED if many else 0
    x, low = _empty(m, width, dtype=dtype), _zeros(m, rank)
    for segment, tokens, numbers in _smoothed(layer, low):
        _arrange(numbers, layer.planes, x[tokens, segment.padded])
    x[:, k : k + rank] = low
    x[:, k + rank :] = 1
    n = len(layer.codes)
    block = _rows(BLOCK if m > FEW_TOKENS else PIECE, width, n)
    tile, piece = _rows(TILE, block, m), _piece(layer)
    direct = layer.y.dtype == dtype == torch.float32 and layer.gelu_from is None
    # Columns that align stay zero.
    weights, outputs = _zeros(block, width, dtype=dtype), _empty(tile * block, dtype=dtype)
    groups = layer.scales / _UNIT[layer.weight]
    for rows in _slices(n, block):
        w = weights[: rows.stop - rows.start]
        for segment in layer.segments:
            _unpack(layer, groups[rows, segment.groups], rows, segment, piece, w[:, segment.padded])
        if layer.up is not None:
            w[:, k : k + rank] = layer.up[rows]
        if layer.bias is not None:
            w[:, k + rank] = layer.bias[rows]
        for tokens in _slices(m, tile):
            target = layer.y[tokens, rows] if direct else _shaped(outputs, tokens.stop - tokens.start, len(w))
            torch.mm(x[tokens], w.T, out=target)
            if not direct:
                _finish(layer, target, tokens, rows)


def _integers(layer: _Layer) -> None:
    """Products of integers: y = sum over segments of ((codes · codes) · activation scale) · c + low · U^T + b."""
    m, k, planes = len(layer.y), layer.padded_k, layer.planes
    dtype = torch.int8 if multiplies_integers() else torch.float32
    x, scale = _empty(m, k, dtype=dtype), _empty(m, len(layer.segments))
    low, up = _zeros(m, 0), None
    if layer.up is not None:
        up = layer.up.float().T
        low = _zeros(m, len(up))
    for segment, tokens, numbers in _smoothed(layer, low):
        scale[tokens, layer.segments.index(segment)] = reference.quantize_in_place(numbers)
        _arrange(numbers, planes, x[tokens, segment.padded])
    largest, unit = formats.get(layer.weight).largest, _UNIT[layer.weight]
    # Planes hold codes times the unit: one of the two factors that each code meets takes it off.
    folded = [
        (c / unit, None) if ratios is None else (c, ratios.div_(unit))
        for c, ratios in (reference.fold_scales(layer.scales[:, s.groups], "int8", largest) for s in layer.segments)
    ]
    n = len(layer.codes)
    block = _rows(BLOCK, k, n)
    tile, piece = _rows(TILE, block, m), _piece(layer)
    weights, sums = _empty(block, k, dtype=dtype), _empty(tile * block, dtype=torch.int32)
    outputs = _empty(tile * block)
    parts = outputs if len(folded) == 1 else torch.empty_like(outputs)
    for rows in _slices(n, block):
        w = weights[: rows.stop - rows.start]
        for segment, (_, ratios) in zip(layer.segments, folded, strict=True):
            groups = None if ratios is None else ratios[rows]
            _unpack(layer, groups, rows, segment, piece, w[:, segment.padded], rounded=True)
        for tokens in _slices(m, tile):
            shape = (tokens.stop - tokens.start, len(w))
            total = _shaped(outputs, *shape)
            for place, (segment, (c, _)) in enumerate(zip(layer.segments, folded, strict=True)):
                exact = _sums(x[tokens, segment.padded], w[:, segment.padded].T, _shaped(sums, *shape))
                part = _shaped(parts if place else outputs, *shape).copy_(exact)
                part.mul_(scale[tokens, place : place + 1]).mul_(c[rows].T)
                if place:
                    total.add_(part)
            if up is not None:
                total.addmm_(low[tokens], up[:, rows])
            if layer.bias is not None:
                total.add_(layer.bias[rows])
            _finish(layer, total, tokens, rows)


def _sums(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """The product of two matrices of integers, int8 or float32, in int32."""
    if x.dtype == torch.int8:
        # Torch has no public product of integers.
        return torch._int_mm(x, w, out=out)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    out.zero_()
    for columns in _slices(len(w), _EXACT_INPUTS):
        out += (x[:, columns] @ w[columns]).to(torch.int32)
    return out


def _unpack(
    layer: _Layer,
    groups: Tensor | None,
    rows: slice,
    segment: Segment,
    memory: _Piece,
    target: Tensor,
    *,
    rounded: bool = False,
) -> None:
    """Writes a segment's codes times what their groups have.

    Args:
        layer: Of which these are rows.
        groups: For each of the rows and groups a factor; None for codes as the planes have them.
        rows: Which rows.
        segment: Which columns.
        memory: For the pieces.
        target: [rows, columns] in the order of the planes.
        rounded: Whether what is written is rounded to integers.
    """
    planes = layer.planes
    packed = layer.codes[rows, segment.padded.start // planes : segment.padded.stop // planes]
    whole = _by_plane(target, planes)
    in_place = groups is None or target.dtype == torch.float32
    for part in _slices(len(packed), memory.rows):
        piece = whole[part] if in_place else _shaped(memory.numbers, *whole[part].shape)
        _widen(packed[part], layer.weight, memory.plane, piece)
        if groups is None:
            continue
        piece.view(len(piece), planes, groups.shape[1], -1).mul_(groups[part, None, :, None])
        if rounded:
            piece.round_()
        if not in_place:
            whole[part] = piece


def _widen(packed: Tensor, weight: str, scratch: Tensor, target: Tensor) -> None:
    """Writes the codes as numbers in planes; those of int4 sixteen times as large, which saves two shifts.

    Args:
        packed: [rows, bytes]
        weight: Weight format.
        scratch: Memory for a plane.
        target: [rows, planes, bytes]
    """
    plane = _shaped(scratch, *packed.shape)
    if weight == "int4":
        target[:, 0] = torch.mul(packed, 16, out=plane).view(torch.int8)
        target[:, 1] = torch.bitwise_and(packed, 0xF0, out=plane).view(torch.int8)
        return
    for place in range(4):
        fields = torch.bitwise_right_shift(packed, 2 * place, out=plane) if place else packed
        target[:, place] = torch.bitwise_and(fields, 3, out=plane).view(torch.int8).sub_(1)


def _smoothed(layer: _Layer, low: Tensor) -> Iterator[tuple[Segment, slice, Tensor]]:
    """Pieces of x / s in float32, zeros where the codes are padding. Each takes the place of the one before.

    Args:
        layer: Whose inputs they are.
        low: [m, r], to which x · D^T is added.
    """
    widest = max(segment.padded.stop - segment.padded.start for segment in layer.segments)
    scratch = _empty(_rows(PIECE, widest, len(layer.y)) * widest)
    for raw, segment in zip(layer.inputs, layer.segments, strict=True):
        length, padded = raw.shape[1], segment.padded.stop - segment.padded.start
        inverse = None if layer.smooth is None else layer.smooth[segment.logical].float().reciprocal()
        down = None if layer.down is None else layer.down[:, segment.logical].float().T
        for tokens in _slices(len(raw), scratch.numel() // padded):
            numbers = _shaped(scratch, tokens.stop - tokens.start, padded)
            numbers[:, length:] = 0
            numbers[:, :length] = raw[tokens]
            if down is not None:
                low[tokens].addmm_(numbers[:, :length], down)
            if inverse is not None:
                numbers[:, :length].mul_(inverse)
            yield segment, tokens, numbers


def _arrange(numbers: Tensor, planes: int, target: Tensor) -> None:
    """Writes inputs in the order of the planes."""
    narrow = numbers.to(target.dtype)
    wide = narrow.element_size() * planes
    if wide > 4:
        _by_plane(target, planes).copy_(narrow.view(len(narrow), -1, planes).transpose(1, 2))
        return
    # Neighbours are the parts of one integer: to shift these is faster than to pick parts.
    bits = 8 * narrow.element_size()
    places = _by_plane(target.view(_INTEGERS[narrow.element_size()]), planes)
    neighbours = narrow.view(_INTEGERS[wide])
    for place in range(planes):
        places[:, place] = neighbours >> (bits * place) if place else neighbours


def _by_plane(matrix: Tensor, planes: int) -> Tensor:
    """Columns in the order of the planes, as [rows, planes, bytes]."""
    return matrix.view(len(matrix), planes, -1)


def _finish(layer: _Layer, total: Tensor, tokens: slice, rows: slice) -> None:
    """Writes outputs, those from `gelu_from` on after a GELU."""
    first = layer.gelu_from
    if first is not None and first < rows.stop:
        total = reference.activated(total.float(), max(0, first - rows.start))
    layer.y[tokens, rows] = total


def _piece(layer: _Layer) -> _Piece:
    rows = _rows(PIECE, layer.padded_k, len(layer.codes))
    plane = _empty(rows * layer.codes.shape[1], dtype=torch.uint8)
    return _Piece(rows, plane, _empty(rows * layer.padded_k))


def _rows(budget: int, width: int, most: int) -> int:
    """How many rows of this width fit a budget of numbers for each thread; one at least, and no more than there are."""
    rows = max(1, budget * torch.get_num_threads() // width)
    # Matrix products prefer whole tiles.
    return min(rows - rows % 64 if rows > 64 else rows, most)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of its own type and on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return _empty(*shape, dtype=dtype).zero_()


def _shaped(scratch: Tensor, *shape: int) -> Tensor:
    return scratch[: prod(shape)].view(shape)


def _slices(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def kernels() -> tuple[Kernel, ...]:
    """The kernels of this backend, the least preferred first."""
    common: dict[str, Any] = {"backend": "cpu", "run": few_bit_linear, "devices": ("cpu",)}
    # Not native, whatever the CPU has: paths decide the numbers, and are to be the same on all CPUs.
    return tuple(Kernel(path, native=False, weights=tuple(_UNIT), **common) for path in ("a8-int8", "a16"))
