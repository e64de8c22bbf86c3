"""Writes docs/performance_table.md from the measurements of kernels.py, `bittern benchmark` and the other scripts.

python benchmarks/performance_table.py benchmarks/results/*_h?00.json > docs/performance_table.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import every_layer
import lora_speed
import peers_speed

from bittern.evaluation.drawing import path_name

Row = dict[str, Any]
LIBRARY = {
    "gemm fp8": "gemm fp8 cublas rowwise",
    "gemm int8": "gemm bf16 cublas",
    "skinny": "skinny bf16 cublas",
    "few tokens": "few tokens bf16 cublas",
    "fused": "fused bf16 cublas",
    "not fused": "fused bf16 cublas",
    "attention fp8": "attention bf16",
}
"""What a kernel is compared with."""


def kernels(result: dict[str, Any]) -> Iterator[str]:
    for run in result["runs"]:
        yield f"{run['device']}, torch {run['torch']}, Triton {run['triton']}, commit {run['commit']}. {run['note']}\n"
        yield "| kernel | case | ms | predicted | floor | of the floor's speed | library | of its speed |"
        yield "|---|---|---|---|---|---|---|---|"
        best: dict[tuple[str, str], Row] = {}
        for row in run["rows"]:
            key = row["kernel"], row["case"]
            if "ms" in row and (key not in best or row["ms"] < best[key]["ms"]):
                best[key] = row
        for (kernel, case), row in best.items():
            if "cublas" in kernel or kernel in ("layer", "attention bf16"):
                continue
            library = best.get((LIBRARY.get(kernel, ""), case))
            versus = f"{library['ms']:.4f} | {library['ms'] / row['ms']:.2f}" if library else "|"
            # The GEMM's predictions were made for fp8.
            predicted = f"{row['predicted']:.4f}" if "predicted" in row and kernel != "gemm int8" else ""
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
        f"torch {versions['torch']}, Triton {versions['triton']}, {_made(result)}\n"
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


def hosts(result: dict[str, Any]) -> Iterator[str]:
    """What host.py prints."""
    yield f"`{result['command']}`: {result['device']}, {_made(result)}\n"
    yield "| what the host issues | us |"
    yield "|---|---|"
    for row in result["rows"]:
        yield f"| {row['case']} | {row['us']:.0f} |"
    yield ""


def costs(result: dict[str, Any]) -> Iterator[str]:
    """What full_size.py prints."""
    yield f"`{result['command']}`: {result['environment']['device']}, {_made(result)}\n"
    whole = result.get("extrapolated", {})
    yield "| quantizing FLUX.1-dev's transformer | seconds |"
    yield "|---|---|"
    for what, seconds in whole.items():
        yield f"| {what} | {seconds:g} |"
    if not whole:
        solving = {what: s for what, s in result["phases"].items() if what.startswith("solving")}
        rest = {what: s for what, s in result["phases"].items() if what not in solving}
        for what, seconds in {**rest, f"solving {len(solving)} blocks": round(sum(solving.values()), 1)}.items():
            yield f"| {what} | {seconds:g} |"
        yield f"| all, from disk to disk | {result['seconds']:g} |"
    yield ""
    yield (
        f"Peaks: {result['device_peak_reserved_gib']} GiB on the GPU, {result['host_peak_gib']} GiB on the host "
        f"({result['host_peak_without_files_gib']} GiB without mapped files).\n"
    )


def _made(result: dict[str, Any]) -> str:
    """By which commit and in which circumstances, as far as the file tells; both are written into it by hand."""
    return f"commit {result.get('commit', 'unknown')}. {result.get('note', '')}".rstrip()


def lines(result: dict[str, Any]) -> Iterator[str]:
    """A result's tables, by what made it."""
    if "targets" in result:
        about = f"`{result['command']}`: {result['device']}, rank {result['rank']} on {result['targets']} layers"
        return iter([f"{about}, {_made(result)}\n", lora_speed.table(result), ""])
    if result.get("what") == "layers":
        about = f"`{result['command']}`: {result['device']}, {_made(result)} Times as fast as bf16, by tokens"
        return iter([f"{about}\n", every_layer.table(result), ""])
    if "peers" in result:
        return iter([peers_speed.table(result), ""])
    if "ratios" in result:
        return benchmarks(result)
    if "phases" in result:
        return costs(result)
    return kernels(result) if isinstance(result.get("runs"), list) else hosts(result)


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        for line in lines(json.loads(path.read_text())):
            print(line)


if __name__ == "__main__":
    main()
