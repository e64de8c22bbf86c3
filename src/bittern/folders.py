"""Quantizing from folder to folder: whole pipelines in, whole pipelines out, and what an interrupted run leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

import bittern
from bittern.architectures import Plan
from bittern.checkpoints import weight_files
from bittern.distillation import card_section, distill, sharding, training_report
from bittern.errors import UnusableModel, UserError
from bittern.outputs import INDEX, bytes_of, check_out, disk_problem, existing_parent, new_folder
from bittern.pipelines import (
    check_device,
    denoiser_name,
    folder_dtype,
    load,
    load_denoiser,
    load_with,
    one_line,
    other_components,
    quick_dtype,
    resolve,
    steps_made_for,
)
from bittern.quantization import Progress, Report, component, inspect, model_card, predict, predict_size, quantize
from bittern.quantization.calibration import Recorder
from bittern.quantization.conductor import calibrated_with, with_samples
from bittern.quantization.fit import Fit, OnFit
from bittern.quantization.memory import Limits, memory_told, solving_bytes
from bittern.quantization.preview import skeleton, stored_dtype
from bittern.quantization.report import growth, whole_size
from bittern.quantization.stored import Stored, keep_samples, kept_samples
from bittern.quantization.stream import CHOICE, can_stream, choose_recipe, quantize_streaming, run_manifest
from bittern.quantization.workspace import SAMPLES, Workspace
from bittern.recipes import Recipe
from bittern.trajectories import check_prompts, default_prompts


def quantize_folder(
    model: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    samples: int | None = None,
    fit: str | int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    force: bool = False,
    restart: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
    on_fit: OnFit | None = None,
    say: Callable[[str], object] | None = None,
) -> Report:
    """Quantizes a pipeline's transformer or U-Net and writes the pipeline to `out`: all of it, or nothing.

    The model is read, solved and kept block by block (see `quantization.stream`): finished blocks lie in
    `workspace_of(out)` until `out` is written, and a run that was killed goes on from them when it is called again.
    The other components are copied as they are. For a calibrated recipe the pipeline is loaded part by part, to draw,
    and its blocks are recorded in passes (see `quantization.calibration`); the samples that it drew are kept, too.
    For a recipe that trains the pipeline is loaded whole (see `distillation`); what it drew, and the training, are kept
    every few minutes.

    Args:
        model: A folder, a hub id, or a built-in name.
        recipe: The name of a recipe, the path of a YAML file, or a `Recipe`.
        out: The folder to write.
        prompts: To calibrate with; by default the pipeline's own, or the bundled ones. Only for calibrated recipes.
        samples: (prompt, step) pairs to calibrate with; by default the recipe's number.
        fit: The size that the denoiser's weight file is to have at most, as for `quantize`.
        seed: As for `quantize`.
        device: Where layers are solved, and where a calibrated recipe's pipeline draws.
        force: Whether to replace a model that is in `out`.
        restart: Whether to throw away what an unfinished run has left.
        limits: Of the memory that calibration may take; None for what `Limits.of` gives.
        progress: Called as blocks are finished.
        on_fit: Called with the recipe that was found to meet `fit`, and the size of the file it will give, before
            anything is solved.
        say: Called with lines about a training, and others that a person should read.

    Raises:
        UserError: as `load`, `quantize` and `new_folder` do, if the disk is too small, or if an unfinished run for
            `out` was about something else; what can be told beforehand is told before anything is solved.
    """
    check_device(device)
    recipe = with_samples(recipe, prompts, samples)
    source = resolve(model)
    check_out(out, force=force, source=source)
    place = source / denoiser_name(source)
    with one_line(f"model {str(model)!r}"):
        stored_dtype(place)  # a damaged file is told as such, before anything is made of its config
        blank, _ = skeleton(place, str(model))
    others = [source / INDEX, *other_components(source, place.name)]
    work = workspace_of(out)
    if recipe.calibrated:
        prompts = default_prompts(source) if prompts is None else check_prompts(prompts)
    if recipe.distillation is not None:
        if fit is not None:
            raise UserError(f"recipe {recipe.name} trains a model of one size: leave out --fit")
        return _distill_folder(
            model, recipe, out, prompts, seed, device, force, restart, limits, progress, say or (lambda _line: None)
        )
    if recipe.calibrated:
        recipe = calibrated_with(recipe, prompts or [], steps_made_for(source, blank), say)
    wanted = None if fit is None else Fit.of(blank, recipe, fit)
    # Finished blocks stay until the whole is written.
    if wanted is None:
        foreseen = predict(blank, recipe)
        size, solved = foreseen.file_bytes, sum(row.bytes for row in foreseen.rows)
        if say and (grown := growth(whole_size(blank), size)):
            say(grown)
    else:
        size = solved = wanted.size
    needed = size + solved + sum(bytes_of(other) for other in others) - (bytes_of(work) if work.exists() else 0)
    free = shutil.disk_usage(existing_parent(work)).free
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB free: make room")
    if not can_stream(blank, place):
        target = load(model, device=device) if recipe.calibrated else load_denoiser(model, place).to(device)
        report = quantize(
            target, recipe, prompts=prompts, fit=fit, seed=seed, limits=limits, progress=progress, on_fit=on_fit
        )
        _write(component(target), model, out, others, report, place, seed, force)
        return report

    def recorder(made: Plan, dtype: torch.dtype) -> Recorder:
        allowed = limits or Limits.of(device)
        source = Stored(
            lambda parts: load_with(model, parts, dtype), lambda: load_denoiser(model, place, dtype),
            skeleton(place)[0], place.name,
            [other.name for other in others if other.name.startswith("text_encoder")], made,
            prompts=prompts or [], samples=recipe.samples, seed=seed, device=device, limits=allowed,
            beside=solving_bytes(made.jobs, recipe.rows) if recipe.predecessors == "few-bit" else 0, progress=progress,
        )  # fmt: skip
        return Recorder(
            source, recipe, dtype.itemsize, allowed, seed,
            states=kept_samples(workspace), keep=lambda states: keep_samples(workspace, states), progress=progress,
        )  # fmt: skip

    manifest = run_manifest(place, recipe, seed, bittern.__version__, prompts, wanted and wanted.size, others)
    recording = None
    if recipe.calibrated:
        dtype = quick_dtype(source, device)
        manifest["computes in"] = str(dtype).removeprefix("torch.")
        recording = partial(recorder, dtype=dtype)
    with Workspace(work, manifest, restart=restart) as workspace:
        with _kept_if_worth_it(workspace, out), memory_told():
            if wanted is not None:
                recipe = choose_recipe(wanted, blank, place, workspace, seed=seed, device=device, progress=progress)
                if on_fit:
                    on_fit(recipe, predict_size(blank, recipe))
            quantize_streaming(
                blank, place, recipe, workspace, seed=seed, device=device,
                recorder=recording, progress=progress,
            )  # fmt: skip
            report = inspect(blank)
            _write(blank, model, out, others, report, place, seed, force)
        workspace.remove()
    return report


def _distill_folder(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    prompts: Sequence[str] | None,
    seed: int,
    device: str | torch.device,
    force: bool,
    restart: bool,
    limits: Limits | None,
    progress: Progress | None,
    say: Callable[[str], object],
) -> Report:
    """`quantize_folder` for a recipe that trains, in one of several processes too: the first one writes."""
    source = resolve(model)
    place = source / denoiser_name(source)
    others = [source / INDEX, *other_components(source, place.name)]
    given = default_prompts(source) if prompts is None else check_prompts(prompts)
    in_turn = recipe.distillation is not None and recipe.distillation.mode == "blocks"
    with sharding.joined(device) as device:
        manifest = {
            **run_manifest(place, recipe, seed, bittern.__version__, given, others=others),
            **({"processes": sharding.count()} if sharding.count() > 1 else {}),
        }
        work = workspace_of(out) / (f"process-{sharding.rank()}" if sharding.rank() else "")
        with Workspace(work, manifest, restart=restart) as workspace:
            try:
                with memory_told():
                    # CPUs multiply 16-bit numbers slowly; what learns is float32 in any case.
                    dtype = torch.float32 if device.type == "cpu" else None
                    pipe = load(model, dtype=dtype, device="cpu" if in_turn else device)
                    solved = _solved(place, recipe, workspace, seed, device, progress) if in_turn else None
                    done = distill(
                        pipe,
                        recipe,
                        prompts=given,
                        seed=seed,
                        workspace=workspace,
                        device=device,
                        solved=None if solved is None else nn.Module.to(solved, dtype),
                        limits=limits,
                        progress=progress,
                        say=say,
                    )
            except BaseException:
                # A mistake that is mended makes another run of it: nothing may stand in its way but work.
                if not any(workspace.folder.glob("*.safetensors")):
                    workspace.remove()
                raise
            # Diffusers' own `to` refuses quantized models, whose layers here know what not to cast.
            nn.Module.to(done.model, folder_dtype(place))
            report = inspect(done.model)
            if sharding.rank() == 0:
                files, section = training_report(done.log), card_section(done.log)
                _write(done.model, model, out, others, report, place, seed, force, files, section)
            sharding.wait()
            workspace.remove()
    return report


def _solved(
    place: Path, recipe: Recipe, workspace: Workspace, seed: int, device: torch.device, progress: Progress | None
) -> nn.Module | None:
    """The few-bit model from which blocks start, made while its weights are read; None where it must be in memory."""
    start = recipe.model_copy(update={"distillation": None})
    with one_line(place):
        blank, _ = skeleton(place)
    if start.calibrated or not can_stream(blank, place):
        return None
    return quantize_streaming(blank, place, start, workspace, seed=seed, device=device, progress=progress)


def workspace_of(out: str | Path) -> Path:
    """Where an unfinished run for `out` keeps its blocks."""
    path = Path(out).expanduser().resolve()
    return path.with_name(f".{path.name}.unfinished")


def _write(
    denoiser: nn.Module,
    model: str | Path,
    out: str | Path,
    others: Sequence[Path],
    report: Report,
    place: Path,
    seed: int,
    force: bool,
    files: Mapping[str, str] | None = None,
    section: str = "",
) -> None:
    """The whole few-bit pipeline: its denoiser, copies of the other components, its card with a section more, and more
    texts by the names of their files.
    """
    before = sum(file.stat().st_size for file in weight_files(place))
    card = model_card(str(model), place.parent, report, before=before, seed=seed, version=bittern.__version__)
    with new_folder(out, force=force) as folder:
        for other in others:
            copy = shutil.copytree if other.is_dir() else shutil.copyfile
            copy(other, folder / other.name)
        denoiser.save_pretrained(folder / place.name)
        for name, text in {"README.md": card + section, **(files or {})}.items():
            (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def _kept_if_worth_it(workspace: Workspace, out: str | Path) -> Iterator[None]:
    """Leaves finished blocks behind for the next run, and samples where no mistake is to be mended first."""
    try:
        yield
    except BaseException as error:
        mistake = isinstance(error, UserError) and not isinstance(error.__cause__, torch.OutOfMemoryError)
        begun = not mistake and (workspace.has(SAMPLES) or workspace.has(CHOICE))
        if isinstance(error, UnusableModel) or not (workspace.finished or begun):
            workspace.remove()
        finished = workspace.finished
        cause = error.__cause__ if isinstance(error, UserError) and isinstance(error.__cause__, Exception) else error
        reason = disk_problem(cause) if isinstance(error, UserError | OSError | SafetensorError) else None
        if reason is not None:
            left = (
                f"{finished} finished blocks are kept, run the same command again"
                if finished
                else f"what was drawn is kept in {workspace.folder}"
                if begun
                else "nothing is left behind"
            )
            raise UserError(f"output {str(out)!r} cannot be written: {reason}; {left}") from error
        if isinstance(error, UserError) and finished:
            raise UserError(f"{error}; {finished} finished blocks are kept for the same command") from error
        raise
