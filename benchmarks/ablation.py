"""What each stage of calibrated SVDQuant is worth on a small model: one table, the same noise in every row.

    python benchmarks/ablation.py --model tiny-flux --out benchmarks/results/ablation_tiny_flux.json
    python benchmarks/ablation.py --table benchmarks/results/ablation_tiny_flux.json

Samples are drawn once, of the pipeline's own prompts; every row is solved from them, drawn on the a4 path and compared
with the 16-bit pictures: PSNR on held-out prompts and on as many training prompts that calibration has not seen, and
the relative error of the prediction along the 16-bit trajectory of twelve prompts. What is on by default is chosen by
the training prompts. Finished rows are kept in the JSON file, so an interrupted run goes on where it stopped; several
processes may share the rows of one file's run with `--share` and `--samples-file`, and `--merge` joins their files.
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
from quality import ROUNDING, Trajectory, compared, environment, gain_over, keep, put, round_as_published
from torch import Tensor, nn

from bittern import pipelines, recipes
from bittern.architectures import plan
from bittern.evaluation import scenes
from bittern.evaluation.generate import generate
from bittern.layers import set_path
from bittern.quantization import Limits, Recorder, component, inspect
from bittern.quantization.calibration import Loaded
from bittern.quantization.conductor import carry_out
from bittern.recipes import Recipe
from bittern.trajectories import State, default_prompts, sample

BASELINE = ROUNDING
PLAIN: dict[str, Any] = {
    "smoothing": "none", "branch": "weights", "rounding": "nearest", "sensitivity": False, "rounds": 0,
    "bias_correction": False,
}  # fmt: skip
NEAREST = {"rounding": "nearest"}
ROUNDED = {"rounding": "nearest", "scales": "absmax"}


@dataclass(frozen=True)
class Row:
    """What a row changes in `svdquant`.

    Attributes:
        default: Of the layers inside blocks.
        others: Of the adaLN linears and of convolutions, which are rounded to the nearest code where GPTQ is off.
        predecessors: Of the recipe.
    """

    default: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    predecessors: str = "full"

    def recipe(self, base: Recipe) -> Recipe:
        """The whole recipe."""
        others = {"modulation": self.others, "convolution": self.others}
        return base.override(default=self.default, predecessors=self.predecessors, **others)


def rows() -> dict[str, Row]:
    """The table, in order."""
    bare = PLAIN | {"scales": "absmax", "rank": 0, "shift": 0.0}
    grid = PLAIN | {"smoothing": "grid"}
    weighted = grid | {"rounding": "gptq", "branch": "outputs"}
    descent = weighted | {"smoothing": "descent"}
    felt, bias = descent | {"sensitivity": True}, {"bias_correction": True}
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
        "descent, rank 32, few-bit predecessors": Row(descent, predecessors="few-bit"),
        "descent, rank 32, bias correction": Row(descent | bias),
        "descent, rank 32, few-bit predecessors, bias correction": Row(descent | bias, predecessors="few-bit"),
        "descent, sensitivity, rank 32, few-bit predecessors": Row(felt, predecessors="few-bit"),
        "descent, sensitivity, rank 32, bias correction": Row(felt | bias),
        "descent, sensitivity, rank 32, both": Row(felt | bias, predecessors="few-bit"),
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
    parser.add_argument("--samples-file", type=Path, help="a file that keeps the samples; read where it exists")
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
    states = samples_of(pipe, dense, base, args.samples_file)
    mine = [name for index, name in enumerate(rows()) if index % args.share[1] == args.share[0] and args.only in name]
    if not set(mine) - set(found):
        return record
    texts = {"psnr": [prompt.prompt for prompt in scenes.held_out(args.images)], "training_psnr": unseen(args.images)}
    reference = {key: draw(pipe, prompts, args.steps) for key, prompts in texts.items()}
    trajectory = Trajectory(pipe, texts["psnr"][:12], args.steps)
    for name in mine:
        if name in found:
            continue
        began = time.process_time()
        model = copy.deepcopy(dense)
        bits, stages = quantized(pipe, model, rows()[name].recipe(base), states)
        seconds = time.process_time() - began
        if name == BASELINE:
            round_as_published(model)
        else:
            set_path(model, "a4")
        put(pipe, model)
        found[name] = {"bits_per_weight": round(bits, 3)}
        for key, prompts in texts.items():
            found[name] |= compared(key, draw(pipe, prompts, args.steps), reference[key])
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


def samples_of(pipe: Any, dense: nn.Module, base: Recipe, file: Path | None) -> list[State]:
    """The samples that all rows are calibrated on."""
    if file and file.exists():
        return torch.load(file, map_location="cpu", weights_only=False)
    states = sample(pipe, dense, default_prompts(pipe.config.get("_name_or_path")), base.samples, seed=0)
    if file:
        temporary = file.with_suffix(".tmp")
        torch.save(states, temporary)
        temporary.replace(file)
    return states


def quantized(
    pipe: Any, model: nn.Module, recipe: Recipe, states: list[State]
) -> tuple[float, dict[str, dict[str, float]]]:
    """Makes a model few-bit with given samples; bits per weight, and each target's output error after each stage."""
    recorder = None
    if recipe.calibrated:
        itemsize = next(model.parameters()).element_size()
        source = Loaded(pipe, model, (), recipe.samples, 0)
        recorder = Recorder(source, recipe, itemsize, Limits.of(pipe.device), 0, states=states)
    carry_out(plan(model, recipe), model, recipe, 0, recorder)
    report = inspect(model)
    return report.bits_per_weight, {row.path: row.stages or {} for row in report.rows}


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
