"""What a few-bit layer costs on a CPU, beside the same layer in float32 and bf16.

    OMP_NUM_THREADS=1 python benchmarks/cpu.py --json benchmarks/results/cpu.json

All variants of a case run by turns in one process, so that whatever else the machine does meets all of them; times are
the least of the repeats, medians stand beside them. One thread's are its own time, which does not run while others have
the core; several threads' are the clock's. Weights and inputs are random. Errors are those of the outputs
against the reference of the same path with float32 inputs, relative to its norm.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality import commit, keep
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from bittern import formats, ops
from bittern.evaluation.drawing import device_name, versions
from bittern.formats import KLayout
from bittern.ops import cpu

WEIGHTS: dict[str, tuple[int | None, int]] = {"int4": (64, 32), "ternary": (None, 0)}
"""Group and rank."""
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PATHS = ("a8-int8", "a16")
# N, K, tokens, whether the reference is timed, too.
CASES: list[tuple[int, int, int, bool]] = [
    *((3072, 3072, m, True) for m in (1, 64, 1024)),
    *((12288, 3072, m, False) for m in (1, 64)),
    *((3072, 12288, m, False) for m in (1, 64)),
    (18432, 3072, 1, False),
    *((width, width, 64, True) for width in (64, 256, 768, 1152)),
    (12288, 3072, 1024, False),
]
_BUDGET_S = 0.5
_LEAST_REPEATS = 5


def random_tensors(weight: str, n: int, segments: tuple[int, ...], device: str = "cpu") -> dict[str, Any]:
    """The arguments of the operation, without inputs, path and bias."""
    group, rank = WEIGHTS[weight]
    k, fmt, layout = sum(segments), formats.get(weight), KLayout(segments, group)
    low, high = fmt.code_min, fmt.code_max + 1
    codes = torch.randint(low, high, (n, layout.padded_k), dtype=torch.int8, device=device)
    return {
        "codes": fmt.pack(codes),
        "scales": (torch.rand(n, layout.num_groups, device=device) * 0.02 + 0.001).bfloat16(),
        "smooth": (torch.rand(k, device=device) + 0.25).bfloat16() if rank else None,
        "down": (torch.randn(rank, k, device=device) / k**0.5).bfloat16() if rank else None,
        "up": (torch.randn(n, rank, device=device) / rank**0.5).bfloat16() if rank else None,
        "weight": weight,
        "group_size": group,
    }


def by_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Least and median milliseconds of each call."""
    threads = torch.get_num_threads()
    clock = time.thread_time if threads == 1 else time.perf_counter
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=threads, timer=clock) for name, call in calls.items()
    }
    for timer in timers.values():
        timer.timeit(1)
    one = sum(timer.timeit(1).mean for timer in timers.values())
    repeats = max(_LEAST_REPEATS, min(200, int(_BUDGET_S / one)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).mean * 1e3)
    return {name: (min(values), statistics.median(values)) for name, values in times.items()}


def measure(n: int, k: int, m: int, reference: bool) -> list[dict[str, Any]]:
    dense, x, bias = torch.randn(n, k), torch.randn(m, k), torch.randn(n)
    rows: list[dict[str, Any]] = []
    for weight in WEIGHTS:
        tensors = random_tensors(weight, n, (k,))
        calls: dict[str, Callable[[], Any]] = {}
        errors: dict[str, float] = {}

        def run(backend: str, path: str, x: Tensor, bias: Tensor, tensors: dict[str, Any] = tensors) -> Tensor:
            with ops.use_backend(backend):
                return ops.few_bit_linear([x], path=path, bias=bias, **tensors)

        wanted = {path: run("torch", path, x, bias) for path in PATHS}
        for name, dtype in DTYPES.items():
            given, w, b = x.to(dtype), dense.to(dtype), bias.to(dtype)
            calls[f"dense {name}"] = lambda given=given, w=w, b=b: F.linear(given, w, b)
            for path in PATHS:
                for backend in ("cpu", "torch") if reference else ("cpu",):
                    key = f"{backend} {path} {name}"
                    errors[key] = float(
                        (run(backend, path, given, b).float() - wanted[path]).norm() / wanted[path].norm()
                    )
                    calls[key] = lambda backend=backend, path=path, given=given, b=b, run=run: run(
                        backend, path, given, b
                    )
        times = by_turns(calls)
        for key, (least, median) in times.items():
            row = {"weight": weight, "n": n, "k": k, "m": m, "call": key, "ms": least, "ms_median": median}
            if key in errors:
                of = times[f"dense {key.split()[-1]}"]
                row |= {"ratio": least / of[0], "ratio_of_medians": median / of[1], "error": errors[key]}
            rows.append({name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()})
            if key in errors:
                print(f"{weight:8}{n:6} x{k:6} M={m:5} {key:24}{least:9.2f} ms {row['ratio']:6.2f} x dense", flush=True)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--mini", action="store_true", help="one toy's case, which shows that the command works")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    result = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": device_name("cpu"),
        "instructions": {"int8": cpu.multiplies_integers(), "bf16": cpu.multiplies_bf16()},
        "versions": versions(),
        "commit": commit(),
        "rows": rows,
    }
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"{threads} threads")
        for case in [(768, 768, 3, True)] if args.mini else CASES:
            rows += [{"threads": threads, **row} for row in measure(*case)]
            keep(result, args.json)


if __name__ == "__main__":
    main()
