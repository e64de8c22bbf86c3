"""Writes docs/performance_table.md from the measurements of kernels.py, `bittern benchmark` and peers_speed.py.

python benchmarks/performance_table.py benchmarks/results/*_h100.json > docs/performance_table.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers_speed

from bittern.evaluation.drawing import path_name

Row = dict[str, Any]
LIBRARY = {
    "gemm fp8": "gemm fp8 cublas rowwise",
    "gemm int8": "gemm bf16 cublas",
    "skinny": "skinny bf16 cublas",
}
"""What a kernel is compared with."""


def kernels(result: dict[str, Any]) -> Iterator[str]:
    for run in result["runs"]:
        yield f"{run['device']}, torch {run['torch']}, Triton {run['triton']}, commit {run['commit']}. {run['note']}\n"
        yield "| kernel | case | ms | predicted | floor | of the floor's speed | cuBLAS | of its speed |"
        yield "|---|---|---|---|---|---|---|---|"
        best: dict[tuple[str, str], Row] = {}
        for row in run["rows"]:
            key = row["kernel"], row["case"]
            if "ms" in row and (key not in best or row["ms"] < best[key]["ms"]):
                best[key] = row
        for (kernel, case), row in best.items():
            if "cublas" in kernel or kernel == "layer":
                continue
            library = best.get((LIBRARY.get(kernel, ""), case))
            versus = f"{library['ms']:.4f} | {library['ms'] / row['ms']:.2f}" if library else "|"
            # The GEMM's predictions were made for fp8.
            predicted = "" if kernel == "gemm int8" else f"{row['predicted']:.4f}"
            yield (
                f"| {kernel} | {case} | {row['ms']:.4f} | {predicted} | {row['floor']:.4f} "
                f"| {row['floor'] / row['ms']:.2f} | {versus} |"
            )
        yield ""


def benchmarks(result: dict[str, Any]) -> Iterator[str]:
    """What `bittern benchmark --json` prints."""
    versions = result["versions"]
    yield (
        f"`{result['command']}`: {result['size']}x{result['size']}, batch {result['batch']}, {result['device']}, "
        f"torch {versions['torch']}, Triton {versions['triton']}, bittern {versions['bittern']}.\n"
    )
    yield "| transformer | run | path | ms a step | spread | times faster than 16 bit | weights GiB | above them GiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in result["rows"]:
        found = result["ratios"].get(row["model"], {}).get(row["mode"])
        told = "" if found is None else found["ratio"] or f"not told ({found['low']} to {found['high']})"
        peak = row["peak_above_resident_gib"]
        yield (
            f"| {row['model']} | {row['mode']} | {path_name(row['paths'], row['dtype'])} | {row['ms']:.2f} "
            f"| {100 * row['spread']:.1f} % | {told} | {row['resident_gib']:.2f} "
            f"| {'' if peak is None else f'{peak:.2f}'} |"
        )
    yield ""


def steps(result: dict[str, Any]) -> Iterator[str]:
    """What was measured before there was `bittern benchmark`: one run each, so no ratios."""
    yield f"{result['device']}, torch {result['torch']}, Triton {result['triton']}, commit {result['commit']}.\n"
    launched = "compiled blocks" if result["rows"][0]["compiled"] else "eager"
    yield f"| transformer | ms, {launched} | ms, CUDA graph | weights GiB | peak above them GiB |"
    yield "|---|---|---|---|---|"
    for row in result["rows"]:
        yield (
            f"| {row['model']} | {row['ms']} | {row['graph_ms']} | {row['resident_gib']:.2f} "
            f"| {row['peak_above_resident_gib']:.2f} |"
        )
    yield ""


def lines(result: dict[str, Any]) -> Iterator[str]:
    """A result's tables, by what made it."""
    if "peers" in result:
        return iter([peers_speed.table(result), ""])
    if "ratios" in result:
        return benchmarks(result)
    return kernels(result) if isinstance(result.get("runs"), list) else steps(result)


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        for line in lines(json.loads(path.read_text())):
            print(line)


if __name__ == "__main__":
    main()
