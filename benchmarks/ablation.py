"""What each stage of calibrated SVDQuant is worth on a small model: one table, the same noise in every row.

    python benchmarks/ablation.py --out benchmarks/results/ablation_tiny_flux.json
    python benchmarks/ablation.py --table benchmarks/results/ablation_tiny_flux.json

The pipeline is calibrated once, on its own prompts; every row is solved from that, drawn on the a4 path from held-out
prompts, and compared with the 16-bit pictures: PSNR, and the relative error of the velocity along the 16-bit
trajectory of twelve prompts. Finished rows are kept in the JSON file, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality import Trajectory, environment, gain_over, keep
from torch import nn

from bittern import pipelines, recipes
from bittern.architectures import plan
from bittern.evaluation import scenes
from bittern.evaluation.fidelity import fidelity
from bittern.evaluation.generate import generate
from bittern.evaluation.stats import mean_estimate
from bittern.layers import set_path
from bittern.quantization import Calibration, calibrate, solve_job, swap
from bittern.recipes import Recipe

BASELINE = "W4A4 abs-max"
PLAIN: dict[str, Any] = {
    "smoothing": "none", "branch": "weights", "rounding": "nearest", "sensitivity": False, "rounds": 0,
}  # fmt: skip
ROUNDED = {"rounding": "nearest", "scales": "absmax"}


def rows() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Names of the rows, with what they change in `svdquant`: the layers inside blocks, and the adaLN linears.

    Rows without GPTQ round the adaLN linears to the nearest code, too.
    """
    nearest = {"rounding": "nearest"}
    bare = PLAIN | {"scales": "absmax", "rank": 0, "shift": 0.0}
    grid = PLAIN | {"smoothing": "grid"}
    out: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        BASELINE: (bare, ROUNDED),
        "svdquant rank 32": ({}, {}),
    }
    for rank in (16, "1/96"):
        out[f"svdquant rank {rank}"] = ({"rank": rank}, {})
    return out | {
        "svdquant rank 32, one refit": ({"refits": 1}, {}),
        "searched scales and shift only": (PLAIN | {"rank": 0}, nearest),
        "... and smoothing": (grid | {"rank": 0}, nearest),
        "... and rank 32": (PLAIN, nearest),
        "... and both": (grid, nearest),
        "both, GPTQ": (grid | {"rounding": "gptq"}, {}),
        "both, GPTQ, output-weighted branch": (grid | {"rounding": "gptq", "branch": "outputs"}, {}),
        "all but descent": ({"smoothing": "grid"}, {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the Markdown table of a finished run and stop")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    print(table(run(args)))


def run(args: argparse.Namespace) -> dict[str, Any]:
    pipe = pipelines.load(args.model, dtype=args.dtype, device=args.device)
    texts = [prompt.prompt for prompt in scenes.held_out(args.images)]
    base = recipes.load("svdquant")
    if args.samples:
        base = base.override(samples=args.samples)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(pipe, args) | {"samples": base.samples, "rows": base.rows},
    }
    if args.out and args.out.exists():
        old = json.loads(args.out.read_text())
        if old["environment"] == record["environment"]:
            record = old
    found: dict[str, Any] = record.setdefault("rows", {})
    dense = pipe.transformer
    calibration = calibrate(pipe, dense, plan(dense, base), base, None, 0)
    reference = generate(pipe, texts, steps=args.steps)
    trajectory = Trajectory(pipe, texts[:12], args.steps)
    for name, (default, modulation) in rows().items():
        if name in found or args.only not in name:
            continue
        recipe = base.override(default=default, modulation=modulation)
        began = time.process_time()
        pipe.transformer = copy.deepcopy(dense)
        bits, stages = quantized(pipe.transformer, recipe, calibration)
        seconds = time.process_time() - began
        set_path(pipe.transformer, "a4")
        each = fidelity(generate(pipe, texts, steps=args.steps), reference).psnr
        mean = mean_estimate(each)
        found[name] = {
            "bits_per_weight": round(bits, 3),
            "psnr": round(mean.mean, 2),
            "psnr_stderr": round(mean.stderr, 2),
            "psnr_each": [round(value, 2) for value in each],
            "velocity_error": round(trajectory.error(pipe.transformer), 4),
            "solving_cpu_seconds": round(seconds, 1),
            "stages": stages,
        }
        print(name, {k: v for k, v in found[name].items() if k not in ("psnr_each", "stages")}, flush=True)
        keep(record, args.out)
    return record


def quantized(model: nn.Module, recipe: Recipe, calibration: Calibration) -> tuple[float, dict[str, dict[str, float]]]:
    """Replaces the model's layers; bits per weight, and the output error of each target after each stage."""
    stages: dict[str, dict[str, float]] = {}
    stored = weights = 0
    for job in plan(model, recipe).jobs:
        layers, _, staged = solve_job(
            job, [model.get_submodule(path) for path in job.paths], 0, calibration=calibration
        )
        stages.update({path: table for path, table in zip(job.paths, staged, strict=True) if table})
        for path, (n, k), layer in zip(job.paths, job.shapes, layers, strict=True):
            stored += sum(tensor.nbytes for tensor in layer.tensors().values())
            weights += n * k
            swap(model, path, layer)
    return 8 * stored / weights, stages


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown; the gain is paired, picture by picture, with its standard error."""
    found = record["rows"]
    lines = [
        "| row | bits per weight | PSNR dB | gain over abs-max dB | velocity error |",
        "|---|---|---|---|---|",
    ]
    for name, row in found.items():
        said = "" if name == BASELINE else gain_over(row, found[BASELINE])
        lines.append(
            f"| {name} | {row['bits_per_weight']:.2f} | {row['psnr']:.2f} ± {row['psnr_stderr']:.2f} | {said} | "
            f"{row['velocity_error']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
