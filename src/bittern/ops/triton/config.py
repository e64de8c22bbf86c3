"""How each kernel is tiled and launched, and when a configuration is valid.

Frozen dataclasses; `problem` is the one place that says what a device can hold. Which configuration a problem gets
stands in tables, `tuned/*.json`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import triton

from bittern.errors import UserError
from bittern.ops.triton import tuned

SCRATCH_MULTIPLE = 128
"""8-bit operands are filled up to this many inputs a segment, so that no tile of the GEMM needs a mask along K."""

LARGEST_RANK = 128
"""Of a branch within the kernels, as `padded_rank` counts: more does not fit shared memory beside the tiles."""


@dataclass(frozen=True)
class PrologueConfig:
    """Tiles of tokens and inputs; whether they are loaded by tensor descriptors."""

    block_m: int = 16
    block_k: int = 256
    warps: int = 4
    stages: int = 3
    descriptors: bool = False

    def shared_memory(self, rank: int, factor_bytes: int = 2) -> int:
        """About how many bytes it takes: tiles of x, in 16 bits, and of D on their way."""
        return (self.stages - 1) * (2 * self.block_m + factor_bytes * padded_rank(rank)) * self.block_k + 4096


@dataclass(frozen=True)
class WholeRowsConfig:
    """Tiles of tokens and inputs, of the prologue that keeps rows in registers."""

    block_m: int = 2
    block_k: int = 1024
    warps: int = 8

    def holds(self, k: int) -> bool:
        """Whether rows of so many inputs, in 16 bits, leave half of a thread's registers free."""
        return self._registers(k) <= 128

    def holds_smoothed(self, k: int) -> bool:
        """Whether they do in float32."""
        return 2 * self._registers(k) <= 128

    def _registers(self, k: int) -> float:
        """What inputs take, in 16 bits, of each thread's registers."""
        return self.block_m * -(-k // self.block_k) * self.block_k / (2 * 32 * self.warps)


@dataclass(frozen=True)
class UnpackConfig:
    """Tiles of output rows and inputs; `block_k` is a multiple of the group."""

    block_n: int = 8
    block_k: int = 512
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of the 8-bit GEMM.

    Attributes:
        block_m: Tokens.
        block_n: Outputs.
        block_k: Inputs; divides `SCRATCH_MULTIPLE`.
        group_m: Tiles of tokens that share tiles of weights in the L2 cache.
        warps: Warps a program.
        stages: Tiles in flight.
        descriptors: Whether tiles are loaded by tensor descriptors.
        store_descriptors: Whether the result is stored by them, too.
        programs: Programs for each multiprocessor.
        halves: Whether the result is stored in two halves, which leaves shared memory for another stage.
        early: Whether the low-rank factors are loaded before the products; they then take shared memory.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group_m: int = 8
    warps: int = 8
    stages: int = 3
    descriptors: bool = False
    store_descriptors: bool = False
    programs: int = 1
    halves: bool = False
    early: bool = False

    def problem(self, shared_memory: int, rank: int = 0) -> str | None:
        """Why the configuration cannot run for a rank with so many bytes of shared memory; None if it can."""
        if SCRATCH_MULTIPLE % self.block_k:
            return f"block_k {self.block_k} does not divide {SCRATCH_MULTIPLE}"
        needed = self.stages * (self.block_m + self.block_n) * self.block_k
        if self.store_descriptors:
            needed += 2 * self.block_m * self.block_n // (2 if self.halves else 1)
        if self.early:
            needed += 2 * self.block_n * padded_rank(rank)
        # Barriers, and row and column scales on their way to other threads.
        needed += 2048 if self.descriptors else 0
        if needed > shared_memory:
            return f"tiles take {needed} bytes of shared memory, the device has {shared_memory}"
        accumulators = self.block_m * self.block_n // (32 * self.warps)
        if accumulators > 128:
            return f"{accumulators} accumulators a thread do not fit its registers"
        return None


@dataclass(frozen=True)
class SpecializedConfig:
    """Tiles of the GEMM with warps that load, of 128 tokens.

    Attributes:
        block_n: Outputs.
        block_k: Inputs; divides `SCRATCH_MULTIPLE`.
        group_m: As of `GemmConfig`; 12 by 11 tiles are the 132 multiprocessors of an H100 and an H200.
        stages: Tiles in flight.
        chunk: Outputs that leave together.
        buffers: For those that are on their way.
    """

    block_n: int = 256
    block_k: int = 128
    group_m: int = 12
    stages: int = 4
    chunk: int = 64
    buffers: int = 1

    def problem(self, shared_memory: int, rank: int, segments: int) -> str | None:
        """Why it cannot run with so many bytes of shared memory; None if it can."""
        if SCRATCH_MULTIPLE % self.block_k:
            return f"block_k {self.block_k} does not divide {SCRATCH_MULTIPLE}"
        needed = self.stages * (128 + self.block_n) * self.block_k + 2 * 2 * 64 * self.chunk * self.buffers
        needed += self.block_n * (2 * padded_rank(rank) + 4 * segments + 2) + 16 * self.stages + 256
        if needed > shared_memory:
            return f"tiles take {needed} bytes of shared memory, the device has {shared_memory}"
        return None


@dataclass(frozen=True)
class GroupedGemmConfig:
    """Tiles of the 4-bit GEMM: as of `GemmConfig`."""

    block_m: int = 128
    block_n: int = 128
    group_m: int = 8
    warps: int = 8
    stages: int = 4


@dataclass(frozen=True)
class SkinnyConfig:
    """Tiles of the product with few tokens.

    Attributes:
        block_n: Outputs.
        block_b: Packed bytes of inputs, where a segment's rows have one scale; otherwise a tile is a group.
        warps: Warps a program.
        stages: Tiles in flight.
        groups: Of a tile where they are small, 16 inputs or ternary ones of 32: a power of two.
        programs: For each multiprocessor, up to which K is taken in parts.
    """

    block_n: int = 32
    block_b: int = 128
    warps: int = 4
    stages: int = 3
    groups: int = 4
    programs: int = 4

    def groups_at_once(self, k: int, group: int | None, per_byte: int) -> int:
        """Groups of a tile, for K inputs in groups of so many; 0 where all share one scale."""
        if group is None or k <= group:
            return 0
        return self.groups if _is_small(group, per_byte) else 1

    def packed(self, k: int, group: int | None, per_byte: int) -> int:
        """Bytes of a row in a tile."""
        return self.groups_at_once(k, group, per_byte) * (group or 0) // per_byte or self.block_b

    def parts(self, m: int, n: int, k: int, group: int | None, per_byte: int, processors: int) -> int:
        """How many parts K is taken in by so many multiprocessors, each of a few tiles at the least."""
        programs = max(1, -(-n // self.block_n) * -(-m // few_at_once(m)))
        tiles = -(-k // (per_byte * self.packed(k, group, per_byte)))
        return max(1, min(self.programs * processors // programs, tiles // _LEAST_TILES, _MOST_PARTS))

    def shared_memory(self, m: int, k: int, group: int | None, per_byte: int, capability: tuple[int, int]) -> int:
        """About how many bytes it takes: tiles of codes and inputs on their way, and perhaps one of inputs more.

        From there matrix units of data centres' GPUs read their right operand, from Hopper on, and it changes hands
        where all but one group's inputs are 0.
        """
        packed, inputs = self.packed(k, group, per_byte), 2 * few_at_once(m) * per_byte
        further = capability[0] in (9, 10) or self.groups_at_once(k, group, per_byte) > 1
        return (self.stages - 1) * packed * (self.block_n + inputs) + further * packed * inputs + 2048


@dataclass(frozen=True)
class FusedUnpackConfig:
    """Tiles of the GEMM that unpacks weights in its loop.

    Attributes:
        block_m: Tokens.
        block_n: Outputs.
        block_k: Inputs; a multiple of the group.
        warps: Warps a program.
        stages: Tiles in flight.
        weights_left: Whether weights are the left operand, of which matrix units take 64 rows.
        descriptors: Whether inputs are loaded by tensor descriptors.
        programs: For each multiprocessor, up to which K is taken in parts.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 128
    warps: int = 4
    stages: int = 3
    weights_left: bool = True
    descriptors: bool = False
    programs: int = 2

    def parts(self, m: int, n: int, k: int, processors: int) -> int:
        """How many parts K is taken in by so many multiprocessors."""
        programs = -(-n // self.block_n) * -(-m // self.block_m)
        return max(1, min(self.programs * processors // max(1, programs), k // _LEAST_INPUTS, _MOST_PARTS))

    def shared_memory(self, per_byte: int, operand_bytes: int) -> int:
        """About how many bytes it takes: tiles of inputs and codes on their way, and one of unpacked weights."""
        inputs = self.stages * self.block_m * self.block_k * operand_bytes
        packed = (self.stages - 1) * self.block_n * self.block_k // per_byte
        return inputs + packed + self.block_n * self.block_k * operand_bytes + 4096


_LEAST_INPUTS = 768
"""Of a part of K, in the GEMM that unpacks."""
_LEAST_TILES = 6
"""Of a part of K, in the product with few tokens: enough to be in flight together."""
_MOST_PARTS = 16
"""Of a segment: what adds them reads each."""


def few_at_once(m: int) -> int:
    """Tokens of a tile, for few tokens."""
    return min(64, 1 << (max(1, m) - 1).bit_length())


_LEAST_K = 16
"""Numbers that a product takes at the least."""


def _is_small(group: int, per_byte: int) -> bool:
    """Whether the codes of a group, split by their places in a byte, are too few for products of their own."""
    return group < _LEAST_K * per_byte


def padded_rank(rank: int) -> int:
    """The rank that a tile has room for: a power of two, at least what a matrix instruction takes."""
    return 0 if rank == 0 else max(16, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class Device:
    """What the choice of a configuration depends on; capability (0, 0) for the interpreter."""

    capability: tuple[int, int]
    shared_memory: int


@functools.cache
def device_of(device: torch.device) -> Device:
    """The properties of a torch device."""
    if device.type != "cuda":
        return Device((0, 0), 2**17)
    properties = cast(Any, torch.cuda.get_device_properties(device))
    return Device((properties.major, properties.minor), properties.shared_memory_per_block_optin)


def whole_rows_for(device: Device, m: int, k: int, rank: int = 0) -> WholeRowsConfig | None:
    """The configuration for M tokens of K inputs that keeps rows in registers; None where the prologue is better.

    With a branch the vendor's GEMM projects the inputs, which then are read once more.
    """
    for candidate in tuned.all_of(WholeRowsConfig, "whole_rows", device.capability, m=m, k=k, rank=rank):
        if candidate.holds(k):
            return candidate
    return None


def prologue_for(device: Device, m: int, rank: int = 0, factor_bytes: int = 2) -> PrologueConfig:
    """The configuration for M tokens, of which few need small tiles to occupy the device, and a rank.

    Args:
        device: Where it runs.
        m: Tokens.
        rank: Of the branch.
        factor_bytes: Bytes of a number of D.
    """
    chosen = tuned.first(PrologueConfig, "prologue", device.capability, m=m, rank=rank)
    # Two programs a multiprocessor wait for memory in turns, where there is more than the least of any device.
    while chosen.shared_memory(rank, factor_bytes) > max(device.shared_memory // 2, 96 << 10):
        chosen = replace(chosen, block_k=chosen.block_k // 2)
    return chosen


def unpack_for(device: Device, k: int, grouped: bool) -> UnpackConfig:
    """The configuration for a segment of K inputs, in groups or with one scale a row."""
    return tuned.first(UnpackConfig, "unpack", device.capability, k=k, grouped=grouped)


def grouped_gemm_for(device: Device, m: int) -> GroupedGemmConfig:
    """The configuration for M tokens. All devices have its 64 KiB of shared memory."""
    return tuned.first(GroupedGemmConfig, "grouped_gemm", device.capability, m=m)


def skinny_for(device: Device, m: int, k: int, group: int | None, per_byte: int = 2) -> SkinnyConfig:
    """The configuration for M tokens of K inputs and weights in groups of so many, or in whole rows."""
    grouped = group is not None and k > group
    facts = {"grouped": grouped, "group": group if group is not None and grouped else 0}
    chosen = tuned.first(SkinnyConfig, "skinny", device.capability, m=m, **facts)
    while chosen.shared_memory(m, k, group, per_byte, device.capability) > device.shared_memory and chosen.stages > 1:
        chosen = replace(chosen, stages=chosen.stages - 1)
    return chosen


def fused_unpack_for(
    device: Device, m: int, n: int, k: int, group: int | None, per_byte: int, operand_bytes: int
) -> FusedUnpackConfig | None:
    """The configuration of the GEMM that unpacks in its loop; None where other kernels are better.

    Args:
        device: Where it runs.
        m: Tokens.
        n: Outputs.
        k: Inputs.
        group: Of weights that share a scale; None for whole rows.
        per_byte: Weights.
        operand_bytes: 1 for the 8-bit paths, 2 for 16 bits.
    """
    size = group if group is not None and k > group else 0
    facts = {"m": m, "n": n, "k": k, "grouped": size > 0, "bits": 8 * operand_bytes}
    for candidate in tuned.all_of(FusedUnpackConfig, "fused_unpack", device.capability, **facts):
        fits = candidate.shared_memory(per_byte, operand_bytes) <= device.shared_memory
        if fits and (size == 0 or candidate.block_k % size == 0):
            return candidate
    return None


def gemm_for(device: Device, m: int, segments: int, integers: bool, rank: int) -> GemmConfig:
    """The configuration for M tokens, as many segments, codes and rank: the first that the device can hold.

    Raises:
        UserError: if it can hold none.
    """
    # A second segment of integers needs a second set of accumulators.
    sums = segments if integers else 1
    for candidate in tuned.all_of(GemmConfig, "gemm", device.capability, m=m, segments=segments, sums=sums):
        if candidate.problem(device.shared_memory, rank) is None:
            return candidate
    raise UserError(f"no GEMM configuration fits {device.shared_memory} bytes of shared memory; expected 48 KiB")


_WAVE = {256: 1.0, 128: 0.57, 64: 0.34}
"""What a wave of tiles costs by their width; measured, between .53 and .6, and .31 and .36."""
_LAUNCH = 384
"""Inputs that a wave of the widest tiles multiplies in the time of a launch."""
_GLUON = ("3.6.",)
"""Versions of Triton whose Gluon the kernel was run with: it is an experiment of theirs, and may change."""


def has_gluon(device: Device) -> bool:
    """Whether kernels in Gluon run: from Hopper on, with the versions of Triton that they were run with."""
    return device.capability >= (9, 0) and triton.__version__.startswith(_GLUON)


def specialized_for(device: Device, m: int, segments: int, rank: int, block_n: int = 256) -> SpecializedConfig | None:
    """The configuration of the GEMM with warps that load, in fp8, for tiles of a width; None if there is none."""
    if has_gluon(device):
        for candidate in tuned.all_of(SpecializedConfig, "specialized_gemm", device.capability, m=m, segments=segments):
            fits = candidate.problem(device.shared_memory, rank, segments) is None
            if candidate.block_n == block_n and fits:
                return candidate
    return None


def specialized_parts(
    device: Device, m: int, n: int, k: int, segments: int, rank: int, processors: int
) -> list[tuple[int, int, SpecializedConfig]] | None:
    """Columns from, to, and the configuration for them; None where the other GEMM is better.

    Tiles run in waves, one a multiprocessor. Where the last wave is nearly empty (4608 x 3072: 432 tiles on 132), the
    last columns are given to narrower tiles, in a launch of their own, if their waves cost less than it. With few
    tokens all are narrower (512 x 12288: 384 tiles in place of 192).
    """
    rows = -(-m // 128)
    found = [c for c in (specialized_for(device, m, segments, rank, width) for width in _WAVE) if c is not None]

    def cost(columns: int, config: SpecializedConfig) -> float:
        return _WAVE[config.block_n] * -(-rows * -(-columns // config.block_n) // processors)

    choices = [(cost(n, config), [(0, n, config)]) for config in found]
    for config in found:
        # As many columns as fill all waves but the last.
        start = (-(-rows * -(-n // config.block_n) // processors) - 1) * processors // rows * config.block_n
        for narrow in found if start else ():
            if narrow.block_n < config.block_n:
                halves = [(0, start, config), (start, n, narrow)]
                choices.append((cost(start, config) + cost(n - start, narrow) + _LAUNCH / k, halves))
    return min(choices, key=lambda choice: choice[0])[1] if choices else None
