"""What `how_low.py` measures: the 16-bit model, the ways of storing it, and what each takes in bytes."""

from __future__ import annotations

import argparse
import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peers_quality
from ablation import samples_of
from peers_quality import ours, replace_weights, rounded
from quality import put
from ternary import in_planes
from torch import Tensor

from bittern import layers, pipelines, recipes
from bittern.architectures import plan
from bittern.checkpoints import weight_files
from bittern.distillation.texts import draw_texts, split
from bittern.errors import UserError
from bittern.evaluation import scenes
from bittern.evaluation.generate import generate
from bittern.evaluation.suites import Score, score_scenes
from bittern.outputs import INDEX
from bittern.quantization import Limits, Recorder, component, inspect
from bittern.quantization.calibration import Loaded
from bittern.trajectories import State

REFERENCE = "16 bit"
TERNARY: dict[str, Any] = {"packing": "trits"}
"""Five codes a byte, as distilled checkpoints are stored: the same values as two bits, in four fifths of the bytes."""
CONVOLUTIONS: dict[str, Any] = {"weight": "ternary", "packing": "trits"}
"""Ternary as well, as in distilled models; by themselves the training-free recipes make int4 of them."""

Row = dict[str, Any]


class Bench(peers_quality.Bench):
    """The model in 16 bits and what it draws, of held-out prompts and, for a warning, of those of training."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.args = args
        self.world = scenes.held_out(args.images)
        self.file_bytes = bytes_of_weights(pipelines.denoiser_folder(args.model))

    @cached_property
    def states(self) -> list[State]:
        put(self.pipe, self.dense)
        return samples_of(self.pipe, self.dense, self.base, self.args.samples_file)

    @cached_property
    def learned(self) -> list[scenes.ScenePrompt]:
        """As many prompts that distillation learns from, the six tasks in turn."""
        every = {prompt.prompt: prompt for prompt in scenes.training_prompts()}
        groups = [[text for text, prompt in every.items() if prompt.tag == task] for task in scenes.TASKS]
        return [every[text] for text in draw_texts(split(groups)[0], len(self.world), seed=77)]

    @cached_property
    def score(self) -> Score:
        """The 16-bit model's."""
        return score_scenes(self.reference, self.world)

    @cached_property
    def learned_score(self) -> Score:
        """The 16-bit model's on training prompts."""
        put(self.pipe, self.dense)
        return score_scenes(self.draw(self.learned), self.learned)

    @cached_property
    def digest(self) -> str:
        """Of the 16-bit model's pictures: rows with the same one were compared with the same pictures."""
        return hashlib.sha256(self.reference.numpy().tobytes()).hexdigest()[:16]

    def draw(self, prompts: list[scenes.ScenePrompt], batch_size: int | None = None) -> Tensor:
        """Pictures of the model that is in the pipeline."""
        return generate(self.pipe, [prompt.prompt for prompt in prompts], steps=self.steps, batch_size=batch_size)


@dataclass(frozen=True)
class Variant:
    """A way of storing the model.

    Attributes:
        name: What the table calls it.
        family: Which series of the plot it belongs to.
        build: Puts the model into the pipeline; what is known of its size.
        paths: The arithmetic to draw it on, a row each: "auto" is what the device chooses.
        learned: Whether it was trained, and is therefore judged on training prompts, too.
        stamp: Of a file that it is made from; a row with another one is measured anew.
    """

    name: str
    family: str
    build: Callable[[Bench], Row]
    paths: tuple[str, ...] = ("auto",)
    learned: bool = False
    stamp: str | None = None

    def keys(self) -> dict[str, str]:
        """The names of its rows, with their paths."""
        return {self.name if path == "auto" else f"{self.name} [{path}]": path for path in self.paths}


def variants(model: str, given: Path | None, convolutions: bool) -> list[Variant]:
    """All rows but the reference; first those that a run cut short must have.

    Args:
        model: The 16-bit model's name.
        given: The folder of a distilled model, a whole pipeline or the denoiser alone; None for the embedded one.
        convolutions: Whether the model has convolutions that are quantized.
    """
    found: list[Variant] = []
    place = distilled_folder(model, given)
    if place is not None:
        stamp = hashlib.sha256(b"".join(file.read_bytes() for file in weight_files(place))).hexdigest()[:16]
        found.append(Variant("ternary-distilled", "distilled", distilled(place), learned=True, stamp=stamp))
    found += [
        Variant("absmean rounding", "absmean", ternary("ternary-fast", codes="absmean")),
        Variant("ternary", "ternary", ternary()),
        Variant("ternary-fast", "ternary-fast", ternary("ternary-fast")),
        Variant("int4-gptq", "int4", ours("int4-gptq", {})),
        Variant("int4", "int4", ours("int4", {})),
        Variant("int8, rounding", "int8", int8),
        Variant("two ternary planes", "two planes", two_planes),
    ]
    for rank in peers_quality.RANKS:
        for recipe in ("svdquant", "svdquant-fast"):
            build = ours(recipe, {"default": {"rank": rank}})
            found.append(Variant(f"{recipe}, rank {rank}", recipe, build, ("auto", "a4")))
    found += [
        Variant("ternary, groups of 128", "ternary", ternary(group_size=128)),
        Variant("ternary, groups of 64", "ternary", ternary(group_size=64)),
        Variant("ternary, smoothing", "ternary", ternary(smoothing="columns")),
        Variant("ternary, rank 1/96", "ternary", ternary(rank="1/96")),
        Variant("ternary, rank 16", "ternary", ternary(rank=16)),
        Variant("ternary, smoothing, rank 16", "ternary", ternary(rank=16, smoothing="columns")),
        Variant("ternary-fast, groups of 64", "ternary-fast", ternary("ternary-fast", group_size=64)),
        Variant("16 bit, other batches", "16 bit", lambda _: {"bits_per_weight": 16.0}),
    ]
    if convolutions:
        found.append(Variant("ternary, int4 convolutions", "ternary", ours("ternary", {"default": TERNARY})))
    return found


def ternary(recipe: str = "ternary", **changes: Any) -> Callable[[Bench], Row]:
    """A ternary recipe with changes, convolutions ternary as well."""
    return ours(recipe, {"default": TERNARY | changes, "convolution": CONVOLUTIONS})


def int8(bench: Bench) -> Row:
    """Plain rounding to eight bits, simulated."""
    return {"bits_per_weight": replace_weights(bench, lambda weight: rounded(weight, 8))}


def two_planes(bench: Bench) -> Row:
    """`ternary`, and ternary once more for what that leaves; simulated."""
    recipe = recipes.load("ternary").override(default=TERNARY, convolution=CONVOLUTIONS)
    source = Loaded(bench.pipe, bench.dense, (), recipe.samples, 0)
    itemsize = next(bench.dense.parameters()).element_size()
    limits = Limits.of(bench.pipe.device)
    put(bench.pipe, bench.dense)
    recorder = Recorder(source, recipe, itemsize, limits, 0, states=bench.states)
    calibration = recorder.record(plan(bench.dense, recipe).jobs)
    model = copy.deepcopy(bench.dense)
    bits = in_planes(model, recipe, 2, calibration)
    put(bench.pipe, model)
    return {"bits_per_weight": bits}


def distilled_folder(model: str, given: Path | None) -> Path | None:
    """Where the distilled denoiser lies; None where there is none.

    Raises:
        UserError: for a folder that holds no model.
    """
    if given is None:
        name = f"{model}-ternary"
        return pipelines.denoiser_folder(name) if name in pipelines.BUILT_IN else None
    place = given / pipelines.denoiser_name(given) if (given / INDEX).is_file() else given
    if not (place / "config.json").is_file():
        raise UserError(f"--distilled {given} holds no model: expected a pipeline's folder or its denoiser's")
    return place


def distilled(place: Path) -> Callable[[Bench], Row]:
    """A few-bit denoiser from its folder."""

    def build(bench: Bench) -> Row:
        # Everything that makes its shape must be the original's.
        mine, theirs = (
            pipelines.read_json(folder / "config.json")
            for folder in (place, pipelines.denoiser_folder(bench.args.model))
        )
        kept = {key for key in theirs if not key.startswith("_")} | {"_class_name"}
        other = sorted(key for key in kept if mine.get(key) != theirs.get(key))
        if other:
            raise UserError(f"--distilled {place} is not made from {bench.args.model}: {', '.join(other)} differ")
        model = pipelines.load_denoiser(str(place), place, bench.dense.dtype)
        put(bench.pipe, model.to(bench.pipe.device).eval())
        return {"file_bytes": bytes_of_weights(place)}

    return build


def bytes_of_weights(folder: Path) -> int:
    """Of a model's safetensors."""
    return sum(file.stat().st_size for file in weight_files(folder))


def sized(bench: Bench, built: Row) -> Row:
    """What the model in the pipeline takes: of the file that it is written to, if its format has one."""
    model: Any = component(bench.pipe)
    if layers.quant_layers(model):
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            report = inspect(folder)
            known = {
                "bits_per_weight": report.bits_per_weight,
                "file_bytes": bytes_of_weights(Path(folder)),
                "ternary_share_blocks": round(report.ternary_share_blocks, 5),
                "written": True,
            }
        return {**known, **built, "bits_per_weight": round(report.bits_per_weight, 3)}
    bits = built["bits_per_weight"]
    weights = sum(layers.flat_weight(bench.dense.get_submodule(path)).numel() for path in bench.targets)
    size = bench.file_bytes + round(weights * (bits - 16) / 8)
    return {"bits_per_weight": round(bits, 3), "file_bytes": size, "written": bits == 16}
