"""What each step of the ternary solver is worth on a small model: one table, the same noise in every row.

    python benchmarks/ternary.py --out benchmarks/results/ternary_tiny_flux.json
    python benchmarks/ternary.py --table benchmarks/results/ternary_tiny_flux.json

The pipeline is calibrated once, on its own prompts; every row is solved from that, drawn on the path that its device
chooses, and compared with the 16-bit pictures of training prompts that calibration has not seen: PSNR, and the relative
error of the prediction along the 16-bit trajectory of twelve of them. What is on by default was chosen by these. Rows
that are marked for it are also drawn from held-out prompts, for PSNR and the scenes score. Finished rows are kept in
the JSON file, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ablation import draw, samples_of, unseen
from quality import Trajectory, compared, environment, fill, gain_over, keep, overall, put
from torch import nn

from bittern import pipelines, recipes
from bittern.architectures import Job, plan
from bittern.evaluation import scenes
from bittern.layers import flat_weight
from bittern.quantization import Calibration, Limits, Recorder, component, inspect
from bittern.quantization.calibration import Loaded
from bittern.quantization.conductor import carry_out
from bittern.recipes import Recipe
from bittern.solvers import SolverOptions, solve_ternary
from bittern.trajectories import State

BASELINE = "absmean, row"
NEAREST: dict[str, Any] = {"rounding": "nearest", "refits": 0, "sweeps": 0}
CORRECTED = {"bias_correction": True}


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        changes: Of the recipe `ternary`, in every layer that it makes ternary.
        predecessors: What a block is calibrated behind.
        overrides: Of layers by their path.
        planes: How many ternary weights are added up; more than one is worked out and drawn in 16 bits.
        held_out: Whether it is drawn from held-out prompts as well.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    predecessors: str = "full"
    planes: int = 1
    held_out: bool = False

    def recipe(self) -> Recipe:
        """The whole recipe."""
        changes = {"default": self.changes, "overrides": self.overrides, "predecessors": self.predecessors}
        return recipes.load("ternary").override(**changes)


class Remembering(Recorder):
    """A recorder that records the full-precision model once, whatever is asked for."""

    def begin(self, model: nn.Module, recipe: Recipe) -> Calibration:
        """Records all jobs of a recipe."""
        self.known = super().record(plan(model, recipe).jobs)
        return self.known

    def record(self, jobs: Sequence[Job], what: str = "") -> Calibration:
        """What was recorded."""
        return self.known


def cases() -> dict[str, Case]:
    """The table, in order."""
    int4 = {"weight": "int4", "group_size": 64, "refits": 0}
    proj_out = {"single_transformer_blocks.*.proj_out": int4}
    return {
        BASELINE: Case(NEAREST | {"codes": "absmean"}, held_out=True),
        "least squares, row": Case(NEAREST, held_out=True),
        "least squares, g64": Case(NEAREST | {"group_size": 64}),
        "GPTQ, row": Case({"refits": 0, "sweeps": 0}),
        "... scales fitted, once": Case({"refits": 1, "sweeps": 0}),
        "... in turn, four times": Case({"sweeps": 0}),
        "... and sweeps: `ternary`": Case(held_out=True),
        "`ternary`, bias correction": Case(CORRECTED),
        "`ternary`, few-bit predecessors": Case(predecessors="few-bit"),
        "`ternary`, both": Case(CORRECTED, predecessors="few-bit", held_out=True),
        "`ternary`, g128": Case({"group_size": 128}),
        "`ternary`, g64": Case({"group_size": 64}),
        "`ternary`, smoothing": Case({"smoothing": "columns"}),
        "`ternary`, rank 1/96": Case({"rank": "1/96"}),
        "`ternary`, rank 16": Case({"rank": 16}),
        "`ternary`, proj_out of single blocks int4 g64": Case(overrides=proj_out),
        "`ternary`, two planes": Case(planes=2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--images", type=int, default=48, help="training prompts; for --held-out as many as that says")
    parser.add_argument("--held-out", type=int, default=120, help="held-out prompts; 0 for none")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--samples-file", type=Path, help="a file that keeps the samples; read where it exists")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the Markdown table of a finished run and stop")
    args = parser.parse_args()
    print(table(json.loads(args.table.read_text()) if args.table else run(args)))


def run(args: argparse.Namespace) -> dict[str, Any]:
    pipe = pipelines.load(args.model, dtype=args.dtype, device=args.device)
    base = recipes.load("ternary").override(predecessors="full")
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(pipe, args) | {"samples": base.samples, "held_out": args.held_out},
    }
    if args.out and args.out.exists():
        old = json.loads(args.out.read_text())
        alike = ({**each["environment"], "commit": None} for each in (old, record))
        if next(alike) == next(alike):
            record = old
    found: dict[str, Any] = record.setdefault("rows", {})
    wanted = [name for name in cases() if name not in found and any(part in name for part in args.only)]
    if not wanted:
        return record
    dense = component(pipe)
    recorder = recorder_of(pipe, dense, base, samples_of(pipe, dense, base, args.samples_file))
    calibration = recorder.begin(dense, base)
    world = scenes.held_out(args.held_out) if args.held_out and any(cases()[name].held_out for name in wanted) else []
    texts = {"training_psnr": unseen(args.images), "psnr": [prompt.prompt for prompt in world]}
    reference = {key: draw(pipe, prompts, args.steps) for key, prompts in texts.items() if prompts}
    if world:
        record.setdefault("16 bit", overall(reference["psnr"], world))
    trajectory = Trajectory(pipe, texts["training_psnr"][:12], args.steps)
    for name in wanted:
        case, model = cases()[name], copy.deepcopy(dense)
        began = time.process_time()
        recorder.source = Loaded(pipe, model, (), base.samples, 0)
        if case.planes > 1:
            bits, error = in_planes(model, case.recipe(), case.planes, calibration), None
        else:
            bits, error = solved(model, case, recorder)
        found[name] = {"bits_per_weight": round(bits, 3), "solving_cpu_seconds": round(time.process_time() - began, 1)}
        found[name]["layer_error"] = None if error is None else round(error, 4)
        found[name]["velocity_error"] = round(trajectory.error(model), 4)
        put(pipe, model)
        for key in ("training_psnr", "psnr") if case.held_out and world else ("training_psnr",):
            images = draw(pipe, texts[key], args.steps)
            found[name] |= compared(key, images, reference[key])
            if key == "psnr":
                found[name]["overall"] = overall(images, world)
        put(pipe, dense)
        said = {key: value for key, value in found[name].items() if not key.endswith("_each")}
        print(name, said, file=sys.stderr, flush=True)
        found = record["rows"] = {key: found[key] for key in cases() if key in found}
        keep(record, args.out)
    return record


def recorder_of(pipe: Any, dense: nn.Module, base: Recipe, states: list[State]) -> Remembering:
    """What records from given samples."""
    itemsize = next(dense.parameters()).element_size()
    source = Loaded(pipe, dense, (), base.samples, 0)
    return Remembering(source, base, itemsize, Limits.of(pipe.device), 0, states=states)


def solved(model: nn.Module, case: Case, recorder: Recorder) -> tuple[float, float | None]:
    """Replaces the model's layers; bits per weight, and the mean output error where there are such."""
    recipe = case.recipe()
    recorder.recipe = recipe
    carry_out(plan(model, recipe), model, recipe, 0, recorder if recipe.calibrated else None)
    report = inspect(model)
    last = [list(row.stages.values())[-1] for row in report.rows if row.stages]
    return report.bits_per_weight, sum(last) / len(last) if last else None


@torch.no_grad()
def in_planes(model: nn.Module, recipe: Recipe, planes: int, calibration: Calibration) -> float:
    """Sums of ternary weights, each solved for what those before it leave, in place of the model's own.

    Returns:
        The bits per weight that so many planes take.
    """
    stored = weights = 0.0
    for job in plan(model, recipe).jobs:
        modules: list[Any] = [model.get_submodule(path) for path in job.paths]
        rest = [flat_weight(module).float() for module in modules]
        known = calibration.statistics[job.paths[0]].to(rest[0].device)
        sums = [torch.zeros_like(weight) for weight in rest]
        for _ in range(planes):
            missing = [weight - done for weight, done in zip(rest, sums, strict=True)]
            plane, _ = solve_ternary(missing, known, job.scheme, SolverOptions(**job.solver), job.segments, 0)
            sums = [done + part.reconstruct() for done, part in zip(sums, plane, strict=True)]
        for module, (n, k), done in zip(modules, job.shapes, sums, strict=True):
            fill(module, done)
            stored += planes * job.scheme.bits_per_weight(n, k, job.segments) * n * k
            weights += n * k
    return stored / weights


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown; the gain is paired, picture by picture, with its standard error."""
    found = record["rows"]
    lines = [
        "| row | bits per weight | layer error | velocity error | PSNR dB, training | gain over absmean dB "
        "| PSNR dB, held out | scenes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if "16 bit" in record:
        lines.append(f"| 16 bit | 16 | | | | | | {_score(record['16 bit'])} |")
    for name, row in found.items():
        gain = "" if name == BASELINE else gain_over(row, found[BASELINE], "training_psnr_each")
        layer = "" if row["layer_error"] is None else f"{row['layer_error']:.3f}"
        held_out = f"{row['psnr']:.2f} ± {row['psnr_stderr']:.2f}" if "psnr" in row else ""
        score = _score(row["overall"]) if "overall" in row else ""
        lines.append(
            f"| {name} | {row['bits_per_weight']:.2f} | {layer} | {row['velocity_error']:.3f} | "
            f"{row['training_psnr']:.2f} ± {row['training_psnr_stderr']:.2f} | {gain} | {held_out} | {score} |"
        )
    return "\n".join(lines)


def _score(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} ± {score['stderr']:.3f}"


if __name__ == "__main__":
    main()
