"""What the judge says of pictures, and the saving of what it judged."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from bittern.evaluation import scenes
from training.parts import IMAGE_SIZE
from training.student import Progress, Student


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] -> uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@torch.no_grad()
def reconstruction_score(vae: nn.Module, device: torch.device, count: int = 600) -> float:
    prompts = scenes.held_out(count)
    generator = torch.Generator(device).manual_seed(5)
    batch = scenes.sample(scenes.SceneTable.of(prompts, device), torch.arange(count, device=device), generator)
    images = scenes.draw(batch, IMAGE_SIZE).float() / 127.5 - 1
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(100)])
    return sum(scenes.judge(to_bytes((decoded + 1) / 2), prompts)) / count


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def score(model: Student, prompts: Sequence[scenes.ScenePrompt], steps: int) -> tuple[dict[str, float], Tensor]:
    """Scenes scores of the prompts, drawn by the pipeline itself, and the images."""
    pipe = model.pipe
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator(pipe.device).manual_seed(0)
    texts = [prompt.prompt for prompt in prompts]
    drawn = []
    with torch.autocast(pipe.device.type, torch.bfloat16, cache_enabled=False):
        for start in range(0, len(texts), 256):
            images = pipe(
                prompt=texts[start : start + 256],
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                num_inference_steps=steps,
                generator=generator,
                output_type="pt",
                **model.call_options(),
            ).images
            drawn.append(to_bytes(images))
    images = torch.cat(drawn)
    parts = [prompts[start : start + 32] for start in range(0, len(prompts), 32)]
    with ThreadPoolExecutor() as pool:
        right = [ok for part in pool.map(scenes.judge, images.split(32), parts) for ok in part]
    scores = {}
    for task in scenes.TASKS:
        mine = [ok for ok, prompt in zip(right, prompts, strict=True) if prompt.tag == task]
        scores[task] = round(sum(mine) / len(mine), 4)
    return {"overall": round(sum(scores.values()) / len(scores), 4)} | scores, images


def save(work: Path, model: Student, progress: Progress) -> None:
    """Writes the pipeline in its stored types."""
    pipe = model.pipe
    pipe.vae.to(memory_format=torch.contiguous_format)
    model.denoiser.to(memory_format=torch.contiguous_format)
    # Text encoders stay float32: transformers loads a stored type as it is, diffusers loads float32, and a plain
    # from_pretrained must give one type throughout.
    model.denoiser.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    fresh = work / "pipeline.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    for config in fresh.rglob("*.json"):
        record = json.loads(config.read_text())
        if record.pop("_name_or_path", None):  # where the last piece lay is nobody's business
            config.write_text(json.dumps(record, indent=2) + "\n")
    old = work / "pipeline"
    if old.exists():
        old.rename(work / f"pipeline.{int(time.time())}")
    fresh.rename(old)
    write_record(work, progress)


def write_record(work: Path, progress: Progress) -> None:
    (work / "training.json").write_text(json.dumps(asdict(progress), indent=1) + "\n")


def judge_saved(
    work: Path, student: type[Student], progress: Progress, device: torch.device, count: int, steps: int = 24
) -> None:
    """Reloads what was saved, makes the last choice, scores `count` held-out prompts, and keeps a picture."""
    saved = DiffusionPipeline.from_pretrained(work / "pipeline", torch_dtype=torch.float32).to(device)
    model = student(saved).to(device).eval()
    model.choose(choose_on_training_prompts(model, min(100, count // 6), steps, progress))
    saved.scheduler.save_pretrained(work / "pipeline" / "scheduler")
    scores, images = score(model, scenes.held_out(count), steps)
    progress.curve.append({"samples": progress.samples, "seconds": round(progress.seconds), "steps": steps,
                           "images": count, model.setting: model.chosen, "saved": True, **scores})  # fmt: skip
    print(json.dumps(progress.curve[-1]))
    write_record(work, progress)
    columns = min(12, count)
    rows = [torch.cat(list(row), dim=2) for row in images[:96].split(columns) if len(row) == columns]
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(work / "samples.png")


def choose_on_training_prompts(model: Student, per_task: int, steps: int, progress: Progress) -> float:
    """The choice that scores best on training prompts, so that the held-out score stays a fair one."""
    every = scenes.training_prompts()
    draw = random.Random(1).choices
    prompts = [p for task in scenes.TASKS for p in draw([q for q in every if q.tag == task], k=per_task)]
    overall = {}
    for value in model.choices:
        model.choose(value)
        scores, _ = score(model, prompts, steps)
        overall[value] = scores["overall"]
        print(f"{model.setting} {value}: {json.dumps(scores)} on {len(prompts)} training prompts")
    progress.pieces[-1][f"{model.setting}_scores_on_training_prompts"] = {str(k): v for k, v in overall.items()}
    return max(overall, key=overall.__getitem__)
