"""Comparisons without a model: drawings of the scenes world stand for pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bittern.evaluation import scenes
from bittern.evaluation.compare import Comparison, Entry
from bittern.evaluation.drawing import Drawing
from bittern.evaluation.fidelity import fidelity
from bittern.evaluation.results import Finished
from bittern.evaluation.runs.judging import Judged, Outcome
from bittern.evaluation.scenes import TASKS
from bittern.evaluation.stats import paired_difference
from bittern.evaluation.suites import score_scenes
from bittern.quantization import Report, Row

KINDS = ("attn.to_q", "attn.to_out.0", "ff.net.0.proj")


def report(blocks: int = 3) -> Report:
    rows = [
        Row(f"transformer_blocks.{block}.{kind}", "int4", 64, 32, 4, 0.05 + 0.01 * block, (64, 64), 3000, 5.86)
        for block in range(blocks)
        for kind in KINDS[: 3 if block else 2]
    ]
    return Report("svdquant-fast", tuple(rows), 100_000, 200_000, 150_000, 101_000)


def drawing(name: str, images: Tensor, prompts: list[str], paths: dict[str, int], made: Report) -> Drawing:
    return Drawing(name, prompts, images, 7, 12, paths, "bf16", "CPU (test)", 1.5, made, "native")


def comparison(prompts: list[scenes.ScenePrompt], *, models: int = 2, noise: float = 6.0) -> Comparison:
    """A reference that draws every prompt rightly, and models that add noise; the last draws nothing."""
    table = scenes.SceneTable.of(prompts)
    generator = torch.Generator().manual_seed(3)
    images = scenes.draw(scenes.sample(table, torch.arange(len(prompts)), generator))
    texts = [p.prompt for p in prompts]
    plain = Report(None, (), 400_000, 200_000, 150_000, 401_000)
    base = Entry(drawing("tiny-flux", images, texts, {}, plain), score_scenes(images, prompts))
    others = []
    for index in range(models):
        blank = index == models - 1 > 0
        spread = noise * torch.randn(images.shape, generator=generator)
        drawn = (torch.zeros_like(images) if blank else images + spread).clamp(0, 255).to(torch.uint8)
        score = score_scenes(drawn, prompts)
        gap = paired_difference(score.outcomes, base.score.outcomes)
        made = drawing(f"out/model-{index}", drawn, texts, {"a8-int8": 8, "a16": 2}, report())
        others.append(Entry(made, score, fidelity(drawn, images), gap))
    return Comparison(base, others, prompts)


def with_runs(found: Comparison) -> Comparison:
    """The same with a GenEval run of every model, of 60 prompts and two pictures each; later models are worse."""
    runs: list[Finished] = []
    for model in range(len(found.entries)):
        outcomes = {
            (prompt, sample): Outcome(TASKS[prompt % 6], f"prompt {prompt}", (7 * prompt + 3 * sample) % 11 > 2 * model)
            for prompt in range(60)
            for sample in range(2)
        }
        judged = Judged(f"model-{model}", outcomes, {}, None, tuple(TASKS))
        runs.append(Finished(Path(f"out/run-{model}"), {}, judged, {}))
    base = runs[0].judged.score.outcomes
    gaps = [paired_difference(run.judged.score.outcomes, base) for run in runs]
    others = [
        replace(entry, geneval=run, geneval_difference=gap)
        for entry, run, gap in zip(found.others, runs[1:], gaps[1:], strict=True)
    ]
    return Comparison(replace(found.reference, geneval=runs[0]), others, found.world)
