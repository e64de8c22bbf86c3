"""Every layer of FLUX.1 with every number of tokens, few-bit beside bf16: where few bits would be slower.

    python benchmarks/every_layer.py --json benchmarks/results/every_layer_h100.json
    python benchmarks/every_layer.py --device cpu --mini
    python benchmarks/every_layer.py --table benchmarks/results/every_layer_h100.json

A call is the whole operation, activations to codes and unpacking included, as the registry chooses it. Weights and
inputs are random. On a GPU several calls, each with a weight of its own (together 256 MB, so that no cache flatters),
are replayed as one CUDA graph; the time is the median of the replays. bf16 is `F.linear`, whose concatenated input lies
there already. Rows are kept as they are finished.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cpu import WEIGHTS, random_tensors
from kernels import milliseconds, sets
from quality import commit, keep
from torch import Tensor
from torch.nn import functional as F

from bittern import formats, ops
from bittern.errors import UserError
from bittern.evaluation.cost.benchmark import place
from bittern.pipelines import check_device

BF16 = torch.bfloat16
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 4096, 4608, 16896)
# Outputs, inputs by segment.
LAYERS: dict[str, tuple[int, tuple[int, ...]]] = {
    "out": (3072, (3072,)),
    "qkv": (9216, (3072,)),
    "up": (12288, (3072,)),
    "down": (3072, (12288,)),
    "adaLN": (18432, (3072,)),
    "qkv and up": (21504, (3072,)),
    "out and down": (3072, (3072, 12288)),
}
MINI = 48


def median_ms(calls: Sequence[Callable[[], Any]], device: str) -> tuple[float, float]:
    """Median milliseconds of a call, and their spread between the 20th and the 80th percentile, relative."""
    if device != "cpu":
        return milliseconds(list(calls))
    times: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        for call in calls:
            call()
        times.append(1e3 * (time.perf_counter() - began) / len(calls))
    fifths = statistics.quantiles(times, n=5)
    return statistics.median(times), (fifths[3] - fifths[0]) / statistics.median(times)


@torch.inference_mode()
def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each layer, number of tokens, weight and path."""
    shrink = MINI if args.mini else 1
    paths = ("a8-int8", "a16") if args.device == "cpu" else ("a8-fp8", "a16")
    for name, (n, segments) in LAYERS.items():
        n, segments = n // shrink, tuple(length // shrink for length in segments)
        k = sum(segments)
        dense = [torch.randn(n, k, device=args.device, dtype=BF16) for _ in sets(2 * n * k)]
        bias = torch.randn(n, device=args.device, dtype=BF16)
        layers = {
            weight: [
                {**random_tensors(weight, n, segments, args.device), "bias": bias}
                for _ in sets(n * k // formats.get(weight).codes_per_byte)
            ]
            for weight in WEIGHTS
        }
        for m in args.tokens:
            inputs = [torch.randn(m, length, device=args.device, dtype=BF16) for length in segments]
            joined = torch.cat(inputs, dim=1)
            # Outputs of many tokens fill the caches by themselves, and memory.
            least = 3 if m > 1024 else 64
            ms, spread = median_ms([lambda w=w: F.linear(joined, w, bias) for w in dense[:least]], args.device)  # noqa: B023
            about = {"layer": name, "n": n, "k": list(segments), "m": m}
            yield {**about, "call": "bf16", "ms": round(ms, 5), "spread": round(spread, 3)}
            for weight, path in ((weight, path) for weight in WEIGHTS for path in paths):

                def call(tensors: dict[str, Any], path: str = path, inputs: list[Tensor] = inputs) -> Tensor:
                    return ops.few_bit_linear(inputs, path=path, **tensors)

                calls = [lambda t=t, call=call: call(t) for t in layers[weight][:least]]
                mine, spread = median_ms(calls, args.device)
                yield {
                    **about, "call": f"{weight} {path}", "ms": round(mine, 5), "spread": round(spread, 3),
                    "times_faster": round(ms / mine, 3),
                }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Times as fast as bf16, a column for each number of tokens; what is slower stands in bold."""
    rows = [row for row in record["rows"] if "times_faster" in row]
    tokens = sorted({row["m"] for row in rows})
    lines = [
        "| layer | weights and path | " + " | ".join(f"{m:,}" for m in tokens) + " |",
        "|---|---|" + "---|" * len(tokens),
    ]
    for layer, call in dict.fromkeys((row["layer"], row["call"]) for row in rows):
        found = {row["m"]: row["times_faster"] for row in rows if (row["layer"], row["call"]) == (layer, call)}
        told = ("" if m not in found else f"{found[m]:.2f}" if found[m] >= 1 else f"**{found[m]:.2f}**" for m in tokens)
        lines.append(f"| {layer} | {call} | {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="print the Markdown table of a finished run and stop")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--mini", action="store_true", help=f"layers {MINI} times narrower, to try the command")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    try:
        check_device(args.device)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "commit": commit(), "mini": args.mini, **place(args.device),
        "what": "layers", "rows": [],
    }  # fmt: skip
    for row in measure(args):
        record["rows"].append(row)
        keep(record, args.json)
    print(table(record))


if __name__ == "__main__":
    main()
