"""Writes docs/performance_table.md from the measurements of kernels.py and step.py.

python benchmarks/performance_table.py benchmarks/results/*_h100.json > docs/performance_table.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def steps(result: dict[str, Any]) -> Iterator[str]:
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


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        result = json.loads(path.read_text())
        for line in kernels(result) if "runs" in result else steps(result):
            print(line)


if __name__ == "__main__":
    main()
