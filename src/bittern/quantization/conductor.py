"""Quantizes a model in place: plan, check, solve everything, and only then swap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from bittern import recipes
from bittern.architectures import modulated_magnitudes, plan
from bittern.errors import UserError
from bittern.layers import FewBitLayer
from bittern.quantization.jobs import (
    Progress,
    check_seed,
    check_weight,
    finish,
    solve_job,
    swap,
)
from bittern.quantization.report import Report, component, inspect, refuse_quantized
from bittern.recipes import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def quantize(
    target: DiffusionPipeline | nn.Module,
    recipe: str | Path | Recipe,
    *,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Replaces the layers of a pipeline's transformer or U-Net, or of a model, by few-bit ones.

    Every layer is solved on the device its weight is on. If anything fails, the model is as it was: layers
    are swapped only after the last one is solved.

    Args:
        target: A diffusers pipeline, or one of its models.
        recipe: The name of a recipe, the path of a YAML file, or a `Recipe`.
        prompts: Calibration prompts. The recipes of this version need none and refuse them.
        seed: The same model, recipe and seed give the same bytes on one machine with one number of threads: with
            another, the linear algebra under the SVD sums in another order.
        progress: Called as layers are solved.

    Returns:
        What every layer became; `inspect(target)` gives it again.

    Raises:
        UserError: for an unknown recipe or model, a model that is quantized or wears adapters, weights that are
            not finite or not loaded, a glob or rank that does not fit the model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    if prompts is not None:
        raise UserError(f"recipe {recipe.name} uses no prompts: leave them out")
    check_seed(seed)
    model = component(target)
    refuse_quantized(model)
    made = plan(model, recipe)
    for job in made.jobs:
        for path in job.paths:
            check_weight(path, model.get_submodule(path).weight)

    magnitudes = modulated_magnitudes(made, model, model.get_parameter)
    total = sum(len(job.paths) for job in made.jobs)
    solved: dict[str, FewBitLayer] = {}
    errors: dict[str, float] = {}
    for job in made.jobs:
        if progress:
            progress(f"solving {job.paths[0]}", len(solved), total)
        linears = [model.get_submodule(path) for path in job.paths]
        layers, missed = solve_job(job, linears, seed, magnitudes.get(job.paths[0]))
        solved.update(zip(job.paths, layers, strict=True))
        errors.update(zip(job.paths, missed, strict=True))
    for path, layer in solved.items():
        swap(model, path, layer)
    finish(model, made, recipe, seed, errors)
    if progress:
        progress("solved", total, total)
    return inspect(model)
