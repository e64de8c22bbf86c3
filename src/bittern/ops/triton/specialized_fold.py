"""Weights and branch to e4m3 (`fold_branch`) as fast as memory allows, by products whose sums stay where they are.

The maths is `fold_branch`'s. There, sums of U · D leave the matrix units in one arrangement of registers and codes
come from memory in another, and bringing them together takes longer than all the rest. Here it is arranged beforehand:

    D · s    is an operand of products of 16 rows by 8 inputs, whose sums give a thread two neighbours of every 8. The
             inputs of a slab are dealt to the operand's columns so that 16 neighbours of 64 are one thread's.
    U        has its ranks dealt likewise, so that a thread's are neighbours, too
    codes    so are 8 bytes of a row for each thread, and a sector of memory for four; codes become e4m3 numbers where
             the sums already are, and leave as 16 bytes

A program owns a slab of 64 inputs a warp: it keeps D · s in registers and walks rows, 16 at a time; what comes
next is on its way meanwhile. Programs walk side by side, so that all write near each other: with a part of the rows for
each, memory took 6 % longer.

Codes become floats by bits: 4 of them, as highest bits of a significand, are 1 + code / 16, and what that is too much
leaves them again without rounding.

The interpreter runs no Gluon: numbers are tested on a GPU alone. mma.sync and conversions to e4m3 are there from
compute capability 8.9 on.

Floor: as of `fold_branch`.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from bittern.ops.triton.config import padded_rank
from bittern.ops.triton.fold_branch import IN_DOWN, PER_FINDER, Weight, scale_within
from bittern.ops.triton.launch import Launch, cdiv, launch, multiprocessors
from bittern.ops.triton.numerics import largest_of, reciprocal_of_power

ROWS = 16
WARPS = 4
PROGRAMS = 4
"""For each multiprocessor: as many as its registers hold."""
_LOW, _HIGH = 0x78000, 0x780000
"""Bits of a code as the 5th to 8th, and as the highest of a significand. As arguments: an instruction that masks and
flips takes one constant from memory, but not two."""


def words_of(codes: Tensor, out: Tensor) -> Tensor | None:
    """Packed codes as words of 8; None where rows do not start at words, or places are no 32-bit numbers."""
    aligned = codes.stride(1) == 1 and codes.stride(0) % 4 == 0 and codes.storage_offset() % 4 == 0
    return codes.view(torch.int32) if aligned and len(out) * out.stride(0) < 2**31 else None


def specialized_fold(weight: Weight, words: Tensor, out: Tensor, launch: Launch = launch) -> None:
    """Fills `out` as `fold_branch` does; `words` are the weight's codes (`words_of`)."""
    n, rank = weight.up.shape
    k, width = weight.down.shape[1], out.shape[1]
    slabs = cdiv(width, 64 * WARPS)
    walkers = max(1, min(PROGRAMS * multiprocessors(out.device) // slabs, cdiv(n, ROWS)))
    launch(
        specialized_fold_kernel,
        (slabs, walkers),
        (words, weight.scales, weight.smooth, weight.down, weight.up, weight.bounds, weight.column_scales, out),
        (
            n,
            k,
            width,
            rank,
            words.stride(0),
            weight.scales.stride(0),
            weight.down.stride(0),
            weight.up.stride(0),
            out.stride(0),
            _LOW,
            _HIGH,
        ),
        GROUP=weight.group,
        SMOOTH=weight.smooth is not None,
        RANK=padded_rank(rank),
        WHOLE=k % (64 * WARPS) == 0 and width == k and rank == padded_rank(rank),
        IN_DOWN=IN_DOWN,
        ROWS=ROWS,
        WARPS=WARPS,
        num_warps=WARPS,
    )


@gluon.constexpr_function
def _powers(start, stop):
    return [start << i for i in range((max(1, stop // start) - 1).bit_length())]


@gluon.constexpr_function
def _weight_layout(ROWS, WARPS):
    """Of weights [rows, warps, words, codes of a word]: a thread has two words of each of its rows."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0]] + [[r, 0, 0, 0] for r in _powers(8, ROWS)]
    lanes = [[0, 0, 2, 0], [0, 0, 4, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[0, w, 0, 0] for w in _powers(1, WARPS)], [], [ROWS, WARPS, 8, 8]
    )


@gluon.constexpr_function
def _up_layout(ROWS, WARPS, RANK):
    """Of U [rows, ranks]: a fourth of the ranks, side by side, for each of four threads."""
    registers = [[0, r] for r in _powers(1, RANK // 4)] + [[r, 0] for r in _powers(8, ROWS)]
    lanes = [[0, RANK // 4], [0, RANK // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0] for _ in _powers(1, WARPS)], [], [ROWS, RANK])


@gluon.jit
def _codes(
    words, scales, first, stride_words, stride_scales, n, word, group, known, WHOLE: gl.constexpr,
    ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Words of codes and scales of the rows from `first` on; rows beyond the last repeat it."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    rows = gl.minimum(first + gl.arange(0, ROWS, layout), n - 1)
    places = words + (rows * stride_words)[:, None][:, :, None] + word
    scale_places = scales + (rows * stride_scales)[:, None] + group
    if WHOLE:
        return gl.load(places), gl.load(scale_places)
    else:
        return gl.load(places, mask=known[:, :, None], other=0), gl.load(scale_places, mask=known, other=0.0)


@gluon.jit
def _factors(
    up, bounds, maxima, first, stride_up, n, rank, every, WHOLE: gl.constexpr, ROWS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Rows of U, peaks, and the largest numbers of U among the rows beside them."""
    rows = gl.minimum(first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), n - 1)
    ranks = gl.arange(0, LAYOUT.shape[1], gl.SliceLayout(0, LAYOUT))
    places = up + (rows * stride_up)[:, None] + ranks[None, :]
    peak = gl.load(bounds + rows)
    together = gl.load(maxima + gl.minimum(first, n - 1) // PER_FINDER * LAYOUT.shape[1] + every)
    if WHOLE:
        return gl.load(places), peak, together
    else:
        return gl.load(places, mask=(ranks < rank)[None, :], other=0.0), peak, together


@gluon.jit
def _down(
    down,
    smooth,
    slab,
    stride_down,
    rank,
    k,
    SMOOTH: gl.constexpr,
    RANK: gl.constexpr,
    WHOLE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """D of a slab, dealt to rows and columns of an operand."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    ranks = gl.arange(0, RANK, gl.SliceLayout(1, layout))
    columns = slab + gl.arange(0, 64 * WARPS, gl.SliceLayout(0, layout))
    places = down + (ranks * stride_down)[:, None] + columns[None, :]
    if WHOLE:
        d = gl.load(places)
    else:
        d = gl.load(places, mask=(ranks < rank)[:, None] & (columns < k)[None, :], other=0.0)
    if SMOOTH:
        if WHOLE:
            s = gl.load(smooth + columns)
        else:
            s = gl.load(smooth + columns, mask=columns < k, other=1.0)
        d = (d.to(gl.float32) * s.to(gl.float32)[None, :]).to(d.dtype)
    # Rows by thread, product, half and pair; columns by warp, thread, product and pair.
    d = d.reshape([4, RANK // 16, 2, 2, WARPS, 4, 8, 2]).permute([1, 2, 0, 3, 6, 4, 5, 7])
    return d.reshape([RANK, 64 * WARPS])


@gluon.jit
def _store(out, tile, first, slab, stride_out, n, width, WHOLE: gl.constexpr):
    """Stores a tile of rows from `first` on."""
    rows = first + gl.arange(0, tile.shape[0], gl.SliceLayout(1, tile.type.layout))
    columns = slab + gl.arange(0, tile.shape[1], gl.SliceLayout(0, tile.type.layout))
    places = out + (rows * stride_out)[:, None] + columns[None, :]
    if WHOLE:
        gl.store(places, tile, mask=(rows < n)[:, None])
    else:
        gl.store(places, tile, mask=(rows < n)[:, None] & (columns < width)[None, :])


@gluon.jit
def _most_of_down(bounds, RANK: gl.constexpr, IN_DOWN: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """The largest magnitude of D by rank."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [WARPS, 1], [1, 0])
    parts = gl.arange(0, IN_DOWN, gl.SliceLayout(1, layout)) * RANK
    ranks = gl.arange(0, RANK, gl.SliceLayout(0, layout))
    most = largest_of(gl.load(bounds + parts[:, None] + ranks[None, :]), 0)
    return gl.convert_layout(most, LAYOUT)


@gluon.jit
def _write_scales(bounds, maxima, most, column_scales, n, ranks, RANK: gl.constexpr, WARPS: gl.constexpr):
    """Stores this program's part of c."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    program = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    for block in range(program, gl.cdiv(n, PER_FINDER), gl.num_programs(0) * gl.num_programs(1)):
        rows = block * PER_FINDER + gl.arange(0, PER_FINDER, layout)
        branch = gl.sum(gl.load(maxima + block * RANK + ranks) * most, 0)
        peak = gl.load(bounds + rows, mask=rows < n, other=0.0)
        gl.store(column_scales + rows, scale_within(peak + branch), mask=rows < n)


@gluon.jit
def specialized_fold_kernel(
    words, scales, smooth, down, up, bounds, column_scales, out, n, k, width, rank, stride_words, stride_scales,
    stride_down, stride_up, stride_out, low_mask, high_mask, GROUP: gl.constexpr, SMOOTH: gl.constexpr,
    RANK: gl.constexpr, WHOLE: gl.constexpr, IN_DOWN: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """See the module; programs of one slab of inputs share the rows."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    layout: gl.constexpr = _weight_layout(ROWS, WARPS)
    up_layout: gl.constexpr = _up_layout(ROWS, WARPS, RANK)
    by_word: gl.constexpr = gl.SliceLayout(3, layout)
    by_warp: gl.constexpr = gl.SliceLayout(2, by_word)
    by_row: gl.constexpr = gl.SliceLayout(1, by_warp)
    by_code: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    COLUMNS: gl.constexpr = 64 * WARPS
    slab = gl.program_id(0) * COLUMNS

    d = _down(down, smooth, slab, stride_down, rank, k, SMOOTH, RANK, WHOLE, WARPS)
    d = gl.convert_layout(d, gl.DotOperandLayout(1, mma, 2))

    warp = gl.arange(0, WARPS, gl.SliceLayout(0, by_warp))[None, :]
    known = slab + warp * 64 < k
    group = (slab + warp * 64) // GROUP
    eight = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(0, by_word)))
    word = slab // 8 + warp[:, :, None] * 8 + eight[None, :][None, :, :]
    code = gl.arange(0, 8, by_code)[None, :][None, :, :][None, :, :, :]
    # Two neighbours are shifted together, the second to the highest bits of a significand.
    second = (code & 1) == 1
    left, right = gl.maximum(15 - 4 * (code & 6), 0), gl.maximum(4 * (code & 6) - 15, 0)
    mask = gl.where(second, high_mask, low_mask)
    bits = gl.where(second, 0x3FC00000, 0x3F840000)
    like = gl.zeros([ROWS, WARPS, 8, 8], gl.float32, layout)
    times, minus = gl.where(second, 16.0, 256.0), gl.where(second, -24.0, -264.0)
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, mma)

    # All ranks in every warp.
    by_rank: gl.constexpr = gl.BlockedLayout([(RANK + 31) // 32], [32], [WARPS], [0])
    every = gl.arange(0, RANK, by_rank)
    maxima = bounds + n + IN_DOWN * RANK
    most = _most_of_down(bounds + n, RANK, IN_DOWN, WARPS, by_rank)
    _write_scales(bounds, maxima, most, column_scales, n, every, RANK, WARPS)
    step = ROWS * gl.num_programs(1)
    start = ROWS * gl.program_id(1)
    next_words, next_scale = _codes(
        words, scales, start, stride_words, stride_scales, n, word, group, known, WHOLE, ROWS, layout
    )
    next_u, next_peak, next_together = _factors(
        up, bounds, maxima, start, stride_up, n, rank, every, WHOLE, ROWS, up_layout
    )
    for first in range(start, n, step):
        packed, scale, u = next_words, next_scale, next_u
        c = scale_within(next_peak + gl.sum(next_together * most, 0))
        next_words, next_scale = _codes(
            words, scales, first + step, stride_words, stride_scales, n, word, group, known, WHOLE, ROWS, layout
        )
        next_u, next_peak, next_together = _factors(
            up, bounds, maxima, first + step, stride_up, n, rank, every, WHOLE, ROWS, up_layout
        )
        inverse = reciprocal_of_power(c)
        shared = inverse.to(gl.bfloat16)[:, None] + gl.zeros_like(u)
        u = gl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [u, shared], dtype=gl.bfloat16, is_pure=True, pack=2
        )
        u = u.reshape([ROWS, 4, RANK // 16, 2, 2]).permute([0, 2, 3, 1, 4]).reshape([ROWS, RANK])
        u = gl.convert_layout(u, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)
        sums = mma_v2(u, d, zeros)
        sums = sums.reshape([ROWS, 8, WARPS, 4, 2]).permute([0, 2, 3, 1, 4]).reshape([ROWS, WARPS, 8, 8])
        sums = gl.convert_layout(sums, layout, assert_trivial=True)
        shifted = (packed[:, :, :, None] << left).to(gl.uint32, bitcast=True) >> right
        floats = ((shifted.to(gl.int32, bitcast=True) & mask) ^ bits).to(gl.float32, bitcast=True)
        inverse = gl.convert_layout(inverse, by_row, assert_trivial=True)
        factor = (scale.to(gl.float32) * inverse[:, None])[:, :, None][:, :, :, None] + like
        weights = gl.fma(floats, times * factor, minus * factor) + sums
        result = weights.to(gl.float8e4nv).reshape([ROWS, COLUMNS])
        _store(out, result, first, slab, stride_out, n, width, WHOLE)
