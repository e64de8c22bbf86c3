"""One job of a plan: linears in, few-bit layers out. In-place quantization and loading share it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bittern.architectures import Job, Plan
from bittern.checkpoints import CheckpointConfig, Target, TensorSpec, is_leaf, on_disk
from bittern.errors import UnusableModel, UserError
from bittern.layers import FewBitLayer, QuantConv2d, QuantLinear, flat_weight, join_group
from bittern.quantization.calibration import Calibration
from bittern.quantization.memory import is_felt
from bittern.recipes import Recipe, needs_data, solves_with_data
from bittern.solvers import SolverOptions, Stages, mean_error, relative_error, solve, solve_calibrated, solve_ternary


def blocks_of(plan: Plan) -> list[tuple[str, list[Job]]]:
    """The jobs of a plan by block, with a name for each that is its own.

    A block may come in several pieces where a kept layer of another kind lies between them.
    """
    parents = [str(getattr(plan.architecture.site(job.paths[0]), "parent", "")) for job in plan.jobs]
    pieces = groupby(zip(parents, plan.jobs, strict=True), lambda pair: pair[0])
    return [(f"{index:04d}.{parent}", [job for _, job in pairs]) for index, (parent, pairs) in enumerate(pieces)]


def check_seed(seed: int) -> None:
    """Refuses what is not a usable seed.

    Raises:
        UserError: if it is not a whole number from 0 to 2**31 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise UserError(f"seed {seed!r}: expected a whole number from 0 to {2**31 - 1}")


def refuse_training(recipe: Recipe) -> None:
    """Refuses a recipe that is more than solved.

    Raises:
        UserError: naming what trains.
    """
    if recipe.distillation is not None:
        raise UserError(f"recipe {recipe.name} trains the whole model: call bittern.distill(pipe, ...) on a pipeline")


def check_weight(path: str, weight: torch.Tensor) -> None:
    """Refuses a weight that is not there or not finite.

    Raises:
        UserError: naming the layer; `UnusableModel` for one that is not finite.
    """
    if weight.is_meta:
        raise UserError(f"the weight of {path} is not loaded: turn off offloading and load the model whole")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise UnusableModel(f"{bad} weights of {path} are NaN or infinite: expected finite ones; mend the model first")


@torch.no_grad()
def solve_job(
    job: Job,
    modules: Sequence[nn.Linear | nn.Conv2d],
    seed: int,
    calibration: Calibration | None = None,
    magnitudes: Float[Tensor, " k"] | None = None,
) -> tuple[list[FewBitLayer], list[float], list[Stages]]:
    """The layers that replace a job's linears or convolution, their relative weight errors, and their outputs'.

    The result depends on the arguments, not on the order in which jobs are done. Magnitudes are those of
    `architectures.modulated_magnitudes`, for a job that asks for them.

    Raises:
        UserError: as the solvers do, and if the job needs data and there is none.
    """
    weights = [flat_weight(module) for module in modules]
    if magnitudes is not None:
        magnitudes = magnitudes.to(weights[0].device)
    options, stages = SolverOptions(**job.solver), [Stages() for _ in job.paths]
    given = job.scheme, options, job.segments, own_seed(job, seed), job.paths
    statistics = None
    if needs_data(job.solver):
        if calibration is None:
            raise UserError(
                f"{job.paths[0]} is solved with data: load the model whole and call bittern.quantize(pipe, ...)"
            )
        statistics = calibration.statistics[job.paths[0]].to(weights[0].device)
    if statistics is None or not solves_with_data(job.solver):
        solutions = solve(weights, *given, magnitudes)
        if statistics is not None:
            solutions = [
                replace(solution, bias=mean_error(weight, solution, statistics.rows, job.scheme))
                for weight, solution in zip(weights, solutions, strict=True)
            ]
    elif job.scheme.weight == "ternary":
        solutions, stages = solve_ternary(weights, statistics, *given)
    else:
        felt = [calibration.sensitivity[path].to(weights[0].device) for path in job.paths] if is_felt(job) else None
        solutions, stages = solve_calibrated(weights, statistics, *given, felt)
    layers = [
        few_bit_class(module).from_solution(module, job.scheme, job.segments, solution)
        for module, solution in zip(modules, solutions, strict=True)
    ]
    if len(layers) > 1:
        join_group(layers)
    errors = [relative_error(weight, solution) for weight, solution in zip(weights, solutions, strict=True)]
    # Six digits are plenty, and short to write.
    return layers, [float(f"{error:.6g}") for error in errors], stages


def own_seed(job: Job, seed: int) -> int:
    """A job's seed, whatever others are solved before it."""
    return (seed << 32) | zlib.crc32(job.paths[0].encode())


@contextmanager
def borrowed(
    model: nn.Module, paths: Sequence[str], read: Callable[[str], Tensor], device: str | torch.device | None = None
) -> Iterator[list[Any]]:
    """Layers with weights and biases that are read for them and let go again.

    Args:
        model: Has the layers; it may be on meta.
        paths: Of the layers.
        read: Gives a parameter's values by its name.
        device: Where they are wanted; None for where they are.

    Raises:
        UserError: for a weight that is not there or not finite.
    """
    modules: list[Any] = [model.get_submodule(path) for path in paths]
    own = [(module.weight, module.bias) for module in modules]
    try:
        for path, module in zip(paths, modules, strict=True):
            weight = read(f"{path}.weight")
            weight = weight if device is None else weight.to(device)
            check_weight(path, weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                bias = read(f"{path}.bias")
                module.bias = nn.Parameter(bias if device is None else bias.to(device), requires_grad=False)
        yield modules
    finally:
        for module, (weight, bias) in zip(modules, own, strict=True):
            module.weight, module.bias = weight, bias


def few_bit_class(module: nn.Module) -> type[QuantLinear] | type[QuantConv2d]:
    """What takes the place of a module."""
    return QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear


def empty_layers(model: nn.Module, config: CheckpointConfig, paths: Iterable[str]) -> dict[str, FewBitLayer]:
    """Few-bit layers on meta for these targets, groups joined; they are not in the model yet.

    A group is in `paths` as a whole or not at all.
    """
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    layers: dict[str, FewBitLayer] = {
        path: few_bit_class(module).like(
            module, config.scheme(path), config.k_segments(path), bias=config.targets[path].bias or None
        )
        for path, module in modules.items()
    }
    for group in config.groups:
        if group[0] in layers:
            join_group([layers[path] for path in group])
    return layers


def check_targets(model: nn.Module, config: CheckpointConfig) -> None:
    """Refuses a config whose targets are not the model's.

    Args:
        model: Before its layers became few-bit; it may be on meta.
        config: Of a checkpoint.

    Raises:
        UserError: for the first target that is no such layer of the model.
    """
    for path, target in config.targets.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Conv2d if target.kernel else nn.Linear):
            what = "convolution" if target.kernel else "linear"
            raise UserError(f"target {path!r} is no {what} of {type(model).__name__}: the config is another model's")
        n, *inputs = module.weight.shape
        shape, kernel = (n, math.prod(inputs)), tuple(inputs[1:]) or None
        if shape != target.shape or kernel != target.kernel:
            raise UserError(
                f"target {path!r} has shape {list(target.shape)}{_kernel(target.kernel)}: expected "
                f"{list(shape)}{_kernel(kernel)}, as config.json describes the model"
            )


def _kernel(kernel: tuple[int, ...] | None) -> str:
    return f" and kernel {list(kernel)}" if kernel else ""


def other_shapes(model: nn.Module, config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of what a model's checkpoint holds beside the targets' few-bit tensors.

    Args:
        model: As for `check_targets`.
        config: Of the checkpoint.
    """
    state = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    return {name: spec.shape for name, spec in on_disk(state, config).items() if not is_leaf(name, config)}


def fill_meta(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Gives every parameter and buffer that is still on meta its values, by name."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    value = read(f"{path}.{leaf}" if path else leaf)
                    held[leaf] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def finish(
    model: nn.Module,
    made: Plan,
    recipe: Recipe,
    seed: int,
    errors: Mapping[str, float],
    stages: Mapping[str, Stages] | None = None,
) -> None:
    """Makes a model whose few-bit layers are in place one that diffusers saves as such, and runs groups as one."""
    from diffusers.quantizers import DiffusersAutoQuantizer

    # Diffusers' registry knows which class carries the config; nothing here depends on its internals.
    quantizer = DiffusersAutoQuantizer.from_config(
        checkpoint_config(made, recipe, seed, errors, stages).dump(), pre_quantized=True
    )
    made.architecture.install(model)
    quantizer.attach(model)


def checkpoint_config(
    plan: Plan,
    recipe: Recipe,
    seed: int,
    errors: Mapping[str, float] | None = None,
    stages: Mapping[str, Stages] | None = None,
) -> CheckpointConfig:
    """The `quantization_config` of a plan that has been carried out (or, without errors, will be)."""
    schemes = list(dict.fromkeys(job.scheme for job in plan.jobs))
    order = [(job, path, shape) for job in plan.jobs for path, shape in zip(job.paths, job.shapes, strict=True)]
    return CheckpointConfig(
        recipe=recipe.dump(),
        seed=seed,
        schemes=tuple(schemes),
        targets={
            path: Target(
                scheme=schemes.index(job.scheme), shape=shape, kernel=job.kernel, bias=job.solver["bias_correction"]
            )
            for job, path, shape in order
        },
        groups=tuple(job.paths for job in plan.jobs if len(job.paths) > 1),
        segments={path: job.segments for job, path, _ in order if len(job.segments) > 1 and not job.kernel},
        errors={path: errors[path] for _, path, _ in order} if errors else {},
        stages={path: stages[path] for _, path, _ in order if stages.get(path)} if stages else {},
    )
