"""Quantizes a model in place: plan, check, solve everything, and only then swap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from bittern import recipes
from bittern.architectures import Plan, modulated_magnitudes, plan
from bittern.errors import UserError
from bittern.layers import FewBitLayer, swap
from bittern.quantization.calibration import Progress, Recorder, passes_of, recorder_of
from bittern.quantization.fit import Fit, OnFit, foreseen
from bittern.quantization.jobs import (
    blocks_of,
    check_seed,
    check_weight,
    finish,
    refuse_training,
    solve_job,
)
from bittern.quantization.memory import Limits, memory_told
from bittern.quantization.report import Report, component, growth, inspect, predict_size, refuse_quantized, whole_size
from bittern.recipes import Recipe
from bittern.scene_prompts import held_out_among
from bittern.solvers import Stages
from bittern.trajectories import check_prompts, default_prompts, defaults

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def quantize(
    target: DiffusionPipeline | nn.Module,
    recipe: str | Path | Recipe,
    *,
    prompts: Sequence[str] | None = None,
    samples: int | None = None,
    fit: str | int | None = None,
    seed: int = 0,
    limits: Limits | None = None,
    progress: Progress | None = None,
    on_fit: OnFit | None = None,
    say: Callable[[str], object] | None = None,
) -> Report:
    """Replaces the layers of a pipeline's transformer or U-Net, or of a model, by few-bit ones.

    Every layer is solved on the device its weight is on. If anything fails, the model is as it was: layers
    are swapped only after the last one is solved.

    Args:
        target: A diffusers pipeline, or one of its models.
        recipe: The name of a recipe, the path of a YAML file, or a `Recipe`.
        prompts: Calibration prompts, for a recipe that is calibrated; None takes the pipeline's own or the bundled
            ones. A data-free recipe refuses them.
        samples: (prompt, step) pairs to calibrate with, in place of the recipe's own number; as many as there are, if
            they are fewer, which the report's recipe then says.
        fit: The size that the weight file is to have at most, in bytes or as "6.0GiB": ranks, and layers that keep 16
            bits, are chosen to meet it with the least error (see `quantization.fit`).
        seed: The same model, recipe and seed give the same bytes on one machine with one number of threads: with
            another, the linear algebra under the SVD sums in another order.
        limits: Of the memory that calibration may take; None for what `Limits.of` gives. The model itself stays where
            it is.
        progress: Called as layers are solved.
        on_fit: Called with the recipe that was found to meet `fit`, and the size that it will give, before anything is
            solved.
        say: Called with lines that a person should read.

    Returns:
        What every layer became; `inspect(target)` gives it again.

    Raises:
        UserError: for an unknown recipe or model, a model that is quantized or wears adapters, weights that are
            not finite or not loaded, a glob or rank that does not fit the model; for a calibrated recipe also prompts
            that are unusable, a model without its pipeline, and one that gives NaN.
    """
    recipe = with_samples(recipe, prompts, samples)
    refuse_training(recipe)
    prompts = None if prompts is None else check_prompts(prompts)
    check_seed(seed)
    model = component(target)
    refuse_quantized(model)
    made = plan(model, recipe)
    for job in made.jobs:
        for path in job.paths:
            check_weight(path, model.get_submodule(path).weight)

    if say and fit is None and (grown := growth(whole_size(model), predict_size(model, recipe))):
        say(grown)
    recorder = None
    if recipe.calibrated:
        if not isinstance(target, nn.Module):
            prompts = default_prompts(target.config.get("_name_or_path")) if prompts is None else prompts
            recipe = calibrated_with(recipe, prompts, defaults(target).steps, say)
        recorder = recorder_of(target, model, recipe, prompts, seed, limits, progress)
    if fit is not None:
        wanted = Fit.of(model, recipe, fit)
        recipe = wanted.choose(foreseen(wanted, model, model.get_parameter, seed=seed, progress=progress))
        made = plan(model, recipe)
        if on_fit:
            on_fit(recipe, predict_size(model, recipe))
    carry_out(made, model, recipe, seed, recorder, progress)
    return inspect(model)


def carry_out(
    made: Plan,
    model: nn.Module,
    recipe: Recipe,
    seed: int,
    recorder: Recorder | None = None,
    progress: Progress | None = None,
) -> None:
    """Makes a model few-bit, all of it or nothing.

    Args:
        made: What to do.
        model: In full precision.
        recipe: That the plan is made from.
        seed: As for `quantize`.
        recorder: Of that model, for a recipe that is calibrated.
        progress: Called as layers are solved.

    Raises:
        UserError: as the recorder and the solvers do.
    """
    magnitudes = modulated_magnitudes(made, model, model.get_parameter)
    blocks = blocks_of(made)
    total = sum(len(job.paths) for job in made.jobs)
    solved: dict[str, FewBitLayer] = {}
    errors: dict[str, float] = {}
    stages: dict[str, Stages] = {}
    with memory_told(), passes_of(recorder, blocks) as passes:
        for members, calibration in passes:
            for job in [job for index in members for job in blocks[index][1]]:
                if progress:
                    progress(f"solving {job.paths[0]}", len(solved), total)
                modules = [model.get_submodule(path) for path in job.paths]
                layers, missed, staged = solve_job(job, modules, seed, calibration, magnitudes.get(job.paths[0]))
                solved.update(zip(job.paths, layers, strict=True))
                errors.update(zip(job.paths, missed, strict=True))
                stages.update(zip(job.paths, staged, strict=True))
                if recorder:
                    recorder.solved(dict(zip(job.paths, layers, strict=True)))
            # Two passes' records would not fit.
            del calibration
    for path, layer in solved.items():
        swap(model, path, layer)
    finish(model, made, recipe, seed, errors, stages)
    if progress:
        progress("solved", total, total)


def with_samples(recipe: str | Path | Recipe, prompts: Sequence[str] | None, samples: int | None) -> Recipe:
    """The recipe that a caller means, with a number of samples of the caller's.

    Raises:
        UserError: for an unknown recipe, and for prompts or samples that a recipe without data has no use for.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    if not recipe.calibrated and (prompts is not None or samples is not None):
        raise UserError(f"recipe {recipe.name} uses no prompts: leave them out")
    return recipe if samples is None else recipe.override(samples=samples)


def calibrated_with(
    recipe: Recipe, prompts: Sequence[str], steps: int | None, say: Callable[[str], object] | None
) -> Recipe:
    """A calibrated recipe with no more samples than can be drawn.

    Args:
        recipe: Of any number.
        prompts: To draw.
        steps: Of a trajectory; None if they are not known.
        say: Called with a line about samples that cannot be drawn, and one about prompts that are held out for
            evaluation: what is calibrated with them is judged too well.
    """
    say = say or (lambda _line: None)
    if found := held_out_among(prompts):
        say(
            f"warning: {len(found)} of {len(prompts)} calibration prompts are held out for evaluation, {found[0]!r} "
            "among them: the scenes suite will judge this model too well; take other prompts"
        )
    most = len(prompts) * (steps or recipe.samples)
    if recipe.samples <= most:
        return recipe
    say(f"{recipe.samples} samples: prompts x steps are {len(prompts)} x {steps} = {most}, and all of them are taken")
    own = recipe.name.replace(f"samples={recipe.samples}", f"samples={most}")
    return recipe.model_copy(update={"samples": most, "name": own})
