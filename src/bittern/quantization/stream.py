"""Quantizes a model that lies on disk, block by block: for models larger than memory, and for runs that may be killed.

The model stands on the meta device. One block's weights leave the disk, are solved, and the few-bit tensors go to a
workspace before the next block is read; a run that finds blocks in its workspace takes them from there. So the
device holds one group of layers at a time, the host one block and in the end the few-bit model, and a kill costs the
block in hand. Of a calibrated recipe the blocks are recorded in passes (`calibration`); a kill then costs the pass in
hand. A layer's result depends on its weights, what it is fed, its scheme and the seed only, so that an interrupted run
ends with the bytes of an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bittern.architectures import Job, Plan, modulated_magnitudes, plan
from bittern.checkpoints import FORMAT_VERSION, CheckpointConfig, read_headers, read_tensor, weight_files
from bittern.layers import FewBitLayer, swap
from bittern.quantization.calibration import Progress, Recorder, passes_of
from bittern.quantization.fit import Fit, foreseen
from bittern.quantization.jobs import (
    blocks_of,
    borrowed,
    check_seed,
    checkpoint_config,
    empty_layers,
    fill_meta,
    finish,
    solve_job,
)
from bittern.quantization.report import refuse_quantized
from bittern.quantization.workspace import Workspace, fingerprint
from bittern.recipes import Recipe
from bittern.solvers import Stages

CHOICE = "recipe"
"""The name under which a recipe that was bent to a size is kept beside the blocks."""


def can_stream(model: nn.Module, folder: Path) -> bool:
    """Whether the files hold every tensor of the model under its own name; diffusers' loader knows older names."""
    return read_headers(weight_files(folder)).keys() >= model.state_dict().keys()


def run_manifest(
    folder: Path,
    recipe: Recipe,
    seed: int,
    version: str,
    prompts: Sequence[str] | None = None,
    fit: int | None = None,
    others: Sequence[Path] = (),
) -> dict[str, Any]:
    """What a run is about: model, recipe, seed, prompts and versions. Two runs with equal ones may share blocks.

    Args:
        folder: The denoiser's.
        recipe: Where it is to be bent to a size, the one that was given, since the other is work to find.
        seed: As for `quantize`.
        version: Of bittern.
        prompts: That are drawn; None if nothing is.
        fit: The size.
        others: The pipeline's other components, which count where something is drawn.
    """
    drawing = [file for other in others for file in sorted(other.rglob("*")) if file.is_file()]
    return {
        "bittern": version,
        "format_version": FORMAT_VERSION,
        "model": fingerprint([folder / "config.json", *weight_files(folder)]),
        "recipe": recipe.dump(),
        "seed": seed,
        "size": fit,
        "prompts": None if prompts is None else hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "pipeline": None if prompts is None else fingerprint(drawing),
    }


def reader(model: nn.Module, folder: Path) -> Callable[[str], Tensor]:
    """Gives the values of a model's tensors by their names, from its files and in the model's dtypes."""
    headers = read_headers(weight_files(folder))
    # Noted now, since layers lose their dense weight on the way.
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return lambda name: read_tensor(headers, name).to(dtypes[name])


def choose_recipe(
    fit: Fit,
    model: nn.Module,
    folder: Path,
    workspace: Workspace,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Recipe:
    """The recipe that meets a size; that of an interrupted run, if it had come so far.

    Args:
        fit: The problem.
        model: On meta.
        folder: The model's own, with its weight files.
        workspace: Open, and of this run.
        seed: As for `quantize`.
        device: Where to work.
        progress: Called as layers are looked at.

    Raises:
        UserError: as `quantize` does, and for damaged files.
    """
    if not workspace.has(CHOICE):
        errors = foreseen(fit, model, reader(model, folder), seed=seed, device=device, progress=progress)
        workspace.save(CHOICE, {}, {"recipe": fit.choose(errors).dump()})
    return Recipe.model_validate(workspace.load(CHOICE, mapped=True)[1]["recipe"])


@torch.no_grad()
def quantize_streaming(
    model: nn.Module,
    folder: Path,
    recipe: Recipe,
    workspace: Workspace,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    recorder: Callable[[Plan], Recorder] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Makes a model few-bit while its weights are read.

    Args:
        model: On meta, as `skeleton` makes it; it becomes the few-bit model, on the CPU, ready to be saved.
        folder: The model's own, with its weight files.
        recipe: What to make of it.
        workspace: Open, and of this run.
        seed: As for `quantize`.
        device: Where layers are solved.
        recorder: Gives what finds out what a calibrated recipe must know; called only if a block is not finished.
        progress: Called as blocks are finished.

    Raises:
        UserError: as `quantize` does, and for damaged files.
    """
    check_seed(seed)
    refuse_quantized(model)
    made = plan(model, recipe)
    config = checkpoint_config(made, recipe, seed)
    read = reader(model, folder)
    blocks = blocks_of(made)
    left = [block for block in blocks if not workspace.has(block[0])]
    done = len(blocks) - len(left)
    if left:
        # Billions of weights pass here: on the device they take no time.
        magnitudes = modulated_magnitudes(made, model, lambda name: read(name).to(device))
        asked = recorder and recorder(made)
        finished: list[tuple[str, dict[str, FewBitLayer]]] = []
        if asked and recipe.predecessors == "few-bit":
            solved_before = (block for block in blocks if block not in left)
            finished = [(name, _layers(model, config, jobs, workspace.load(name)[0])) for name, jobs in solved_before]
        with passes_of(asked, left, finished) as passes:
            for members, calibration in passes:
                for name, jobs in [left[index] for index in members]:
                    if progress:
                        progress(f"solving {name.partition('.')[2]}", done, len(blocks))
                    layers: dict[str, FewBitLayer] = {}
                    notes: dict[str, dict[str, Any]] = {"errors": {}, "stages": {}}
                    for job in jobs:
                        found = calibration, magnitudes.get(job.paths[0])
                        with borrowed(model, job.paths, read, device) as modules:
                            solved, missed, staged = solve_job(job, modules, seed, *found)
                        notes["errors"].update(zip(job.paths, missed, strict=True))
                        notes["stages"].update(zip(job.paths, staged, strict=True))
                        layers.update(zip(job.paths, solved, strict=True))
                    workspace.save(name, _tensors(layers), notes)
                    done += 1
                    if asked:
                        asked.solved(layers)
                # Two passes' records would not fit.
                del calibration
    errors: dict[str, float] = {}
    stages: dict[str, Stages] = {}
    if progress:
        progress("solved", done, len(blocks))
    # Only now: the few-bit model need not be in memory beside what is recorded.
    for name, jobs in blocks:
        tensors, notes = workspace.load(name, mapped=True)
        errors.update(notes["errors"])
        stages.update(notes["stages"])
        for path, layer in _layers(model, config, jobs, tensors).items():
            swap(model, path, layer)
    fill_meta(model, read)
    finish(model, made, recipe, seed, errors, stages)
    return model


def _tensors(layers: Mapping[str, FewBitLayer]) -> dict[str, Tensor]:
    """All that a block's layers hold, by name."""
    own = {f"{path}.{leaf}": tensor for path, layer in layers.items() for leaf, tensor in layer.tensors().items()}
    return own | {f"{path}.bias": layer.bias.detach() for path, layer in layers.items() if layer.bias is not None}


def _layers(
    model: nn.Module, config: CheckpointConfig, jobs: Sequence[Job], tensors: Mapping[str, Tensor]
) -> dict[str, FewBitLayer]:
    """A block's few-bit layers by path, from what `_tensors` gave."""
    layers = empty_layers(model, config, [path for job in jobs for path in job.paths])
    for path, layer in layers.items():
        for leaf in [*layer.tensors(), *["bias"] * (layer.bias is not None)]:
            layer.load(leaf, tensors[f"{path}.{leaf}"])
    return layers
