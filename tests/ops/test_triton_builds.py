"""Every kernel is built for GPUs that are not here, down to machine code, and must use their matrix instructions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from bittern import formats
from bittern.ops.triton import (
    attention,
    combine,
    config,
    dequantize,
    fold_branch,
    four_bits,
    fused_unpack,
    gemm,
    grouped_gemm,
    heads,
    projection,
    prologue,
    skinny,
    smoothing,
    specialized_fold,
    specialized_gemm,
    tuned,
    unpack,
    whole_rows,
)

pytestmark = pytest.mark.covering

FP8, INT8 = "fp8e4nv", "i8"
GLUON = {FP8: gl.float8e4nv, "bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}
SCALES = {"int4": "*bf16", "nvfp4": "*fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# What a block may use of the shared memory, by compute capability.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# A few bytes of stack hold addresses outside the main loop; more means that accumulators were spilled.
STACK = 64


def build(
    kernel: Any,
    capability: int,
    arguments: dict[str, str],
    constants: dict[str, Any],
    language: Any = ASTSource,
    **options: Any,
) -> Any:
    """Compiles with pointers and sizes that divide by 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else arguments.get(name, "i32") for name in names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or signature[name] == "i32"
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = language(kernel, signature, values, divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(compiled: Any, folder: Path, of: str) -> int:
    """What a thread uses: "STACK", the bytes that registers are spilled to, or "REG", registers."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    done = subprocess.run([CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True)
    (count,) = re.findall(rf"{of}:(\d+)", done.stdout)
    return int(count)


def expect(compiled: Any, capability: int, instruction: str, folder: Path, stack: int = STACK) -> None:
    assert re.search(instruction, compiled.asm["ptx"]), instruction
    assert compiled.metadata.shared <= SHARED[capability]
    assert usage(compiled, folder, "STACK") <= stack


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize(
    ("capability", "kind", "instruction"),
    [
        (80, INT8, r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8"),
        (86, INT8, r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8"),
        (89, INT8, r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8"),
        (89, FP8, r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3\.e4m3"),
        (90, INT8, r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"),
        (90, FP8, r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3"),
        (100, INT8, r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8"),
        (100, FP8, r"tcgen05\.mma\S*kind::f8f6f4"),
        (120, INT8, r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8"),
        (120, FP8, r"mma\.sync\.aligned\S*m16n8k32\S*f32\.e4m3\.e4m3"),
    ],
)
@pytest.mark.parametrize(
    ("rank", "factor"),
    [(32, "bf16"), *((config.LARGEST_RANK, factor) for factor in ("bf16", "fp16")), (32, "fp16"), (32, "fp32")],
)
def test_gemm(
    capability: int, kind: str, instruction: str, segments: int, rank: int, factor: str, tmp_path: Path
) -> None:
    if factor == "fp32" and capability == 100:
        # On 10.0 such a branch is computed apart.
        return
    device = config.Device((capability // 10, capability % 10), SHARED[capability])
    chosen = config.gemm_for(device, 4096, segments, kind == INT8, rank)
    operands = {"a": "*" + kind, "b": "*" + kind, "out": "*bf16"}
    if chosen.descriptors:
        operands["a"] = f"tensordesc<{kind}[{chosen.block_m},{chosen.block_k}]>"
        operands["b"] = f"tensordesc<{kind}[{chosen.block_n},{chosen.block_k}]>"
    if chosen.store_descriptors:
        operands["out"] = f"tensordesc<bf16[{chosen.block_m},{chosen.block_n}]>"
    compiled = build(
        gemm.gemm_kernel,
        capability,
        {
            **operands,
            "row_scales": "*fp32",
            "column_scales": "*fp32",
            "low": "*fp32",
            "up": "*" + factor,
            "bias": "*bf16",
        },
        {
            "SEGMENTS": segments,
            "RANK": rank,
            "BIAS": True,
            "GELU": True,
            "OUT_DTYPE": tl.bfloat16,
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "BLOCK_K": chosen.block_k,
            "GROUP_M": chosen.group_m,
            "DESCRIPTORS": chosen.descriptors,
            "STORE_DESCRIPTORS": chosen.store_descriptors,
            "HALVES": chosen.halves,
            "EARLY": chosen.early and factor != "fp16",
        },
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    # The factors of a high rank, and more so those in float32, are spilled at the end, once for a tile.
    stack = 1024 if factor == "fp32" else 288 if segments == 2 or rank > 32 else STACK
    expect(compiled, capability, instruction, tmp_path, stack)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(
    ("weight", "group", "k", "rows", "operand", "rank"),
    [
        ("int4", 64, 3072, 1, "bf16", 0),
        ("ternary", None, 3072, 16, "bf16", 0),
        ("ternary", None, 3072, 64, "bf16", 0),
        ("ternary", 32, 3072, 1, "bf16", 0),
        ("int4", None, 3072, 64, "bf16", 0),
        ("nvfp4", 16, 3072, 1, "bf16", 0),
        ("nvfp4", 16, 3072, 64, "bf16", 0),
        ("nvfp4", 16, 3072, 7, "fp16", 0),
        ("nvfp4", None, 3072, 1, "bf16", 0),
        ("int4", 64, 3072, 16, "bf16", 32),
        ("int4", 64, 3072, 64, "bf16", 32),
        ("ternary", None, 3072, 64, "bf16", 32),
        ("int4", 64, 3072, 1, INT8, 32),
        ("int4", 64, 3072, 64, INT8, 32),
        ("int4", 64, 3072, 64, FP8, 32),
        ("ternary", None, 3072, 64, FP8, 0),
        ("nvfp4", 16, 3072, 64, FP8, 0),
        # Segments of one group, and small groups of several codes a byte.
        ("ternary", 64, 64, 64, "bf16", 0),
        ("int4", 64, 40, 64, INT8, 0),
        ("int4", 16, 16, 32, "bf16", 0),
        ("ternary", 32, 3072, 64, "bf16", 0),
        ("ternary", 16, 3072, 64, INT8, 32),
    ],
)
def test_skinny(
    capability: int, weight: str, group: int | None, k: int, rows: int, operand: str, rank: int, tmp_path: Path
) -> None:
    if operand == FP8 and capability < 89:
        return
    per_byte = formats.get(weight).codes_per_byte
    device = config.Device((capability // 10, capability % 10), SHARED[capability])
    chosen = config.skinny_for(device, rows, k, group, per_byte)
    eight = operand in (INT8, FP8)
    compiled = build(
        skinny.skinny_kernel,
        capability,
        {
            "x": "*" + operand,
            "row_scales": "*fp32",
            "codes": "*u8",
            "scales": SCALES.get(weight, "*bf16"),
            "bias": "*bf16",
            "out": "*fp32" if rank else "*bf16",
            "raw": "*bf16",
            "down": "*bf16",
            "low": "*fp32",
        },
        {
            "PER_BYTE": per_byte,
            "FLOATS": weight == "nvfp4",
            "LARGEST": formats.get(weight).largest,
            "GROUPS": chosen.groups_at_once(k, group, per_byte),
            "BITS": 8 if eight else 16,
            "FP8": operand == FP8,
            "OPERAND": tl.bfloat16 if operand == "bf16" else tl.float16,
            "PARTS": 4 if rank else 1,
            "PART": projection.part_of(3072) if rank else 0,
            "BIAS": not rank,
            "BLOCK_M": 1 << (rows - 1).bit_length(),
            "BLOCK_N": chosen.block_n,
            "BLOCK_B": chosen.packed(k, group, per_byte),
            "BLOCK_R": projection.BLOCK_R,
            "BLOCK_K": skinny.PROJECTION_K,
            "STAGES": skinny.PROJECTION_STAGES,
        },
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        enable_fp_fusion=not eight,
    )
    kind = "bf16" if operand == "bf16" else "f16"
    # 64 tokens by four products want more registers than there are: slower than it might be.
    most = 1024 if weight == "ternary" and group in (16, 32) else 288 if rank else 256
    stack = most if rows == 64 else STACK
    expect(compiled, capability, rf"mma\S*f32\.{kind}\.{kind}|tcgen05\.mma\S*kind::f16", tmp_path, stack)
    # Subnormal numbers are codes of nvfp4.
    assert ".ftz" not in "".join(re.findall(r"fma\.rn\S*x2", compiled.asm["ptx"]))


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("operand", ["bf16", "fp16", INT8, FP8])
@pytest.mark.parametrize(
    ("weight", "group", "k", "rows", "rank"),
    [
        ("int4", 64, 3072, 16, 32),
        ("int4", 64, 3072, 64, 32),
        ("int4", 64, 12288, 256, 32),
        ("int4", 64, 3100, 128, 32),
        ("ternary", None, 3072, 128, 0),
        ("ternary", None, 3072, 256, 32),
        ("ternary", 128, 3072, 256, 0),
        ("nvfp4", 16, 3072, 128, 32),
        ("nvfp4", 16, 3100, 256, 32),
    ],
)
def test_fused_unpack(
    capability: int, weight: str, group: int | None, k: int, rows: int, operand: str, rank: int, tmp_path: Path
) -> None:
    if operand == FP8 and capability < 89:
        return
    per_byte, eight = formats.get(weight).codes_per_byte, operand in (INT8, FP8)
    device = config.Device((capability // 10, capability % 10), SHARED[capability])
    chosen = config.fused_unpack_for(device, rows, 12288, k, group, per_byte, 1 if eight else 2)
    if chosen is None:
        # Not measured there, but it can be tried.
        chosen = config.FusedUnpackConfig(weights_left=rows < 128)
    assert chosen.shared_memory(per_byte, 1 if eight else 2) <= SHARED[capability]
    tile = f"[{chosen.block_m},{chosen.block_k}]"
    compiled = build(
        fused_unpack.fused_unpack_kernel,
        capability,
        {
            "x": f"tensordesc<{operand}{tile}>" if chosen.descriptors else "*" + operand,
            "row_scales": "*fp32",
            "codes": "*u8",
            "scales": SCALES.get(weight, "*bf16"),
            "bias": "*bf16",
            "out": "*fp32" if rank else "*bf16",
            "raw": "*bf16",
            "down": "*bf16",
            "low": "*fp32",
        },
        {
            "PER_BYTE": per_byte,
            "FLOATS": weight == "nvfp4",
            "LARGEST": formats.get(weight).largest,
            "GROUP": group or 0,
            "EIGHT": eight,
            "OPERAND": {"bf16": tl.bfloat16, "fp16": tl.float16, INT8: tl.int8, FP8: tl.float8e4nv}[operand],
            "EVEN": k % chosen.block_k == 0,
            "DESCRIPTORS": chosen.descriptors,
            "WEIGHTS_LEFT": chosen.weights_left,
            "PART": projection.part_of(k) if rank else 0,
            "BIAS": not rank,
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "BLOCK_K": chosen.block_k,
            "STAGES": chosen.stages,
            "PROJECTED": 64,
            "PROJECTION_K": skinny.PROJECTION_K,
            "PROJECTION_STAGES": skinny.PROJECTION_STAGES,
            "BLOCK_R": projection.BLOCK_R,
        },
        num_warps=chosen.warps,
        enable_fp_fusion=False,
    )
    instruction = {
        "bf16": r"mma\S*f32\.bf16\.bf16|tcgen05\.mma\S*kind::f16",
        "fp16": r"mma\S*f32\.f16\.f16|tcgen05\.mma\S*kind::f16",
        INT8: r"mma\S*s32\.s8\.s8",
        FP8: r"mma\S*f32\.e4m3\.e4m3|tcgen05\.mma\S*kind::f8f6f4",
    }[operand]
    expect(compiled, capability, instruction, tmp_path)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(
    ("parts", "rank", "factor"), [(4, 32, "bf16"), (32, 128, "bf16"), (32, 128, "fp16"), (16, 128, "fp32"), (2, 0, "")]
)
def test_combine(capability: int, parts: int, rank: int, factor: str, tmp_path: Path) -> None:
    compiled = build(
        combine.combine_kernel,
        capability,
        {"sums": "*fp32", "low": "*fp32", "up": "*" + factor, "bias": "*bf16", "out": "*bf16"},
        {
            "PARTS": parts,
            "LOW_PARTS": 32 if rank else 0,
            "RANK": rank,
            "BIAS": True,
            "GELU": True,
            "BLOCK_M": combine.BLOCK_M,
            "BLOCK_N": combine.BLOCK_N,
        }
        | ({} if rank else {"low": None, "up": None}),
        num_warps=combine.WARPS,
    )
    kind = {"bf16": "bf16", "fp16": "f16", "fp32": "tf32"}.get(factor)
    instruction = rf"mma\S*f32\.{kind}|tcgen05\.mma\S*kind::{kind}" if rank else r"st\.global"
    expect(compiled, capability, instruction, tmp_path)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_divide(capability: int, tmp_path: Path) -> None:
    compiled = build(
        smoothing.divide_kernel,
        capability,
        {"x": "*bf16", "smooth": "*bf16", "out": "*bf16"},
        {"BLOCK_K": smoothing.BLOCK_K},
        num_warps=smoothing.WARPS,
    )
    expect(compiled, capability, r"rcp\.approx", tmp_path)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(
    ("operand", "factor", "kind"),
    [("bf16", "bf16", "bf16"), ("fp16", "fp16", "f16"), ("bf16", "fp16", "tf32"), ("bf16", "fp32", "tf32")],
)
def test_projection(capability: int, operand: str, factor: str, kind: str, tmp_path: Path) -> None:
    compiled = build(
        projection.projection_kernel,
        capability,
        {"x": "*" + operand, "down": "*" + factor, "low": "*fp32"},
        {
            "PART": projection.part_of(3072),
            "BLOCK_M": projection.tokens_at_once(4 if factor == "fp32" else 2),
            "BLOCK_R": projection.BLOCK_R,
            "BLOCK_K": projection.BLOCK_K,
            "STAGES": projection.STAGES,
        },
        num_warps=projection.WARPS,
    )
    instruction = rf"mma\S*f32\.{kind}\.{kind}|tcgen05\.mma\S*kind::{'tf32' if kind == 'tf32' else 'f16'}"
    expect(compiled, capability, instruction, tmp_path)


@pytest.mark.parametrize(
    ("capability", "rank", "factor"),
    [
        *((capability, rank, "bf16") for capability in (80, 86, 90, 120) for rank in (64, config.LARGEST_RANK)),
        *((capability, rank, "fp32") for capability in (86, 100) for rank in (32, 64, config.LARGEST_RANK)),
    ],
)
def test_branches_of_many_loras_fit(capability: int, rank: int, factor: str, tmp_path: Path) -> None:
    """The prologues, whose tiles of D grow with the rank; GEMMs are held against it in their configurations."""
    size = 4 if factor == "fp32" else 2
    kind = "tf32" if factor == "fp32" else "bf16"
    instruction = rf"mma\S*f32\.{kind}\.{kind}|tcgen05\.mma\S*kind::{'tf32' if factor == 'fp32' else 'f16'}"
    device = config.Device((capability // 10, capability % 10), SHARED[capability])
    for tokens in (512, 4096):
        chosen = config.prologue_for(device, tokens, rank, size)
        tiles = f"bf16[{chosen.block_m},{chosen.block_k}]", f"{factor}[{rank},{chosen.block_k}]"
        described = [f"tensordesc<{tile}>" if chosen.descriptors else "*" + tile.split("[")[0] for tile in tiles]
        codes = "*" + (FP8 if capability >= 89 else INT8)
        compiled = build(
            prologue.prologue_kernel,
            capability,
            {
                **dict(zip(("x", "down"), described, strict=True)),
                "reciprocals": "*fp32",
                "codes": codes,
                "scales": "*fp32",
                "low": "*fp32",
            },
            {
                "SMOOTH": True,
                "RANK": rank,
                "FP8": codes != "*" + INT8,
                "ACCUMULATE": False,
                "EVEN": True,
                "DESCRIPTORS": chosen.descriptors,
                "BLOCK_M": chosen.block_m,
                "BLOCK_K": chosen.block_k,
                "STAGES": chosen.stages,
            },
            num_warps=chosen.warps,
            enable_fp_fusion=False,
        )
        expect(compiled, capability, instruction, tmp_path, STACK if factor == "bf16" else 512)
        assert compiled.metadata.shared <= chosen.shared_memory(rank, size)
    compiled = build(
        four_bits.groups_kernel,
        capability,
        {"x": "*bf16", "smooth": "*bf16", "down": "*" + factor, "codes": "*i8", "scales": "*fp32", "low": "*fp32"},
        {
            "SHIFT": 0.0,
            "SMOOTH": True,
            "RANK": rank,
            "ACCUMULATE": False,
            "BLOCK_M": four_bits.BLOCK_M,
            "BLOCK_K": four_bits.columns_at_once(rank, size),
        },
        num_warps=4,
        enable_fp_fusion=False,
    )
    expect(compiled, capability, instruction, tmp_path, STACK if factor == "bf16" else 512)


@pytest.mark.parametrize("kind", [INT8, FP8])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_prologue(capability: int, kind: str, tmp_path: Path) -> None:
    if kind == FP8 and capability < 89:
        return
    device = config.Device((capability // 10, capability % 10), SHARED[capability])
    chosen = config.prologue_for(device, 4096, 32)
    descriptors = chosen.descriptors
    compiled = build(
        prologue.prologue_kernel,
        capability,
        {
            "x": f"tensordesc<bf16[{chosen.block_m},{chosen.block_k}]>" if descriptors else "*bf16",
            "reciprocals": "*fp32",
            "down": f"tensordesc<bf16[32,{chosen.block_k}]>" if descriptors else "*bf16",
            "codes": "*" + kind,
            "scales": "*fp32",
            "low": "*fp32",
        },
        {
            "SMOOTH": True,
            "RANK": 32,
            "FP8": kind == FP8,
            "ACCUMULATE": False,
            "EVEN": True,
            "DESCRIPTORS": descriptors,
            "BLOCK_M": chosen.block_m,
            "BLOCK_K": chosen.block_k,
            "STAGES": chosen.stages,
        },
        num_warps=chosen.warps,
        enable_fp_fusion=False,
    )
    expect(compiled, capability, r"mma\S*f32\.bf16\.bf16|tcgen05\.mma\S*kind::f16", tmp_path)


WEIGHT = {"weight_scales": "*bf16", "smooth": "*bf16", "down": "*bf16", "up": "*bf16", "bounds": "*fp32"}


@pytest.mark.parametrize("k", [3072, 12288])
@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_whole_rows_beside_the_bounds_of_a_weight(capability: int, k: int, tmp_path: Path) -> None:
    chosen = next(iter(tuned.all_of(config.WholeRowsConfig, "whole_rows", (9, 0), m=4096, k=k, rank=0)))
    compiled = build(
        whole_rows.whole_rows_kernel,
        capability,
        {"x": "*bf16", "factors": "*bf16", "codes": "*" + FP8, "scales": "*fp32", **WEIGHT},
        {
            **dict.fromkeys(("parts", "low")),
            "SMOOTH": True,
            "INVERT": True,
            "HOLD": chosen.holds_smoothed(k),
            "FP8": True,
            "EVEN": True,
            "TILES": k // chosen.block_k,
            "PARTS": 0,
            "RANK": 32,
            "IN_DOWN": fold_branch.IN_DOWN,
            "GROUP": 64,
            "SMOOTH_WEIGHT": True,
            "BLOCK_M": chosen.block_m,
            "BLOCK_K": chosen.block_k,
        },
        num_warps=chosen.warps,
        enable_fp_fusion=False,
    )
    expect(compiled, capability, r"ld\.global\S*\.v4\.b32", tmp_path)


@pytest.mark.parametrize("group", [64, 3072])
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_fold_branch(capability: int, rank: int, group: int, tmp_path: Path) -> None:
    tensors = {**WEIGHT, "codes": "*u8", "scales": "*bf16", "column_scales": "*fp32", "out": "*" + FP8}
    constants = {"GROUP": group, "SMOOTH": True, "RANK": rank, "IN_DOWN": fold_branch.IN_DOWN}
    compiled = build(
        fold_branch.fold_kernel, capability, tensors, {**constants, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4
    )
    expect(compiled, capability, r"mma\S*f32\.bf16\.bf16|tcgen05\.mma\S*kind::f16", tmp_path)
    compiled = build(fold_branch.bounds_kernel, capability, tensors, constants, num_warps=4)
    expect(compiled, capability, r"ld\.global\S*\.v4\.b32", tmp_path)


@pytest.mark.parametrize("group", [64, 3072])
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("capability", [90, 100, 120])
def test_specialized_fold(capability: int, whole: bool, rank: int, group: int, tmp_path: Path) -> None:
    """Codes in words of 8 bytes, results in 16, and no more registers than four programs a multiprocessor have."""
    compiled = build(
        specialized_fold.specialized_fold_kernel,
        capability,
        {**WEIGHT, "words": "*i32", "scales": "*bf16", "column_scales": "*fp32", "out": "*" + FP8},
        {
            "GROUP": group,
            "SMOOTH": True,
            "RANK": rank,
            "WHOLE": whole,
            "IN_DOWN": fold_branch.IN_DOWN,
            "ROWS": specialized_fold.ROWS,
            "WARPS": specialized_fold.WARPS,
        },
        GluonASTSource,
        num_warps=specialized_fold.WARPS,
    )
    expect(compiled, capability, r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32", tmp_path)
    ptx = compiled.asm["ptx"]
    assert re.search(r"ld\.global\S*\.v2\.b32", ptx) and re.search(r"st\.global\S*\.v4\.b32", ptx)
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert not whole or capability != 90 or rank > 32 or usage(compiled, tmp_path, "REG") <= 128


@pytest.mark.parametrize(("k", "invert"), [(3072, False), (12288, False), (12288, True)])
@pytest.mark.parametrize("kind", [INT8, FP8])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_whole_rows(capability: int, kind: str, k: int, invert: bool, tmp_path: Path) -> None:
    if kind == FP8 and capability < 89:
        return
    chosen = config.WholeRowsConfig()
    assert chosen.holds(k)
    compiled = build(
        whole_rows.whole_rows_kernel,
        capability,
        {
            "x": "*bf16",
            "factors": "*bf16" if invert else "*fp32",
            "codes": "*" + kind,
            "scales": "*fp32",
            "parts": "*fp32",
            "low": "*fp32",
        },
        {
            **dict.fromkeys(WEIGHT),
            "SMOOTH": True,
            "INVERT": invert,
            "HOLD": chosen.holds_smoothed(k),
            "FP8": kind == FP8,
            "EVEN": True,
            "TILES": k // chosen.block_k,
            "PARTS": 0 if invert else projection.parts_of(k),
            "RANK": 0 if invert else 32,
            "IN_DOWN": 0,
            "GROUP": 0,
            "SMOOTH_WEIGHT": False,
            "BLOCK_M": chosen.block_m,
            "BLOCK_K": chosen.block_k,
        },
        num_warps=chosen.warps,
        enable_fp_fusion=False,
    )
    expect(compiled, capability, r"ld\.global\S*v4\.b32", tmp_path)


@pytest.mark.parametrize("kind", [INT8, FP8])
@pytest.mark.parametrize(("weight", "group"), [("int4", 64), ("nvfp4", 16)])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_unpack(capability: int, weight: str, group: int, kind: str, tmp_path: Path) -> None:
    if kind == FP8 and capability < 89:
        return
    device = config.Device((capability // 10, capability % 10), SHARED[capability])
    unpacking = config.unpack_for(device, 3072, grouped=True)
    compiled = build(
        unpack.unpack_kernel,
        capability,
        {
            "codes": "*u8",
            "scales": SCALES[weight],
            "out": "*" + kind,
            "column_scales": "*fp32",
            "smooth": "*bf16",
            "reciprocals": "*fp32",
        },
        {
            "PER_BYTE": 2,
            "FLOATS": weight == "nvfp4",
            "GROUP": group,
            "FP8": kind == FP8,
            "EVEN": True,
            "LARGEST": formats.get(weight).largest,
            "GROUPS": 64,
            "SMOOTH": True,
            "BLOCK_N": unpacking.block_n,
            "BLOCK_K": unpacking.block_k,
            "STAGES": unpacking.stages,
        },
        num_warps=unpacking.warps,
        enable_fp_fusion=False,
    )
    # Whole rows of codes are loaded and stored 16 bytes at a time.
    expect(compiled, capability, r"(?s)ld\.global\S*\.v4\.b32.*st\.global\S*\.v4\.b32", tmp_path)
    # Subnormal numbers are codes of nvfp4.
    assert ".ftz" not in "".join(re.findall(r"mul\S*f32", compiled.asm["ptx"]))


@pytest.mark.parametrize(
    ("weight", "group", "rank", "factor"),
    [
        ("int4", 64, 32, "bf16"),
        ("nvfp4", 16, 32, "bf16"),
        ("int4", 256, config.LARGEST_RANK, "bf16"),
        ("ternary", 0, 64, "bf16"),
        ("ternary", 0, config.LARGEST_RANK, "bf16"),
        ("ternary", 0, config.LARGEST_RANK, "fp32"),
    ],
)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_dequantize(capability: int, weight: str, group: int, rank: int, factor: str, tmp_path: Path) -> None:
    device = config.Device((capability // 10, capability % 10), SHARED[capability])
    factors = "*" + factor
    ranks = dequantize.ranks_at_once(device, rank, wide=factor == "fp32")
    compiled = build(
        dequantize.dequantize_kernel,
        capability,
        {
            "codes": "*u8",
            "scales": SCALES.get(weight, "*bf16"),
            "smooth": "*bf16",
            "down": factors,
            "up": factors,
            "out": "*bf16",
        },
        {
            "PER_BYTE": formats.get(weight).codes_per_byte,
            "FLOATS": weight == "nvfp4",
            "GROUP": group,
            "SMOOTH": True,
            "RANK": rank,
            "RANKS": ranks,
            "BLOCK_N": dequantize.BLOCK_N,
            "BLOCK_K": dequantize.BLOCK_K,
        },
        num_warps=8,
        enable_fp_fusion=False,
    )
    if factor == "fp32":
        # Three products for each, of which a part is spilled once for a piece of the rank.
        expect(compiled, capability, r"mma\S*f32\.tf32\.tf32|tcgen05\.mma\S*kind::tf32", tmp_path, 512)
        return
    expect(compiled, capability, r"mma\S*f32\.bf16\.bf16|tcgen05\.mma\S*kind::f16", tmp_path)
    assert compiled.metadata.shared <= dequantize.shared_memory(ranks)
    # Where there is room, the product is one.
    assert ranks == rank or capability in (86, 89, 120)


INT8_INSTRUCTION = r"mma\S*s32\.s8\.s8"


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(("group", "segments", "tokens"), [(64, 1, 4096), (64, 2, 4096), (0, 2, 4096), (32, 1, 7)])
@pytest.mark.parametrize("factor", ["bf16", "fp16"])
def test_grouped_gemm(capability: int, group: int, segments: int, tokens: int, factor: str, tmp_path: Path) -> None:
    device = config.Device((capability // 10, capability % 10), SHARED[capability])
    chosen = config.grouped_gemm_for(device, tokens)
    compiled = build(
        grouped_gemm.grouped_gemm_kernel,
        capability,
        {
            "a": "*i8",
            "b": "*i8",
            "out": "*bf16",
            "row_scales": "*fp32",
            "scales": "*bf16",
            "low": "*fp32",
            "up": "*" + factor,
            "bias": "*bf16",
        },
        {
            "SEGMENTS": segments,
            "GROUP": group,
            "RANK": 32,
            "BIAS": True,
            "GELU": True,
            "OUT_DTYPE": tl.bfloat16,
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "CHUNK": min(group, 64) if group else 64,
            "GROUP_M": chosen.group_m,
        },
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    expect(compiled, capability, INT8_INSTRUCTION, tmp_path, 256 if segments == 2 else STACK)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("shift", [0.0, 0.171875])
def test_four_bit_prologue(capability: int, shift: float, tmp_path: Path) -> None:
    compiled = build(
        four_bits.groups_kernel,
        capability,
        {"x": "*bf16", "smooth": "*bf16", "down": "*bf16", "codes": "*i8", "scales": "*fp32", "low": "*fp32"},
        {
            "SHIFT": shift,
            "SMOOTH": True,
            "RANK": 32,
            "ACCUMULATE": False,
            "BLOCK_M": four_bits.BLOCK_M,
            "BLOCK_K": four_bits.BLOCK_K,
        },
        num_warps=4,
        enable_fp_fusion=False,
    )
    expect(compiled, capability, r"mma\S*f32\.bf16\.bf16|tcgen05\.mma\S*kind::f16", tmp_path)
    compiled = build(
        four_bits.correction_kernel,
        capability,
        {"codes": "*u8", "scales": "*bf16", "smooth": "*bf16", "bias": "*bf16", "out": "*fp32"},
        {
            "SHIFT": 0.171875,
            "PER_BYTE": 2,
            "GROUP": 64,
            "SMOOTH": True,
            "BIAS": True,
            "BLOCK_N": four_bits.CORRECTED_N,
            "BLOCK_K": four_bits.CORRECTED_K,
        },
        num_warps=4,
        enable_fp_fusion=False,
    )
    expect(compiled, capability, r"ld\.global", tmp_path)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_heads(capability: int, tmp_path: Path) -> None:
    names = ("q", "k", "q_weight", "k_weight", "out_q", "out_k")
    compiled = build(
        heads.heads_kernel,
        capability,
        {**dict.fromkeys(names, "*bf16"), "cos": "*fp32", "sin": "*fp32"},
        {"EPS": 1e-6, "SIZE": 128, "BLOCK_L": heads.BLOCK_L, "BLOCK_H": heads.BLOCK_H},
        num_warps=heads.WARPS,
    )
    # Sixteen bytes a thread, both ways.
    expect(compiled, capability, r"ld\.global\S*\.v4\.b32", tmp_path)
    assert re.search(r"st\.global\S*\.v4\.b32", compiled.asm["ptx"])


@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize("size", [64, 128])
def test_attention(capability: int, size: int, tmp_path: Path) -> None:
    """Only where 8-bit attention runs."""
    inputs = {**dict.fromkeys(("q", "k", "v"), "*bf16"), "bounds": "*fp32", "sums": "*fp32"}
    shape = {"SIZE": size, "BLOCK_D": size, "BLOCK_L": attention.BLOCK_L, "MOST_CHUNKS": attention.MOST_CHUNKS}
    compiled = build(
        attention.bounds_kernel, capability, inputs, shape, num_warps=attention.WARPS, enable_fp_fusion=False
    )
    expect(compiled, capability, r"ld\.global\S*\.v4\.b32", tmp_path)
    constants = {"N": size, "ROOT": size**0.5, "BOUNDS_AT_ONCE": attention.BOUNDS_AT_ONCE, "SOFTMAX_SCALE": 256.0}
    compiled = build(
        attention.codes_kernel,
        capability,
        {**inputs, **dict.fromkeys(("q_codes", "k_codes", "v_codes"), "*" + FP8), "scalars": "*fp32"},
        {**shape, **constants, "SLOT": attention.SLOT},
        num_warps=attention.WARPS,
        enable_fp_fusion=False,
    )
    expect(compiled, capability, r"mma\S*f32\.bf16\.bf16|tcgen05\.mma\S*kind::f16", tmp_path)
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"]
    compiled = build(
        attention.numbers_kernel,
        capability,
        {"codes": "*" + FP8, "scale": "*fp32", "out": "*bf16"},
        {"BLOCK": attention.BLOCK},
        num_warps=attention.BLOCK_WARPS,
    )
    expect(compiled, capability, r"(?s)ld\.global\S*\.v4\.b32.*st\.global\S*\.v4\.b32", tmp_path)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("rank", [0, 32, 64])
@pytest.mark.parametrize("width", [256, 128, 64])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_specialized_gemm(segments: int, rank: int, width: int, dtype: str, tmp_path: Path) -> None:
    """Three groups of warps; only the one that loads gives registers up."""
    chosen = config.specialized_for(config.Device((9, 0), SHARED[90]), 512, segments, rank, width)
    assert chosen is not None

    def tiles(dtype: str, rows: int, columns: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON[dtype])
        return f"tensordesc<{dtype}[{rows},{columns}],{layout!r}>"

    arguments = {
        "a": tiles(FP8, 64, chosen.block_k),
        "b": tiles(FP8, chosen.block_n, chosen.block_k),
        "out": tiles(dtype, 64, chosen.chunk),
        "column_scales": tiles("fp32", segments, chosen.block_n),
        "up": tiles(dtype, chosen.block_n, max(rank, 16)),
        "bias": tiles(dtype, 1, chosen.block_n),
        "row_scales": "*fp32",
        "low": "*fp32",
    }
    constants: dict[str, Any] = {
        "SEGMENTS": segments,
        "RANK": rank,
        "BIAS": True,
        "GELU": True,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "GROUP_M": chosen.group_m,
        "STAGES": chosen.stages,
        "CHUNK": chosen.chunk,
        "BUFFERS": chosen.buffers,
    }
    if not rank:
        constants |= {"up": None, "low": None}
    compiled = build(
        specialized_gemm.specialized_gemm_kernel,
        90,
        arguments,
        constants,
        GluonASTSource,
        num_warps=specialized_gemm.WARPS,
        maxnreg=specialized_gemm.REGISTERS,
    )
    expect(
        compiled,
        90,
        rf"wgmma\.mma_async\.sync\.aligned\.m64n{chosen.block_n}k32\.f32\.e4m3\.e4m3",
        tmp_path,
        160 if rank == 64 or dtype == "fp16" else 128,
    )
    assert "setmaxnreg.dec.sync.aligned.u32 	40" in compiled.asm["ptx"]
