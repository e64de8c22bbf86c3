"""What a LoRA costs a step: none, loaded by peft, fused, in few bits and in 16, at FLUX.1-dev's shape.

    python benchmarks/lora_speed.py --compile --graph --json benchmarks/results/lora_speed_h100.json
    python benchmarks/lora_speed.py --mini --device cpu

Weights, codes and the adapter on all layers of our plan are random; they tell speed alone. Rows are timed as `bittern
benchmark` times them, and each is compared with the same model without the LoRA. Another strength is timed on the fused
model, compiled if `--compile` is given, and what it makes the compiler do is counted.
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
from peft import LoraConfig
from quality import commit, keep
from torch import nn

import bittern
from bittern import recipes
from bittern.architectures import plan
from bittern.errors import UserError
from bittern.evaluation.cost import models, random_weights
from bittern.evaluation.cost.benchmark import How, Row, add_kernels, compile_blocks, measure, place
from bittern.evaluation.cost.inputs import inputs
from bittern.evaluation.cost.timing import Ratio
from bittern.pipelines import check_device

ADAPTER = "default"
STRENGTHS = (0.5, -1.0, 0.0, 1.0)


def wearing(model: Any, targets: list[str], rank: int) -> nn.Module:
    """The model with a random adapter of a rank on every target, loaded by peft."""
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data, dtype=torch.bfloat16) * 0.01
    return model.requires_grad_(False)


def fused(model: nn.Module) -> nn.Module:
    bittern.fuse_loras(model)
    return model


def run(args: argparse.Namespace) -> Row:
    """Every model's rows, kept as they are finished.

    Raises:
        UserError: for a rank below 1, or a device that is not there.
    """
    if args.rank < 1:
        raise UserError(f"--rank {args.rank}: expected 1 or more")
    check_device(args.device)
    what = models.subject("flux.1-dev", mini=args.mini)
    how = How(
        size=args.size or what.size, steps=args.steps, runs=args.runs, compile=args.compile, graph=args.graph,
        profile=args.profile, device=args.device, compiler=args.compiler,
    )  # fmt: skip
    how.check()
    whole = random_weights.skeleton(what, torch.bfloat16)
    targets = [path for job in plan(whole, recipes.load(args.recipe)).jobs for path in job.paths]
    record: Row = {
        "command": " ".join(["python", *sys.argv]), "commit": commit(), "model": what.name, "mini": args.mini,
        "size": how.size, "recipe": args.recipe, "rank": args.rank, "targets": len(targets), **place(how.device),
        "rows": {},
    }  # fmt: skip

    def dense() -> nn.Module:
        return random_weights.dense(what, how.device, torch.bfloat16)

    def few() -> nn.Module:
        return random_weights.few_bit(what, args.recipe, how.device, torch.bfloat16)

    sides: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
        "16 bit": (dense, None),
        "16 bit, loaded": (lambda: wearing(dense(), targets, args.rank), "16 bit"),
        args.recipe: (few, None),
        f"{args.recipe}, loaded": (lambda: wearing(few(), targets, args.rank), args.recipe),
        f"{args.recipe}, fused": (lambda: fused(wearing(few(), targets, args.rank)), args.recipe),
    }

    def called_with(model: nn.Module) -> dict[str, Any]:
        return inputs(model, what, how.size or what.size, how.batch, how.device, torch.bfloat16)

    rows: dict[str, Row] = record["rows"]
    for name, (build, base) in sides.items():
        if args.only not in name:
            continue
        for row in measure(name, build, called_with, how):
            against = rows.get(f"{base} [{row['mode']}]")
            if against is not None:
                row |= {"times_slower": Ratio.of(row["ms_runs"], against["ms_runs"]).to_dict()}
            rows[f"{name} [{row['mode']}]"] = row
            keep(record, args.json)
            print({key: value for key, value in row.items() if key != "kernels"}, file=sys.stderr, flush=True)
    if how.profile:
        add_kernels(rows.values(), {name: build for name, (build, _) in sides.items()}, called_with, how)
    record["another_strength"] = another_strength(fused(wearing(few(), targets, args.rank)), called_with, how)
    keep(record, args.json)
    return record


@torch.no_grad()
def another_strength(model: Any, called_with: Callable[[nn.Module], dict[str, Any]], how: How) -> Row:
    """Milliseconds to change a fused adapter's strength, and how many graphs that makes the compiler make."""
    from torch._dynamo.utils import counters

    if how.compile:
        compile_blocks(model, how.compiler, fullgraph=how.fullgraph)
    x = called_with(model)
    model(**x)
    wait = torch.cuda.synchronize if torch.device(how.device).type == "cuda" else lambda: None
    made, times = counters["stats"]["unique_graphs"], list[float]()
    for strength in STRENGTHS:
        wait()
        began = time.perf_counter()
        bittern.set_lora_strengths(model, {ADAPTER: strength})
        wait()
        times.append(1e3 * (time.perf_counter() - began))
        model(**x)
    return {
        "ms": round(statistics.median(times), 2), "ms_each": [round(ms, 2) for ms in times],
        "graphs_made": counters["stats"]["unique_graphs"] - made, "compiled": how.compile,
    }  # fmt: skip


def table(record: Row) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | run | ms a step | spread | against the same without | weights GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"].values():
        slower = row.get("times_slower")
        told = ""
        if slower is not None:
            change = f"{100 * (slower['ratio'] - 1):+.1f} %" if slower["ratio"] else "no difference told"
            told = f"{change} ({100 * (slower['low'] - 1):+.1f} to {100 * (slower['high'] - 1):+.1f})"
        lines.append(
            f"| {row['model']} | {row['mode']} | {row['ms']:.2f} | {100 * row['spread']:.1f} % | {told} "
            f"| {row['resident_gib']:.2f} |"
        )
    # Not there where a run was cut short.
    if other := record.get("another_strength"):
        lines += ["", f"Another strength: {other['ms']:g} ms, {other['graphs_made']} graphs made."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="svdquant-fast")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--only", default="", help="rows whose model's name contains this")
    parser.add_argument("--size", type=int, default=None, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--mini", action="store_true", help="a toy's width, to try the command")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        record = run(args)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    print(table(record))


if __name__ == "__main__":
    main()
