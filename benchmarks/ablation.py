"""What each stage of calibrated SVDQuant is worth on a small model: one table, the same noise in every row.

    python benchmarks/ablation.py --model tiny-flux --out benchmarks/results/ablation_tiny_flux.json
    python benchmarks/ablation.py --table benchmarks/results/ablation_tiny_flux.json

The pipeline is calibrated once, on its own prompts; every row is solved from that, drawn on the a4 path and compared
with the 16-bit pictures: PSNR on held-out prompts and on as many training prompts that calibration has not seen, and
the relative error of the prediction along the 16-bit trajectory of twelve prompts. What is on by default is chosen by
the training prompts. Finished rows are kept in the JSON file, so an interrupted run goes on where it stopped; several
processes may share the rows of one file's run with `--share` and `--calibration`, and `--merge` joins their files.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quality import Trajectory, environment, gain_over, keep, put
from torch import Tensor, nn

from bittern import pipelines, recipes
from bittern.architectures import Job, plan
from bittern.evaluation import scenes
from bittern.evaluation.fidelity import fidelity
from bittern.evaluation.generate import generate
from bittern.evaluation.stats import mean_estimate
from bittern.layers import set_path
from bittern.quantization import Calibration, calibrate, component, solve_job, swap
from bittern.recipes import Recipe
from bittern.trajectories import State, default_prompts, record, sample

BASELINE = "W4A4 abs-max"
PLAIN: dict[str, Any] = {
    "smoothing": "none", "branch": "weights", "rounding": "nearest", "sensitivity": False, "rounds": 0,
}  # fmt: skip
NEAREST = {"rounding": "nearest"}
ROUNDED = {"rounding": "nearest", "scales": "absmax"}


@dataclass(frozen=True)
class Row:
    """What a row changes in `svdquant`.

    Attributes:
        default: Of the layers inside blocks.
        others: Of the adaLN linears and of convolutions, which are rounded to the nearest code where GPTQ is off.
        predecessors: Whether each block is calibrated behind the few-bit blocks before it.
        bias: Whether the mean error of each output is taken from its bias.
    """

    default: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    predecessors: bool = False
    bias: bool = False

    def recipe(self, base: Recipe) -> Recipe:
        """The whole recipe."""
        return base.override(default=self.default, modulation=self.others, convolution=self.others)


def rows() -> dict[str, Row]:
    """The table, in order."""
    bare = PLAIN | {"scales": "absmax", "rank": 0, "shift": 0.0}
    grid = PLAIN | {"smoothing": "grid"}
    weighted = grid | {"rounding": "gptq", "branch": "outputs"}
    descent = weighted | {"smoothing": "descent"}
    found = {
        BASELINE: Row(bare, ROUNDED),
        "searched scales and shift only": Row(PLAIN | {"rank": 0}, NEAREST),
        "... and smoothing": Row(grid | {"rank": 0}, NEAREST),
        "... and rank 32": Row(PLAIN, NEAREST),
        "... and both": Row(grid, NEAREST),
        "both, GPTQ": Row(grid | {"rounding": "gptq"}),
    }
    for rank in (32, 16, "1/96"):
        size = {"rank": rank}
        found |= {
            f"GPTQ, output-weighted branch, rank {rank}": Row(weighted | size),
            f"... and descent, rank {rank}": Row(descent | size),
            f"... and sensitivity, rank {rank}": Row(weighted | {"sensitivity": True} | size),
            f"... and both, rank {rank}": Row(descent | {"sensitivity": True} | size),
        }
    return found | {
        "descent, rank 32, one refit": Row(descent | {"refits": 1}),
        "descent, rank 32, quantized predecessors": Row(descent, predecessors=True),
        "descent, rank 32, bias correction": Row(descent, bias=True),
        "descent, rank 32, other layers nearest": Row(descent, NEAREST),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--images", type=int, default=256, help="held-out ones, and as many of training prompts")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every n-th row")
    parser.add_argument("--calibration", type=Path, help="a file that keeps the calibration; read where it exists")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="join the files of shares in --out and stop")
    parser.add_argument("--table", type=Path, help="print the Markdown table of a finished run and stop")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
    elif args.merge:
        merge([json.loads(file.read_text()) for file in args.merge], args.out)
    else:
        print(table(run(args)))


def run(args: argparse.Namespace) -> dict[str, Any]:
    pipe = pipelines.load(args.model, dtype=args.dtype, device=args.device)
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
    dense = component(pipe)
    states, calibration = calibrated(pipe, dense, base, args.calibration)
    mine = [name for index, name in enumerate(rows()) if index % args.share[1] == args.share[0] and args.only in name]
    if not set(mine) - set(found):
        return record
    texts = {"psnr": [prompt.prompt for prompt in scenes.held_out(args.images)], "training_psnr": unseen(args.images)}
    reference = {key: draw(pipe, prompts, args.steps) for key, prompts in texts.items()}
    trajectory = Trajectory(pipe, texts["psnr"][:12], args.steps)
    for name in mine:
        if name in found:
            continue
        row = rows()[name]
        began = time.process_time()
        model = copy.deepcopy(dense)
        bits, stages = quantized(model, row, row.recipe(base), states, calibration)
        seconds = time.process_time() - began
        set_path(model, "a4")
        if row.bias:
            correct_biases(dense, model, list(stages), states)
        put(pipe, model)
        found[name] = {"bits_per_weight": round(bits, 3)}
        for key, prompts in texts.items():
            each = fidelity(draw(pipe, prompts, args.steps), reference[key]).psnr
            mean = mean_estimate(each)
            found[name] |= {
                key: round(mean.mean, 2),
                f"{key}_stderr": round(mean.stderr, 2),
                f"{key}_each": [round(value, 2) for value in each],
            }
        found[name] |= {
            "velocity_error": round(trajectory.error(model), 4),
            "solving_cpu_seconds": round(seconds, 1),
            "stages": stages,
        }
        put(pipe, dense)
        said = {key: value for key, value in found[name].items() if not key.endswith(("_each", "stages"))}
        print(name, said, file=sys.stderr, flush=True)
        keep(record, args.out)
    return record


def draw(pipe: Any, prompts: list[str], steps: int) -> Tensor:
    return generate(pipe, prompts, steps=steps, batch_size=128 if pipe.device.type == "cuda" else 24)


def unseen(count: int) -> list[str]:
    """Training prompts that nobody calibrates with."""
    seen = set(default_prompts(pipelines.resolve("tiny-flux")))
    prompts = [prompt.prompt for prompt in scenes.training_prompts() if prompt.prompt not in seen]
    return random.Random(77).sample(prompts, count)


def calibrated(pipe: Any, dense: nn.Module, base: Recipe, file: Path | None) -> tuple[list[State], Calibration]:
    """The samples, and what is known of every layer."""
    if file and file.exists():
        return torch.load(file, map_location=pipe.device, weights_only=False)
    prompts = default_prompts(pipe.config.get("_name_or_path"))
    states = sample(pipe, dense, prompts, base.samples, seed=0)
    base = base.override(default={"sensitivity": True})
    found = states, calibrate(pipe, dense, plan(dense, base), base, prompts, 0)
    if file:
        temporary = file.with_suffix(".tmp")
        torch.save(found, temporary)
        temporary.replace(file)
    return found


def quantized(
    model: nn.Module, row: Row, recipe: Recipe, states: list[State], calibration: Calibration
) -> tuple[float, dict[str, dict[str, float]]]:
    """Replaces the model's layers; bits per weight, and the output error of each target after each stage."""
    stages: dict[str, dict[str, float]] = {}
    stored = weights = 0
    for jobs in blocks(model, recipe, states[0]) if row.predecessors else [list(plan(model, recipe).jobs)]:
        known = calibration
        if row.predecessors:
            set_path(model, "a4")
            inputs = [job.paths[0] for job in jobs]
            known = Calibration(record(model, inputs, states, rows=recipe.rows), calibration.sensitivity)
        for job in jobs:
            modules = [model.get_submodule(path) for path in job.paths]
            layers, _, staged = solve_job(job, modules, 0, calibration=known)
            stages |= dict(zip(job.paths, staged, strict=True))
            for path, (n, k), layer in zip(job.paths, job.shapes, layers, strict=True):
                stored += sum(tensor.nbytes for tensor in layer.tensors().values())
                weights += n * k
                swap(model, path, layer)
    return 8 * stored / weights, stages


def blocks(model: nn.Module, recipe: Recipe, state: State) -> list[list[Job]]:
    """The jobs of a plan, block by block, in the order in which the model calls them."""
    order: dict[str, int] = {}

    def seen(path: str) -> Any:
        def hook(*_: Any) -> None:
            order.setdefault(path, len(order))

        return hook

    jobs = list(plan(model, recipe).jobs)
    handles = [model.get_submodule(job.paths[0]).register_forward_pre_hook(seen(job.paths[0])) for job in jobs]
    state.replay(model)
    for handle in handles:
        handle.remove()
    found: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: order[job.paths[0]]):
        found.setdefault(".".join(job.paths[0].split(".")[:2]), []).append(job)
    return list(found.values())


@torch.no_grad()
def correct_biases(dense: nn.Module, model: nn.Module, paths: list[str], states: list[State]) -> None:
    """Adds to each bias what the few-bit layer's outputs lack on average, given the full-precision model's inputs
    (Nagel et al. 2019, arXiv:1906.04721)."""
    sums: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            lacking = (output - model.get_submodule(path)(args[0])).float()
            mean = lacking.mean(dim=(0, 2, 3)) if lacking.ndim == 4 else lacking.flatten(0, -2).mean(dim=0)
            sums[path] = sums.get(path, torch.zeros_like(mean)) + mean / len(states)

        return hook

    biased = [path for path in paths if model.get_submodule(path).bias is not None]
    handles = [dense.get_submodule(path).register_forward_hook(watch(path)) for path in biased]
    for state in states:
        state.replay(dense)
    for handle in handles:
        handle.remove()
    for path, mean in sums.items():
        bias = model.get_submodule(path).bias
        assert isinstance(bias, Tensor)
        bias += mean.to(bias.dtype)


def merge(records: list[dict[str, Any]], out: Path) -> None:
    """One record of several shares."""
    found = {name: row for record in records for name, row in record["rows"].items()}
    first = records[0]
    # The environments of shares are the same, and so are their commands but for the share.
    first["rows"] = {name: found[name] for name in rows() if name in found}
    keep(first, out)


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown; the gain is paired, picture by picture, with its standard error."""
    found = record["rows"]
    lines = [
        "| row | bits per weight | PSNR dB | gain over abs-max dB | gain on training prompts dB | velocity error |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        gains = ["", ""]
        if name != BASELINE and BASELINE in found:
            # Records of before drew held-out prompts alone.
            keys = [f"{key}_each" for key in ("psnr", "training_psnr")]
            gains = [gain_over(row, found[BASELINE], key) if key in row else "" for key in keys]
        lines.append(
            f"| {name} | {row['bits_per_weight']:.2f} | {row['psnr']:.2f} ± {row['psnr_stderr']:.2f} | {gains[0]} | "
            f"{gains[1]} | {row['velocity_error']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
