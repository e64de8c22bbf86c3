"""The 8-bit GEMM for Hopper, with warps that load and warps that multiply.

The maths and the operands are those of `gemm`, in fp8. There, all warps of a program load, multiply and finish a tile
together: the tensor cores wait while the end of a tile reads scales and factors, and while the next tile's operands
come. Here a program is

    one warp         asks for tiles of A and B through STAGES buffers, running ahead into the next tile, and for the
                     columns' scales, biases and rows of U of the tile that is being multiplied
    two warp groups  multiply, 64 tokens x BLOCK_N outputs each, scale, add the branch and store

A buffer is asked for again when both groups have read it. They share B's tiles, and so keep step: that one finishes
its tile while the other multiplies would take buffers for both, which shared memory has not. Row scales and down-
projected inputs are read before the products, and arrive during them.

Layout: A in two halves of 64 tokens, so that a group's half is a buffer of its own. A result leaves in CHUNKs of
outputs through BUFFERS of shared memory. Triton's language has no words for all this; Gluon, which comes with it, has.
The interpreter runs no Gluon: numbers are tested on a GPU alone.

Floor: as of `gemm`.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bittern.ops.triton.config import SpecializedConfig, padded_rank
from bittern.ops.triton.launch import Launch, Operand, Tiled, cdiv, launch, multiprocessors
from bittern.ops.triton.numerics import floored, gelu, largest_of, power_above, reciprocal_of_power

HALF = gl.constexpr(64)
"""Tokens of a warp group."""
WARPS = 4
"""Of a group."""
REGISTERS = 168
"""Of a thread: what a multiprocessor has for three groups. The one that loads gives up most of its own."""


def specialized_gemm(
    a: Tensor,
    b: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    first_segment: int,
    gelu_from: int | None,
    config: SpecializedConfig,
    launch: Launch = launch,
) -> None:
    """Fills `out` as `gemm` does; a and b in e4m3, rows of `up` and `out` of whole 16 bytes, bias [1, N]."""
    m, n = out.shape
    rank = 0 if up is None else up.shape[1]
    tiles = cdiv(m, 2 * HALF.value) * cdiv(n, config.block_n)
    branch: Operand = None if up is None else Tiled(up, [config.block_n, padded_rank(rank)])
    shifts: Operand = None if bias is None else Tiled(bias, [1, config.block_n])
    launch(
        specialized_gemm_kernel,
        (min(tiles, multiprocessors(a.device)),),
        (
            Tiled(a, [HALF.value, config.block_k]),
            Tiled(b, [config.block_n, config.block_k]),
            Tiled(out, [HALF.value, config.chunk]),
            Tiled(column_scales, [len(column_scales), config.block_n]),
            branch,
            shifts,
            row_scales,
            low,
        ),
        (m, n, first_segment, a.shape[1], rank, gelu_from or 0),
        SEGMENTS=len(row_scales),
        RANK=padded_rank(rank),
        BIAS=bias is not None,
        GELU=gelu_from is not None,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        STAGES=config.stages,
        CHUNK=config.chunk,
        BUFFERS=config.buffers,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )


@gluon.jit
def _origin(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """First token and first output of a tile."""
    per_group = GROUP_M * tiles_n
    first_m = (tile // per_group) * GROUP_M
    group_m = gl.minimum(tiles_m - first_m, GROUP_M)
    row = first_m + (tile % per_group) % group_m
    return row * 2 * HALF, ((tile % per_group) // group_m) * BLOCK_N


@gluon.jit
def _load(
    a, b, column_scales, up, bias, a_tiles, b_tiles, scale_tile, up_tile, bias_tile, full, empty, end_full, end_empty,
    m, n, first_segment, k, SEGMENTS: gl.constexpr, RANK: gl.constexpr, BIAS: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads."""
    tiles_m, tiles_n = gl.cdiv(m, 2 * HALF), gl.cdiv(n, BLOCK_N)
    stage = 0
    phase = 1
    end_phase = 1
    finish_at = (gl.minimum(first_segment // BLOCK_K, STAGES) - 1) * BLOCK_K
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, column = _origin(tile, tiles_m, tiles_n, GROUP_M, BLOCK_N)
        for start in range(0, k, BLOCK_K):
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready, (2 * HALF + BLOCK_N) * BLOCK_K)
            tma.async_copy_global_to_shared(a, [row, start], ready, a_tiles.index(2 * stage))
            tma.async_copy_global_to_shared(a, [row + HALF, start], ready, a_tiles.index(2 * stage + 1))
            tma.async_copy_global_to_shared(b, [column, start], ready, b_tiles.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
            # Not before the stages are full, since the last tile's end has to be waited for; and before a second
            # segment, which wants the scales.
            if start == finish_at:
                mbarrier.wait(end_empty, end_phase)
                mbarrier.expect(end_full, BLOCK_N * (4 * SEGMENTS + 2 * RANK + (2 if BIAS else 0)))
                tma.async_copy_global_to_shared(column_scales, [0, column], end_full, scale_tile)
                if BIAS:
                    tma.async_copy_global_to_shared(bias, [0, column], end_full, bias_tile)
                if RANK > 0:
                    tma.async_copy_global_to_shared(up, [column, 0], end_full, up_tile)
                end_phase ^= 1


@gluon.jit
def _products(
    acc, a_tiles, b_tiles, full, empty, stage, phase, k_start, k_stop, GROUP: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, FRESH: gl.constexpr,
):  # fmt: skip
    """Adds a segment's products to a group's sums, one product in flight behind the one that is asked for."""
    for start in range(k_start, k_stop, BLOCK_K):
        mbarrier.wait(full.index(stage), phase)
        left, right = a_tiles.index(2 * stage + GROUP), b_tiles.index(stage).permute((1, 0))
        if FRESH:
            acc = warpgroup_mma(left, right, acc, use_acc=start > k_start, is_async=True)
        else:
            acc = warpgroup_mma(left, right, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # What the product before this one read is free.
        before = gl.where(stage == 0, STAGES - 1, stage - 1)
        mbarrier.arrive(empty.index(before), count=1, pred=start > k_start)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    before = gl.where(stage == 0, STAGES - 1, stage - 1)
    mbarrier.arrive(empty.index(before), count=1)
    return acc, stage, phase


@gluon.jit
def _halved(x):
    """The left and right half of a tile's columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@gluon.jit
def _finish(
    acc, row_scale, scale_tile, low, power, up_tile, bias_tile, out, out_tiles, row, column, gelu_from,
    FIRST: gl.constexpr, GROUP: gl.constexpr, SEGMENTS: gl.constexpr, RANK: gl.constexpr, BIAS: gl.constexpr,
    GELU: gl.constexpr, CHUNK: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Scales a group's sums, adds branch and bias, and stores them, chunk by chunk."""
    if acc.shape[1] > CHUNK:
        left, right = _halved(acc)
        _finish(
            left, row_scale, scale_tile, low, power, up_tile, bias_tile, out, out_tiles, row, column, gelu_from, FIRST,
            GROUP, SEGMENTS, RANK, BIAS, GELU, CHUNK, BUFFERS,
        )  # fmt: skip
        _finish(
            right, row_scale, scale_tile, low, power, up_tile, bias_tile, out, out_tiles, row, column, gelu_from,
            FIRST + acc.shape[1] // 2, GROUP, SEGMENTS, RANK, BIAS, GELU, CHUNK, BUFFERS,
        )  # fmt: skip
    else:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
        sums = gl.convert_layout(acc, layout).to(gl.float32)
        column_scale = scale_tile.slice(FIRST, CHUNK, dim=1).slice(0, 1, dim=0).load(layout)
        if SEGMENTS == 2:
            last = scale_tile.slice(FIRST, CHUNK, dim=1).slice(1, 1, dim=0).load(layout)
            column_scale, _ = floored(last, column_scale)
        y = sums * row_scale[:, None] * column_scale
        if RANK > 0:
            branch = up_tile.slice(FIRST, CHUNK, dim=0).permute((1, 0))
            if low.dtype == gl.float16:
                y = warpgroup_mma(low, branch, y * reciprocal_of_power(power)[:, None]) * power[:, None]
            else:
                y = warpgroup_mma(low, branch, y)
        if BIAS:
            y += bias_tile.slice(FIRST, CHUNK, dim=1).load(layout).to(gl.float32)
        if GELU:
            if column + FIRST + CHUNK > gelu_from:
                columns = column + FIRST + gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
                y = gl.where((columns >= gelu_from)[None, :], gelu(y), y)
        buffer = out_tiles.index(GROUP * BUFFERS + FIRST // CHUNK % BUFFERS)
        tma.store_wait(BUFFERS - 1)
        buffer.store(y.to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [row, column + FIRST], buffer)


@gluon.jit
def _multiply(
    a_tiles, b_tiles, scale_tile, up_tile, bias_tile, out_tiles, full, empty, end_full, end_empty, out,
    row_scales, low, m, n, first_segment, k, rank, gelu_from, GROUP: gl.constexpr, SEGMENTS: gl.constexpr,
    RANK: gl.constexpr, UP_DTYPE: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    """A warp group that multiplies."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    tiles_m, tiles_n = gl.cdiv(m, 2 * HALF), gl.cdiv(n, BLOCK_N)
    stage = 0
    phase = 0
    end_phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, column = _origin(tile, tiles_m, tiles_n, GROUP_M, BLOCK_N)
        row += GROUP * HALF
        # What the end of the tile reads of device memory is asked for now, and arrives during the products.
        rows = gl.minimum(row + gl.arange(0, HALF, gl.SliceLayout(1, narrow)), m - 1)
        row_scale = gl.load(row_scales + rows)
        projected = row_scale
        if RANK > 0:
            tokens = gl.minimum(row + gl.arange(0, HALF, gl.SliceLayout(1, left)), m - 1)
            ranks = gl.arange(0, RANK, gl.SliceLayout(0, left))
            projected = gl.load(low + tokens[:, None] * rank + ranks[None, :], mask=(ranks < rank)[None, :], other=0.0)
            if UP_DTYPE != gl.float16:
                projected = projected.to(UP_DTYPE)
        acc = gl.zeros([HALF, BLOCK_N], gl.float32, layout)
        acc, stage, phase = _products(
            acc, a_tiles, b_tiles, full, empty, stage, phase, 0, first_segment, GROUP, BLOCK_K,
            STAGES, True,
        )  # fmt: skip
        mbarrier.wait(end_full, end_phase)
        power = row_scale
        if UP_DTYPE == gl.float16:
            power = power_above(largest_of(gl.abs(projected)))
            projected = (projected * reciprocal_of_power(power)[:, None]).to(UP_DTYPE)
            power = gl.convert_layout(power, gl.SliceLayout(1, narrow))
        if SEGMENTS == 2:
            row_scale, row_ratio = floored(gl.load(row_scales + m + rows), row_scale)
            first, last = scale_tile.slice(0, 1, dim=0).load(layout), scale_tile.slice(1, 1, dim=0).load(layout)
            _, column_ratio = floored(last, first)
            acc = acc * gl.convert_layout(row_ratio, gl.SliceLayout(1, layout))[:, None] * column_ratio
            acc, stage, phase = _products(
                acc, a_tiles, b_tiles, full, empty, stage, phase, first_segment, k, GROUP, BLOCK_K, STAGES,
                False,
            )  # fmt: skip
        _finish(
            acc, row_scale, scale_tile, projected, power, up_tile, bias_tile, out, out_tiles, row, column, gelu_from, 0,
            GROUP, SEGMENTS, RANK, BIAS, GELU, CHUNK, BUFFERS,
        )  # fmt: skip
        mbarrier.arrive(end_empty, count=1)
        end_phase ^= 1
    tma.store_wait(0)


@gluon.jit
def specialized_gemm_kernel(
    a, b, out, column_scales, up, bias, row_scales, low, m, n, first_segment, k, rank, gelu_from,
    SEGMENTS: gl.constexpr, RANK: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    """See the module; a, b, out, column_scales, up and bias are tensor descriptors."""
    a_tiles = gl.allocate_shared_memory(a.dtype, [2 * STAGES, HALF, BLOCK_K], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_N, BLOCK_K], b.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS, HALF, CHUNK], out.layout)
    scale_tile = gl.allocate_shared_memory(gl.float32, [SEGMENTS, BLOCK_N], column_scales.layout)
    up_tile = out_tiles
    UP_DTYPE: gl.constexpr = up.dtype if RANK > 0 else gl.float32
    if RANK > 0:
        up_tile = gl.allocate_shared_memory(up.dtype, [BLOCK_N, RANK], up.layout)
    bias_tile = out_tiles
    if BIAS:
        bias_tile = gl.allocate_shared_memory(bias.dtype, [1, BLOCK_N], bias.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    end_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    end_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(end_full, count=1)
    mbarrier.init(end_empty, count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (
                a_tiles, b_tiles, scale_tile, up_tile, bias_tile, out_tiles, full, empty, end_full, end_empty, out,
                row_scales, low, m, n, first_segment, k, rank, gelu_from, 0, SEGMENTS, RANK, UP_DTYPE, BIAS, GELU,
                BLOCK_N, BLOCK_K, GROUP_M, STAGES, CHUNK, BUFFERS,
            )),
            (_multiply, (
                a_tiles, b_tiles, scale_tile, up_tile, bias_tile, out_tiles, full, empty, end_full, end_empty, out,
                row_scales, low, m, n, first_segment, k, rank, gelu_from, 1, SEGMENTS, RANK, UP_DTYPE, BIAS, GELU,
                BLOCK_N, BLOCK_K, GROUP_M, STAGES, CHUNK, BUFFERS,
            )),
            (_load, (
                a, b, column_scales, up, bias, a_tiles, b_tiles, scale_tile, up_tile, bias_tile, full, empty, end_full,
                end_empty, m, n, first_segment, k, SEGMENTS, RANK, BIAS, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
