"""The student: the denoiser with few-bit layers that learn, and the deployed model that it becomes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bittern.architectures import plan
from bittern.distillation.sharding import full, whole
from bittern.distillation.trainable import TrainableLayer, trainable
from bittern.layers import flat_weight, quant_layers
from bittern.quantization import quantize
from bittern.quantization.calibration import Limits
from bittern.quantization.jobs import finish
from bittern.quantization.report import COMPONENTS, Report, inspect
from bittern.recipes import Distillation, Recipe
from bittern.solvers.solution import frobenius

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

KINDS = ("codes", "scales", "others", "kept")
"""Kinds of parameters, each with a learning rate of its own."""


@dataclass(frozen=True)
class Student:
    """Two models of one meaning.

    Attributes:
        model: Learns; its parameters are float32.
        deployed: Few-bit; has what `export` wrote last.
        layers: The layers of `model` that are few-bit in `deployed`, by path.
    """

    model: nn.Module
    deployed: nn.Module
    layers: dict[str, TrainableLayer]

    def parameters(self, settings: Distillation) -> dict[str, list[nn.Parameter]]:
        """What learns, by kind; kinds whose learning rate is 0 are left out."""
        kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, TrainableLayer):
                    kind = {"latent": "codes", "gain": "scales"}.get(name, "others")
                else:
                    kind = "kept" if isinstance(module, nn.Linear | _ConvNd | nn.Embedding) else "others"
                kinds[kind].append(parameter)
        return {kind: found for kind, found in kinds.items() if found and getattr(settings, f"lr_{kind}") > 0}

    @torch.no_grad()
    def export(self) -> None:
        """Writes what was learned into the deployed model."""
        few_bit = quant_layers(self.deployed)
        for path, layer in self.layers.items():
            with whole(layer):
                layer.export(few_bit[path])
        for name, parameter in _beside(self):
            self.deployed.get_parameter(name).copy_(full(parameter))

    def block(self, path: str) -> Student:
        """A part of the student as one of its own; the tensors are the same."""
        inside = f"{path}."
        layers = {name.removeprefix(inside): layer for name, layer in self.layers.items() if name.startswith(inside)}
        return Student(self.model.get_submodule(path), self.deployed.get_submodule(path), layers)

    @torch.no_grad()
    def finish(self, teacher: nn.Module, recipe: Recipe, seed: int) -> Report:
        """Makes the deployed model one that says what it is and how far its weights are from the teacher's."""
        self.export()
        finish(self.deployed, plan(teacher, recipe), recipe, seed, self.errors(teacher))
        return inspect(self.deployed)

    @torch.no_grad()
    def errors(self, teacher: nn.Module) -> dict[str, float]:
        """How far the few-bit weights are from the teacher's, relative, by path."""
        errors: dict[str, float] = {}
        for path, layer in self.layers.items():
            weight = flat_weight(_layer(teacher, path)).float()
            with whole(layer):
                missed = frobenius(layer.flat().detach().to(weight.device) - weight)
            size = frobenius(weight)
            errors[path] = float(f"{missed / size:.6g}") if size else 0.0
        return errors


def make_student(
    pipe: DiffusionPipeline,
    teacher: nn.Module,
    recipe: Recipe,
    settings: Distillation,
    *,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    limits: Limits | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> Student:
    """A student that starts where the recipe's solver ends. Pipeline and teacher stay as they are.

    Args:
        settings: Of the training.
        pipe: The pipeline, in full precision.
        teacher: Its denoiser.
        recipe: Says what becomes few-bit, and how that is solved.
        prompts: For a solver that is calibrated.
        seed: Of the solver.
        limits: Of the memory that a calibrated solver may take.
        progress: Called as layers are solved.
    """
    solved = solve(pipe, teacher, recipe, prompts=prompts, seed=seed, limits=limits, progress=progress)
    return learner(teacher, solved, settings)


def solve(
    pipe: DiffusionPipeline,
    teacher: nn.Module,
    recipe: Recipe,
    *,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    limits: Limits | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> nn.Module:
    """The few-bit model that the recipe's solver makes of the denoiser; the arguments are those of `make_student`."""
    start = recipe.model_copy(update={"distillation": None})
    deployed = copy.deepcopy(teacher)
    with in_place_of(pipe, teacher, deployed):
        quantize(
            pipe, start, prompts=prompts if start.calibrated else None, seed=seed, limits=limits, progress=progress
        )
    return deployed


def learner(
    teacher: nn.Module, deployed: nn.Module, settings: Distillation, device: torch.device | None = None
) -> Student:
    """The student of a whole denoiser, or of one of its blocks.

    Args:
        teacher: In full precision.
        deployed: The same with few-bit layers, from which the student starts.
        settings: Of the training.
        device: Where it learns; None for where the teacher is.
    """
    reach = None if settings.mode == "scales" else settings.reach
    layers = {
        path: trainable(_layer(teacher, path), few_bit, reach).to(device or few_bit.tensors()["codes"].device)
        for path, few_bit in quant_layers(deployed).items()
    }
    # Dense weights in float32 would be most of the memory that the student takes, and are not needed.
    model = copy.deepcopy(teacher, {id(_layer(teacher, path)): layer for path, layer in layers.items()})
    model = model.to(device).float().train()
    student = Student(model, deployed, layers)
    # What lies beside the layers may have learned already.
    for name, parameter in _beside(student):
        parameter.data.copy_(deployed.get_parameter(name))
    learned = {id(parameter) for found in student.parameters(settings).values() for parameter in found}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learned)
    return student


def _beside(student: Student) -> list[tuple[str, nn.Parameter]]:
    """Parameters of no few-bit layer, by name."""
    own = {id(parameter) for layer in student.layers.values() for parameter in layer.parameters()}
    return [(name, parameter) for name, parameter in student.model.named_parameters() if id(parameter) not in own]


@contextmanager
def in_place_of(pipe: DiffusionPipeline, teacher: nn.Module, other: nn.Module) -> Generator[None]:
    """The pipeline with another denoiser for the time of the block."""
    name = next(name for name in COMPONENTS if getattr(pipe, name, None) is teacher)
    setattr(pipe, name, other)
    try:
        yield
    finally:
        setattr(pipe, name, teacher)


def _layer(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def copy_to(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Writes values into tensors."""
    torch._foreach_copy_(list(tensors), list(values))
