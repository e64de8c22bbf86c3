"""Times every kernel over FLUX.1's shapes, with several configurations each, against its floor and 16 bits.

    python benchmarks/kernels.py --json benchmarks/results/kernels_h100.json

Times are medians over replays of a CUDA graph that holds one call for each of several sets of buffers, together
more than 256 MB where the caches could flatter. Weights and inputs are random.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from quality import keep
from torch import Tensor
from torch.nn import functional as F

from bittern import formats
from bittern.formats import KLayout
from bittern.ops import reference
from bittern.ops.attention import attention_8bit
from bittern.ops.triton import config as configs
from bittern.ops.triton import linear
from bittern.ops.triton.config import (
    FusedUnpackConfig,
    GemmConfig,
    PrologueConfig,
    SkinnyConfig,
    SpecializedConfig,
    UnpackConfig,
    WholeRowsConfig,
)
from bittern.ops.triton.few_tokens import FewTokens
from bittern.ops.triton.fold_branch import Weight, bounds_of, find_bounds, fold_branch
from bittern.ops.triton.gemm import gemm
from bittern.ops.triton.heads import rotary_heads
from bittern.ops.triton.projection import parts_of, project
from bittern.ops.triton.prologue import quantize_rows
from bittern.ops.triton.skinny import skinny_segment
from bittern.ops.triton.specialized_fold import specialized_fold, words_of
from bittern.ops.triton.specialized_gemm import specialized_gemm
from bittern.ops.triton.unpack import unpack_segment
from bittern.ops.triton.whole_rows import quantize_whole_rows

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
BANDWIDTH = 3.0e12
"""Bytes a second of a device copy, read and written, measured on an H100."""
RATES = {"bf16": 990e12, "fp8": 1979e12, "int8": 1979e12}
"""Operations a second by the datasheet."""
RANK = 32

# M, N, K-segments; how often a step of FLUX.1-dev at 1024x1024 calls it; predicted ms in fp8.
GEMMS: list[tuple[int, int, tuple[int, ...], int, float]] = [
    (4096, 9216, (3072,), 19, 0.178),
    (4096, 3072, (3072,), 19, 0.061),
    (4096, 12288, (3072,), 19, 0.255),
    (4096, 3072, (12288,), 19, 0.227),
    (4608, 21504, (3072,), 38, 0.495),
    (4608, 3072, (3072, 12288), 38, 0.310),
    (512, 9216, (3072,), 19, 0.038),
]
_WIDE = (128, 256, 128)
_TMA = {"descriptors": True, "store_descriptors": True}
GEMM_CONFIGS: dict[str, GemmConfig | SpecializedConfig] = {
    "specialized s4": SpecializedConfig(),
    "specialized s4 g12": SpecializedConfig(group_m=12),
    "specialized s4 g18": SpecializedConfig(group_m=18),
    "specialized s4 g36": SpecializedConfig(group_m=36),
    "specialized s4 c32 b2": SpecializedConfig(chunk=32, buffers=2),
    "specialized s3 b4": SpecializedConfig(stages=3, buffers=4),
    "specialized s3 b4 g12": SpecializedConfig(stages=3, buffers=4, group_m=12),
    "specialized s3 b4 g36": SpecializedConfig(stages=3, buffers=4, group_m=36),
    "128x256x128 w8 s3 g16": GemmConfig(*_WIDE, 16, 8, 3, **_TMA),
    "128x256x128 w8 s3 g16 early": GemmConfig(*_WIDE, 16, 8, 3, **_TMA, early=True),
    "128x256x128 w8 s3 g32 early": GemmConfig(*_WIDE, 32, 8, 3, **_TMA, early=True),
    "128x256x128 w8 s3 g16 early halves": GemmConfig(*_WIDE, 16, 8, 3, **_TMA, early=True, halves=True),
    "128x256x128 w8 s4 g16 halves": GemmConfig(*_WIDE, 16, 8, 4, **_TMA, halves=True),
    "128x256x64 w8 s6 g16 early": GemmConfig(128, 256, 64, 16, 8, 6, **_TMA, early=True),
    "128x128x128 w8 s4 g16": GemmConfig(128, 128, 128, 16, 8, 4, **_TMA),
    "128x128x64 w4 s4 g16 2 programs early halves": GemmConfig(
        128, 128, 64, 16, 4, 4, **_TMA, programs=2, early=True, halves=True
    ),
    "128x128x64 w4 s5 g16 2 programs": GemmConfig(128, 128, 64, 16, 4, 5, **_TMA, programs=2, halves=True),
    "64x128x128 w4 s4 2 programs": GemmConfig(64, 128, 128, 8, 4, 4, **_TMA, programs=2),
    "64x128x128 w4 s3 3 programs": GemmConfig(64, 128, 128, 8, 4, 3, **_TMA, programs=3),
}
INT8_CONFIGS = (
    "128x256x128 w8 s3 g16",
    "128x256x128 w8 s3 g16 early",
    "128x256x128 w8 s4 g16 halves",
    "128x128x128 w8 s4 g16",
    "128x128x64 w4 s4 g16 2 programs early halves",
)
# M, K; predicted us.
# The predictions are those made after a first run, for the kernels as they are now.
PROLOGUES = [(4096, 3072, 24), (4608, 3072, 27), (4096, 12288, 76), (4608, 12288, 82), (512, 3072, 11)]
PROLOGUE_CONFIGS = [
    PrologueConfig(*c)
    for c in [(16, 256, 4, 3, True), (16, 256, 4, 4, True), (32, 256, 8, 3, True), (64, 256, 8, 3, True),
              (64, 128, 8, 3, True), (64, 128, 4, 4, True), (8, 512, 4, 3, True), (8, 256, 4, 4, True)]
]  # fmt: skip
WHOLE_ROWS_CONFIGS = [WholeRowsConfig(*c) for c in [(1, 1024, 4), (2, 1024, 8), (4, 1024, 16), (2, 2048, 16)]]
# Tokens of 24 heads of 128; predicted us of the whole operation in 8 bits.
ATTENTIONS = [(4096, 315), (4608, 383), (16896, 3600)]
# Weight, group, N, K; predicted us.
UNPACKS: list[tuple[str, int | None, int, int, float]] = [
    ("int4", 64, 3072, 3072, 8.5),
    ("int4", 64, 12288, 3072, 27),
    ("int4", 64, 21504, 3072, 45),
    ("int4", 64, 3072, 12288, 30),
    ("ternary", None, 3072, 3072, 7),
    ("ternary", None, 21504, 3072, 38),
]
FOLDS: list[tuple[int, int, float]] = [(3072, 3072, 9.5), (12288, 3072, 30), (21504, 3072, 52), (3072, 12288, 30)]
UNPACK_CONFIGS = [
    UnpackConfig(*c)
    for c in [(4, 1024, 4, 1), (4, 1024, 4, 3), (8, 1024, 4, 1), (2, 1024, 2, 1), (2, 1024, 2, 3), (8, 1024, 8, 3),
              (4, 2048, 8, 1), (2, 2048, 4, 1), (4, 512, 2, 1), (1, 1024, 1, 1), (1, 2048, 2, 1), (2, 1024, 1, 1)]
]  # fmt: skip
# Weight, group, M, N, K; predicted us.
SKINNIES: list[tuple[str, int | None, int, int, int, int]] = [
    ("int4", 64, 1, 18432, 3072, 15),
    ("int4", 64, 16, 18432, 3072, 17),
    ("int4", 64, 64, 18432, 3072, 30),
    ("int4", 64, 1, 9216, 3072, 9),
    ("int4", 64, 1, 3072, 3072, 6),
    ("ternary", None, 1, 18432, 3072, 8),
    ("ternary", None, 16, 18432, 3072, 10),
    ("ternary", None, 1, 9216, 3072, 6),
]
# N, K; predicted us of int4 g64 in 16 bits with a branch, smoothing and bias, for 1, 16 and 64 tokens, each launch
# included.
FEW: list[tuple[int, int, tuple[float, ...]]] = [
    (3072, 3072, (11, 13, 17)),
    (9216, 3072, (16, 19, 30)),
    (12288, 3072, (17, 20, 34)),
    (3072, 12288, (22, 26, 39)),
    (18432, 3072, (26, 31, 53)),
]
# N, K; predicted us of int4 g64 in fp8 with a branch, smoothing and bias, for 16, 64, 128 and 256 tokens.
FUSED: list[tuple[int, int, tuple[float, ...]]] = [
    (3072, 3072, (15, 16, 18, 22)),
    (12288, 3072, (25, 31, 38, 51)),
    (3072, 12288, (28, 34, 41, 53)),
]
_LEFT, _RIGHT = ({"weights_left": left, "descriptors": True} for left in (True, False))
# By bits and most tokens; only of as many as a tile takes, and not of half as many.
FUSED_CONFIGS: list[tuple[int, FusedUnpackConfig]] = [
    (8, FusedUnpackConfig(16, 64, 256, 4, 3, **_LEFT)),
    (8, FusedUnpackConfig(16, 64, 256, 4, 4, **_LEFT)),
    (8, FusedUnpackConfig(16, 128, 256, 4, 3, **_LEFT)),
    (8, FusedUnpackConfig(16, 128, 256, 8, 3, **_LEFT)),
    (8, FusedUnpackConfig(64, 64, 256, 4, 3, **_LEFT)),
    (8, FusedUnpackConfig(64, 64, 256, 4, 3, **_RIGHT)),
    (8, FusedUnpackConfig(64, 64, 256, 4, 2, **_RIGHT)),
    (8, FusedUnpackConfig(64, 64, 256, 4, 3, **_RIGHT, programs=3)),
    (8, FusedUnpackConfig(64, 128, 256, 4, 3, **_RIGHT)),
    (8, FusedUnpackConfig(128, 64, 256, 4, 3, **_LEFT)),
    (8, FusedUnpackConfig(128, 64, 128, 4, 3, **_LEFT)),
    (8, FusedUnpackConfig(128, 64, 128, 8, 3, **_RIGHT)),
    (8, FusedUnpackConfig(128, 128, 128, 4, 3, **_RIGHT)),
    (8, FusedUnpackConfig(256, 64, 128, 8, 3, **_RIGHT)),
    (8, FusedUnpackConfig(256, 64, 128, 4, 3, **_LEFT)),
    (8, FusedUnpackConfig(256, 64, 128, 8, 2, **_RIGHT)),
    (16, FusedUnpackConfig(16, 64, 256, 4, 3, **_LEFT)),
    (16, FusedUnpackConfig(16, 128, 128, 4, 4, **_LEFT)),
    (16, FusedUnpackConfig(64, 128, 128, 4, 3, **_LEFT)),
    (16, FusedUnpackConfig(64, 64, 128, 4, 3, **_LEFT)),
    (16, FusedUnpackConfig(128, 64, 128, 4, 3, **_LEFT)),
    (16, FusedUnpackConfig(128, 64, 64, 4, 3, **_LEFT)),
    (16, FusedUnpackConfig(256, 64, 128, 4, 3, **_LEFT)),
    (16, FusedUnpackConfig(256, 64, 64, 4, 3, **_LEFT)),
]
# M, K; predicted us.
PROJECTIONS = [(512, 3072, 4), (512, 12288, 7), (1024, 3072, 4), (1024, 12288, 12)]
SKINNY_CONFIGS = [
    SkinnyConfig(*c)
    for c in [(32, 128, 4, 4), (64, 128, 4, 4), (64, 128, 4, 6), (16, 128, 2, 6), (32, 128, 2, 6), (64, 128, 2, 6),
              (128, 128, 4, 4), (32, 128, 4, 8), (64, 64, 4, 6), (32, 64, 2, 8), (64, 128, 4, 10)]
]  # fmt: skip


def milliseconds(calls: list[Callable[[], Any]], replays: int = 20) -> tuple[float, float]:
    """Median time of one call, and the relative spread between the 20th and 80th percentile."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
    fifths = statistics.quantiles(times, n=5)
    return statistics.median(times), (fifths[3] - fifths[0]) / statistics.median(times)


def sets(bytes_each: float, least: int = 3) -> range:
    """As many sets of buffers as fill 256 MB."""
    return range(max(least, min(64, -(-(256 * 2**20) // int(bytes_each)))))


def weights(weight: str, group: int | None, n: int, segments: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    layout = KLayout(segments, group)
    fmt = formats.get(weight)
    codes = torch.randint(fmt.code_min, fmt.code_max + 1, (n, layout.padded_k), dtype=torch.int8, device="cuda")
    return (
        fmt.pack(codes),
        (torch.rand(n, layout.num_groups, device="cuda") * 0.02 + 0.01).to(BF16),
    )


def random8(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, device="cuda", dtype=BF16) * (100 if dtype == FP8 else 30)
    # Beyond its largest, e4m3 has no infinity: codes would be NaN.
    return values.clamp(-448, 448).to(dtype) if dtype == FP8 else values.round().clamp(-127, 127).to(dtype)


class Bench:
    """Collects rows, and keeps the record of a run as it grows; in a warming run only compiles this process's share."""

    def __init__(self, share: tuple[int, int] | None, record: dict[str, Any], file: Path | None) -> None:
        self.share, self.record, self.file = share, record, file
        self.count, self.rows = 0, record["rows"]

    def time(self, what: str, case: str, config: str, calls: list[Callable[[], Any]], **facts: Any) -> None:
        self.count += 1
        if self.share is not None:
            if self.count % self.share[1] == self.share[0]:
                attempt(calls[0])
            return
        try:
            ms, spread = milliseconds(calls)
            row = {"kernel": what, "case": case, "config": config, "ms": round(ms, 5), "spread": round(spread, 3)}
            row |= facts
        except Exception as error:
            row = {"kernel": what, "case": case, "config": config, "error": f"{type(error).__name__}: {error}"[:200]}
        self.rows.append(row)
        keep(self.record, self.file)

    def cases(self, every: list[Any], *different: int) -> list[Any]:
        """All cases, or those that between them need every compilation."""
        return every if self.share is None else [every[i] for i in different]

    def best(self, what: str, case: str) -> dict[str, Any] | None:
        rows = [r for r in self.rows if r["kernel"] == what and r["case"] == case and "ms" in r]
        return min(rows, key=lambda r: r["ms"]) if rows else None


def attempt(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        print(f"{type(error).__name__}: {error}"[:300], file=sys.stderr)


def gemms(bench: Bench) -> None:
    for m, n, segments, times, predicted in bench.cases(GEMMS, 0, 5):
        k, case = sum(segments), f"{m}x{n}x{'+'.join(map(str, segments))}"
        flop = 2 * m * n * k
        floor = {kind: flop / rate * 1e3 for kind, rate in RATES.items()}
        facts = {"times_a_step": times}
        x, w = torch.randn(m, k, device="cuda", dtype=BF16), torch.randn(n, k, device="cuda", dtype=BF16)
        low = torch.randn(m, RANK, device="cuda")
        up, bias = torch.randn(n, RANK, device="cuda", dtype=BF16), torch.randn(n, device="cuda", dtype=BF16)
        out = torch.empty(m, n, device="cuda", dtype=BF16)
        if bench.share is None:
            bench.time(
                "gemm bf16 cublas", case, "", [lambda x=x, w=w: F.linear(x, w)] * 3, floor=floor["bf16"], **facts
            )
        for kind, dtype in (("fp8", FP8), ("int8", torch.int8)):
            a, b = random8((m, k), dtype), random8((n, k), dtype)
            rows = torch.rand(len(segments), m, device="cuda")
            columns = torch.rand(len(segments), n, device="cuda")
            if kind == "fp8" and bench.share is None:

                def cublas(a: Any = a, b: Any = b, r: Any = rows[0][:, None], c: Any = columns[0][None, :]) -> None:
                    torch._scaled_mm(a, b.T, r, c, out_dtype=BF16, use_fast_accum=True)

                bench.time("gemm fp8 cublas rowwise", case, "", [cublas] * 3, floor=floor["fp8"], **facts)
            for name, config in GEMM_CONFIGS.items():
                if kind == "int8" and name not in INT8_CONFIGS:
                    continue

                def call(
                    a: Any = a, b: Any = b, rows: Any = rows, columns: Any = columns, config: Any = config
                ) -> None:
                    run = specialized_gemm if isinstance(config, SpecializedConfig) else gemm
                    shift = bias.view(1, -1) if run is specialized_gemm else bias  # noqa: B023
                    run(a, b, rows, columns, low, up, shift, out, segments[0], None, config)  # noqa: B023

                bench.time(f"gemm {kind}", case, name, [call] * 3, floor=floor[kind], predicted=predicted, **facts)


def prologues(bench: Bench) -> None:
    for m, k, predicted in bench.cases(PROLOGUES, 0):
        case = f"{m}x{k}"
        floor = 3 * m * k / BANDWIDTH * 1e3
        smooth = 1 / (torch.rand(k, device="cuda") + 0.5)
        down = torch.randn(RANK, k, device="cuda", dtype=BF16)
        data = [torch.randn(m, k, device="cuda", dtype=BF16) for _ in sets(3 * m * k)]
        codes = [torch.empty(m, k, device="cuda", dtype=FP8) for _ in data]
        scales, low = torch.empty(m, device="cuda"), torch.empty(m, RANK, device="cuda")
        for config in PROLOGUE_CONFIGS:
            for s in (smooth, None):
                calls = [
                    lambda x=x, c=c, s=s, config=config: quantize_rows(x, s, down, c, scales, low, config)  # noqa: B023
                    for x, c in zip(data, codes, strict=True)
                ]
                name = case if s is not None else case + " unsmoothed"
                bench.time("prologue", name, str(config), calls, floor=floor, predicted=predicted / 1e3)
        itself = smooth.to(BF16)
        for config in WHOLE_ROWS_CONFIGS:
            for kind, s, inverted in (("", smooth, None), (" unsmoothed", None, None), (" inverted", None, itself)):
                run = functools.partial(quantize_whole_rows, scales=scales, config=config, smooth=inverted)
                calls = [lambda x=x, c=c, s=s, run=run: run(x, s, c) for x, c in zip(data, codes, strict=True)]
                bench.time("whole rows", case + kind, str(config), calls, floor=floor, predicted=floor / 0.9)


def unpacks(bench: Bench) -> None:
    for weight, group, n, k, predicted in bench.cases(UNPACKS, 0, 4):
        case = f"{weight} g{group} {n}x{k}"
        packed, scale = weights(weight, group, n, (k,))
        size = packed.numel() + 2 * scale.numel() + n * k
        data = [(packed.clone(), scale.clone(), torch.empty(n, k, device="cuda", dtype=FP8)) for _ in sets(size)]
        columns = torch.empty(n, device="cuda")
        (segment,) = KLayout((k,), group)
        for config in UNPACK_CONFIGS:
            calls = [
                lambda p=p, s=s, o=o, config=config: unpack_segment(p, s, weight, segment, o, columns, config)  # noqa: B023
                for p, s, o in data
            ]
            bench.time("unpack", case, str(config), calls, floor=size / BANDWIDTH * 1e3, predicted=predicted / 1e3)


def folds(bench: Bench) -> None:
    """Weights unpacked with their branch, and the bounds that this takes, here in a launch of their own."""
    for n, k, predicted in bench.cases(FOLDS, 0):
        case = f"int4 g64 rank {RANK} {n}x{k}"
        factors = 2 * RANK * (n + k)
        size = n * k // 2 + 2 * n * k // 64 + factors + n * k
        data: list[tuple[Weight, Tensor, Tensor]] = []
        for _ in sets(size):
            packed, scale = weights("int4", 64, n, (k,))
            smooth = (torch.rand(k, device="cuda") + 0.5).to(BF16)
            down, up = (torch.randn(shape, device="cuda", dtype=BF16) * 0.05 for shape in ((RANK, k), (n, RANK)))
            column_scales, bounds = torch.empty(n, device="cuda"), torch.empty(bounds_of(n, RANK), device="cuda")
            weight = Weight(packed, scale, 64, smooth, down, up, column_scales, bounds)
            find_bounds(weight)
            out = torch.empty(n, k, device="cuda", dtype=FP8)
            words = words_of(packed, out)
            assert words is not None
            data.append((weight, words, out))
        kinds: dict[str, list[Callable[[], Any]]] = {
            "specialized": [lambda w=w, c=c, o=o: specialized_fold(w, c, o) for w, c, o in data],
            "plain": [lambda w=w, o=o: fold_branch(w, o) for w, _, o in data],
        }
        for config, calls in kinds.items():
            bench.time("fold", case, config, calls, floor=size / BANDWIDTH * 1e3, predicted=predicted / 1e3)
        floor = 2 * (n * k // 64 + RANK * k) / BANDWIDTH * 1e3
        bench.time("bounds", case, "", [lambda w=w: find_bounds(w) for w, *_ in data], floor=floor)


def skinnies(bench: Bench) -> None:
    for weight, group, m, n, k, predicted in bench.cases(SKINNIES, 0, 1, 2, 5, 6):
        case = f"{weight} g{group} M={m} {n}x{k}"
        packed, scale = weights(weight, group, n, (k,))
        size = packed.numel() + 2 * scale.numel()
        x = torch.randn(m, k, device="cuda", dtype=BF16)
        bias, out = torch.randn(n, device="cuda", dtype=BF16), torch.empty(m, n, device="cuda", dtype=BF16)
        (segment,) = KLayout((k,), group)
        if bench.share is None:
            dense = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in sets(2 * n * k)]
            calls: list[Any] = [lambda w=w: F.linear(x, w, bias) for w in dense]  # noqa: B023
            bench.time("skinny bf16 cublas", case, "", calls, floor=2 * n * k / BANDWIDTH * 1e3)
            del dense, calls
        data = [(packed.clone(), scale.clone()) for _ in sets(size)]
        for config in SKINNY_CONFIGS:
            calls = [
                lambda p=p, s=s, config=config: skinny_segment(
                    x, None, p, s, weight, segment, bias, out, config  # noqa: B023
                )
                for p, s in data
            ]  # fmt: skip
            bench.time("skinny", case, str(config), calls, floor=size / BANDWIDTH * 1e3, predicted=predicted / 1e3)


def few_tokens(bench: Bench) -> None:
    """Whole layers with few tokens, as the registry runs them."""
    for n, k, predicted in bench.cases(FEW, 0, 3):
        dense = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in sets(2 * n * k)]
        packed, scale = weights("int4", 64, n, (k,))
        size = packed.numel() + 2 * scale.numel() + 2 * RANK * (n + k)
        data = [(packed.clone(), scale.clone()) for _ in sets(size)]
        smooth = torch.rand(k, device="cuda").to(BF16) + 0.5
        down, up = torch.randn(RANK, k, device="cuda", dtype=BF16), torch.randn(n, RANK, device="cuda", dtype=BF16)
        bias = torch.randn(n, device="cuda", dtype=BF16)
        for m, us in zip((1, 16, 64), predicted, strict=True):
            x, case = torch.randn(m, k, device="cuda", dtype=BF16), f"int4 g64 rank {RANK} M={m} {n}x{k}"
            calls: list[Any] = [lambda w=w, x=x: F.linear(x, w, bias) for w in dense]  # noqa: B023
            bench.time("few tokens bf16 cublas", case, "", calls, floor=2 * n * k / BANDWIDTH * 1e3)
            run = linear.plan("a16", m)
            calls = [
                lambda p=p, s=s, x=x, run=run: run([x], p, s, smooth, down, up, bias, "int4", 64, "a16", ())  # noqa: B023
                for p, s in data
            ]
            bench.time("few tokens", case, "", calls, floor=size / BANDWIDTH * 1e3, predicted=us / 1e3)


def with_tiles(chosen: FusedUnpackConfig | None, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer's plan, whose weights are unpacked in the product with this configuration, or not so with None."""

    def call(*args: Any) -> Tensor:
        usual, configs.fused_unpack_for = configs.fused_unpack_for, lambda *_: chosen
        try:
            return run(*args)
        finally:
            configs.fused_unpack_for = usual

    return call


def fused(bench: Bench) -> None:
    """Whole layers whose weights are unpacked in the product, beside bf16 and what else would run."""
    for n, k, predicted in bench.cases(FUSED, 0, 1, 2):
        dense = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in sets(2 * n * k)]
        bias = torch.randn(n, device="cuda", dtype=BF16)
        branch = [
            torch.rand(k, device="cuda").to(BF16) + 0.5,
            torch.randn(RANK, k, device="cuda", dtype=BF16),
            torch.randn(n, RANK, device="cuda", dtype=BF16),
        ]
        for weight, group, parts in (("int4", 64, branch), ("ternary", None, [None] * 3)):
            packed, scale = weights(weight, group, n, (k,))
            size = packed.numel() + 2 * scale.numel()
            data = [(packed.clone(), scale.clone()) for _ in sets(size)]
            for m, us in zip((16, 64, 128, 256), predicted, strict=True):
                x, shape = torch.randn(m, k, device="cuda", dtype=BF16), f"M={m} {n}x{k}"
                if weight == "int4":
                    calls: list[Any] = [lambda w=w, x=x: F.linear(x, w, bias) for w in dense]  # noqa: B023
                    bench.time("fused bf16 cublas", shape, "", calls, floor=2 * n * k / BANDWIDTH * 1e3)
                beside = bench.best("fused bf16 cublas", shape)
                for bits, path in ((8, "a8-fp8"), (16, "a16")):
                    case = f"{weight} {path} {shape}"
                    if beside:
                        bench.rows.append({**beside, "case": case})
                    floor = max(size / BANDWIDTH, 2 * m * n * k / RATES["fp8" if bits == 8 else "bf16"]) * 1e3
                    guess = {"predicted": us / 1e3} if (weight, bits) == ("int4", 8) else {}
                    fits = [c for b, c in FUSED_CONFIGS if b == bits and max(16, m // 2) <= c.block_m <= m]
                    for chosen in (None, *fits):
                        run = FewTokens() if chosen or m <= 64 else linear.plan(path, 512)
                        call, rest = with_tiles(chosen, run), (*parts, bias, weight, group, path, ())
                        calls = [functools.partial(call, [x], p, s, *rest) for p, s in data]
                        if chosen:
                            bench.time("fused", case, str(chosen), calls, floor=floor, **guess)
                        else:
                            bench.time("not fused", case, "", calls, floor=floor)


def projections(bench: Bench) -> None:
    for m, k, predicted in bench.cases(PROJECTIONS, 0, 1):
        down = torch.randn(RANK, k, device="cuda", dtype=BF16)
        data = [torch.randn(m, k, device="cuda", dtype=BF16) for _ in sets(2 * m * k)]
        low = torch.empty(parts_of(k), m, RANK, device="cuda")
        floor = (2 * k * (m + RANK) + low.nbytes) / BANDWIDTH * 1e3
        calls = [lambda x=x: project(x, down, low) for x in data]  # noqa: B023
        bench.time("projection", f"{m}x{k}", "", calls, floor=floor, predicted=predicted / 1e3)


def all_heads(bench: Bench) -> None:
    """Queries and keys normalized and rotated: 24 heads of 128."""
    shape, weight = (1, 4608, 24, 128), torch.ones(128, device="cuda", dtype=BF16)
    cos, sin = torch.rand(4608, 128, device="cuda"), torch.rand(4608, 128, device="cuda")
    data = [[torch.randn(shape, device="cuda", dtype=BF16) for _ in range(2)] for _ in range(4)]
    floor = (8 * data[0][0].numel() + cos.nbytes + sin.nbytes) / BANDWIDTH * 1e3
    calls = [lambda q=q, k=k: rotary_heads([q], [k], [weight], [weight], 1e-6, cos, sin) for q, k in data]
    bench.time("heads", "24x4608x128", "", calls, floor=floor, predicted=0.042)


def attentions(bench: Bench) -> None:
    """Attention in 8 bits, rounding included, beside torch's in bf16; needs cuDNN's frontend."""
    for tokens, predicted in bench.cases(ATTENTIONS, 1):
        case, rounding = f"24x{tokens}x128", 24 * tokens * 128 * (2 * 3 + 3 + 3) / BANDWIDTH
        operations = 4 * 24 * tokens**2 * 128
        data = [[torch.randn(1, tokens, 24, 128, device="cuda", dtype=BF16) for _ in range(3)] for _ in range(3)]
        heads_first = [[x.transpose(1, 2) for x in one] for one in data]
        facts = {"predicted": predicted / 1e3}
        for kernel, calls, floor in (
            ("attention fp8", [lambda d=d: attention_8bit(*d) for d in data], operations / RATES["fp8"] + rounding),
            (
                "attention bf16",
                [lambda d=d: F.scaled_dot_product_attention(*d) for d in heads_first],
                operations / RATES["bf16"],
            ),
        ):
            bench.time(kernel, case, "as it comes", calls, floor=floor * 1e3, **facts)


def whole_layers(bench: Bench) -> None:
    """The layer as the registry runs it, with its own configurations, against a bf16 layer; and its error."""
    for m, n, segments, times, _ in bench.cases(GEMMS, 0, 5):
        case = f"{m}x{n}x{'+'.join(map(str, segments))}"
        k = sum(segments)
        layer = {
            "smooth": torch.rand(k, device="cuda").to(BF16) + 0.5,
            "down": (torch.randn(RANK, k, device="cuda") / k**0.5).to(BF16),
            "up": torch.randn(n, RANK, device="cuda", dtype=BF16),
        }
        bias = torch.randn(n, device="cuda", dtype=BF16)
        inputs = [torch.randn(m, length, device="cuda", dtype=BF16) for length in segments]
        for weight, group in (("int4", 64), ("ternary", None)):
            codes, scales = weights(weight, group, n, segments)
            branch = list(layer.values()) if weight == "int4" else [None] * 3
            for path in ("a8-fp8", "a8-int8", "a4"):
                args = (inputs, codes, scales, *branch, bias, weight, group, path, ())
                run = linear.plan(path, m)
                call: Any = lambda args=args, run=run: run(*args)  # noqa: E731
                error: dict[str, Any] = {}
                if bench.share is None:
                    want = reference.few_bit_linear(*args).float()
                    error["error"] = ((call().float() - want).norm() / want.norm()).item()
                bench.time("layer", case, f"{weight} {path}", [call] * 3, times_a_step=times, **error)


PARTS: dict[str, Callable[[Bench], None]] = {
    "gemm": gemms, "prologue": prologues, "unpack": unpacks, "fold": folds, "skinny": skinnies, "few": few_tokens,
    "fused": fused, "projection": projections, "heads": all_heads, "attention": attentions, "layer": whole_layers,
}  # fmt: skip
"""What `--only` names; attention needs cuDNN's frontend."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--share", type=int, nargs=2, help="compile every n-th variant, beginning with the i-th")
    args = parser.parse_args()
    torch.manual_seed(0)
    # The error is held against a float32 reference, not tf32.
    torch.backends.cuda.matmul.allow_tf32 = False
    record: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bandwidth_of_floors": BANDWIDTH,
        "rows": [],
    }
    bench = Bench(tuple(args.share) if args.share else None, record, args.json)
    for name in args.only:
        PARTS[name](bench)
        torch.cuda.empty_cache()
    if args.share:
        return
    for what, case in dict.fromkeys((r["kernel"], r["case"]) for r in bench.rows if r["kernel"] != "layer"):
        best = bench.best(what, case)
        if best is None:
            print(f"{what:24} {case:28} nothing ran")
            continue
        floor = best["floor"]
        print(
            f"{what:24} {case:28} {best['ms']:8.4f} ms, floor {floor:7.4f}, {floor / best['ms']:4.0%}  {best['config']}"
        )
    for row in bench.rows:
        if "error" in row and "ms" not in row:
            print(row)
        elif row["kernel"] == "layer":
            print(f"layer {row['case']:28} {row['config']:20} {row['ms']:8.4f} ms, error {row['error']:.2e}")


if __name__ == "__main__":
    main()
