"""Distil an embedded model on a GPU that is there for some minutes at a time.

    python tools/distill_tiny.py tiny-flux --work WORK --minutes 9
    python tools/distill_tiny.py tiny-flux --work WORK2 --minutes 9 --start WORK --set lr_codes=0.001
    python tools/distill_tiny.py tiny-flux --work WORK --device cpu --set steps=2 --set trajectories=2 \
        --set validation=2 --set batch=2 --final-prompts 6

What `bittern quantize MODEL --recipe ternary-distilled` does in one go, with an end by the clock. WORK holds the
averaged parameters in 16 bits (`latents-N.safetensors`, shards of at most 15 MiB), `log.jsonl`, and the few-bit model
as it is so far (`model/`): all are renewed about once a minute, so that whatever ends the run leaves a start for the
next one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from bittern import pipelines, recipes
from bittern.distillation import distill, latents
from bittern.distillation.run import Course
from bittern.distillation.student import in_place_of
from bittern.distillation.trainer import Trainer
from bittern.evaluation.drawing import Settings
from bittern.evaluation.suites import evaluate
from bittern.quantization import component

SHARD = 15 * 2**20


def main() -> None:
    started = time.monotonic()
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    changes = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.set)}
    recipe = recipes.load(args.recipe).override(name="ternary-distilled", distillation=changes)

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:4.0f} s  {text}", flush=True)

    # A CPU has no fast 16-bit products.
    pipe = pipelines.load(args.model, dtype=torch.float32 if args.device == "cpu" else None, device=args.device)
    teacher = component(pipe)
    written = [0.0]

    def on_validation(trainer: Trainer, course: Course) -> None:
        write_log(args.work, course.log)
        if time.monotonic() - written[0] > args.save_every:
            write_latents(args.work, latents(trainer))
            with trainer.averaged():
                trainer.student.export()
            write_model(args.work, trainer.student.deployed)
            written[0] = time.monotonic()

    done = distill(
        pipe,
        recipe,
        seed=args.seed,
        start=read_latents(args.start) if args.start else None,
        deadline=None if args.minutes is None else started + 60 * args.minutes - args.reserve,
        on_validation=on_validation,
        say=say,
    )
    write_log(args.work, done.log)
    write_model(args.work, done.model)
    say(f"trained: {done.report!r}")
    if args.final_prompts:
        with in_place_of(pipe, teacher, done.model):
            found = evaluate(pipe, "scenes", limit=args.final_prompts, settings=Settings(device=args.device))
            scores = found.to_dict()
        keys = ("overall", "overall_stderr", "tasks", "images", "path", "seconds")
        say(json.dumps({key: scores[key] for key in keys}))
        (args.work / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    say("done")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", default="ternary-distilled")
    parser.add_argument("--minutes", type=float, help="length of this piece, start-up included; default: the recipe's")
    parser.add_argument("--reserve", type=float, default=60.0, help="seconds kept for the scores at the end")
    parser.add_argument("--start", type=Path, help="the WORK of an earlier piece")
    parser.add_argument("--save-every", type=float, default=45.0, help="seconds")
    parser.add_argument("--final-prompts", type=int, default=600, help="held-out prompts of the last score; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the distillation")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


def write_log(work: Path, log: list[dict]) -> None:
    fresh = work / "log.jsonl.tmp"
    fresh.write_text("".join(json.dumps(record) + "\n" for record in log))
    os.replace(fresh, work / "log.jsonl")


def write_latents(work: Path, tensors: dict[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    for index, shard in enumerate(shards):
        fresh = work / f"latents-{index}.tmp"
        save_file(shard, fresh)
        os.replace(fresh, work / f"latents-{index}.safetensors")


def read_latents(work: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(work.glob("latents-*.safetensors")) for name, t in load_file(file).items()}


def write_model(work: Path, model: torch.nn.Module) -> None:
    fresh = work / "model.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    shutil.rmtree(work / "model", ignore_errors=True)
    os.replace(fresh, work / "model")


if __name__ == "__main__":
    main()
