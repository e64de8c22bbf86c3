"""Pipelines by name: find, load, call as they were made to be called, and write whole folders or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bittern import recipes
from bittern.architectures import of_class
from bittern.checkpoints import CheckpointConfig, is_few_bit, read_headers, weight_files
from bittern.errors import UserError, did_you_mean
from bittern.quantization import Progress, Report, predict_size, quantize
from bittern.quantization.report import COMPONENTS, component
from bittern.recipes import Recipe
from bittern.trajectories import CallDefaults, defaults

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "CallDefaults",
    "check_device",
    "check_out",
    "defaults",
    "load",
    "new_folder",
    "quantize_folder",
    "resolve",
]

BUILT_IN = "tiny-flux"
INDEX = "model_index.json"


def resolve(model: str | Path) -> Path:
    """The local folder of a pipeline: a folder, `tiny-flux`, or a hub id, which is downloaded.

    Raises:
        UserError: if there is no such folder, if it is no pipeline, or the hub does not give it.
    """
    name = str(model)
    path = Path(name).expanduser()
    if name == BUILT_IN:
        from bittern import tiny_flux

        path = tiny_flux.path()
    if not path.exists():
        path = _download(name)
    if not path.is_dir():
        raise UserError(f"model {name!r} is a file: expected a pipeline folder, a hub id or {BUILT_IN}")
    if not (path / INDEX).is_file():
        raise UserError(f"folder {name!r} is not a pipeline: expected {INDEX} in it")
    return path


def load(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> DiffusionPipeline:
    """Loads a pipeline.

    Args:
        model: A folder, a hub id, or `tiny-flux`.
        dtype: What all layers but the few-bit ones compute in; None takes what the transformer is stored in.
        device: Where to put it.

    Raises:
        UserError: for an unknown model, a folder that is no pipeline or is damaged, a device that is not there.
    """
    check_device(device)
    folder = resolve(model)
    index = _read_json(folder / INDEX)
    import diffusers

    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or not hasattr(diffusers, class_name):
        raise UserError(f"{folder / INDEX} names the pipeline class {class_name!r}, which diffusers does not have")
    stored = _stored_dtype(folder / _denoiser(folder))
    with _one_line(model):
        return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype or stored).to(device)


def quantize_folder(
    model: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantizes a pipeline's transformer and writes the pipeline to `out`: all of it, or nothing.

    Only the transformer is loaded, unless the recipe is calibrated and the pipeline has to draw; the other components
    are copied as they are.

    Raises:
        UserError: as `load`, `quantize` and `new_folder` do, and if the disk is too small; what can be told
            beforehand is told before anything is solved.
    """
    check_device(device)
    source = resolve(model)
    check_out(out, force=force, source=source)
    name = _denoiser(source)
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    target = load(model, device=device) if recipe.calibrated else _load_denoiser(model, source / name).to(device)
    denoiser = component(target)
    others = [source / INDEX, *_other_components(source, name)]
    needed = predict_size(denoiser, recipe) + sum(_bytes_of(other) for other in others)
    free = shutil.disk_usage(_existing_parent(Path(out).expanduser())).free
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB free: make room")
    report = quantize(target, recipe, prompts=prompts, samples=samples, seed=seed, progress=progress)
    with new_folder(out, force=force) as folder:
        for other in others:
            copy = shutil.copytree if other.is_dir() else shutil.copyfile
            copy(other, folder / other.name)
        denoiser.save_pretrained(folder / name)
    return report


def check_out(out: str | Path, *, force: bool = False, source: Path | None = None) -> None:
    """Refuses an output folder that `new_folder` would refuse, before time is spent.

    Raises:
        UserError: if it is a file, holds something and `force` is not given, holds something that is no model,
            is the source itself or around it, or cannot be written.
    """
    path = Path(out).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"output {str(out)!r} is a file: expected a folder that is new or empty")
    if source is not None and source.resolve().is_relative_to(path):
        raise UserError(f"output {str(out)!r} would replace the model it is made from: choose another folder")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise UserError(f"output folder {str(out)!r} is not empty: choose another, or replace it with --force")
        if not any((path / name).is_file() for name in (INDEX, "config.json")):
            raise UserError(f"output folder {str(out)!r} holds no model: --force replaces only models; empty it first")
    parent = _existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output {str(out)!r} is not writable: {parent} allows no new folder; choose another place")


@contextmanager
def new_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well and vanishes when not.

    Raises:
        UserError: as `check_out` does, and if the disk is full or not writable.
    """
    check_out(out, force=force)
    path = Path(out).expanduser().resolve()
    token = secrets.token_hex(4)
    fresh, aside = (path.parent / f".{path.name}.{token}.{kind}" for kind in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        if path.exists():
            path.rename(aside)
        try:
            fresh.rename(path)
        except OSError:
            if aside.exists():
                aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except Exception as error:
        reason = _disk_problem(error)
        if reason is None:
            raise
        raise UserError(f"output {str(out)!r} cannot be written: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_device(device: str | torch.device) -> None:
    """Refuses a device that torch does not know or this machine does not have.

    Raises:
        UserError: naming the device.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is unknown: expected cpu, cuda or cuda:N") from None
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"device {str(device)!r}: torch finds no CUDA GPU here; use --device cpu")
        if (wanted.index or 0) >= count:
            raise UserError(f"device {str(device)!r}: expected cuda:0 to cuda:{count - 1}")


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UserError(f"no folder {name!r}: expected a pipeline folder, a hub id or {BUILT_IN}")
    if "/" not in name:
        raise UserError(f"unknown model {name!r}: {did_you_mean(name, [BUILT_IN])}, or give a folder or a hub id")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name))
    # The hub's client raises its own kinds, httpx's, requests' and OSError.
    except Exception as error:
        raise UserError(
            f"no folder {name!r} here, and the hub does not give a model of that name: {_first_line(error)}"
        ) from error


def _denoiser(folder: Path) -> str:
    """The name of the component that denoises."""
    index = _read_json(folder / INDEX)
    name = next((name for name in COMPONENTS if name in index), None)
    if name is None or not (folder / name / "config.json").is_file():
        raise UserError(f"{folder} has no {' or '.join(COMPONENTS)}: expected a whole pipeline; fetch it again")
    return name


def _other_components(folder: Path, denoiser: str) -> list[Path]:
    """The folders of the components that stay as they are, and the licence, which must travel with them."""
    index = _read_json(folder / INDEX)
    names = [name for name in index if name != denoiser and not name.startswith("_") and (folder / name).is_dir()]
    return [*(folder / name for name in names), *(file for file in folder.glob("LICENSE*") if file.is_file())]


def _load_denoiser(model: str | Path, folder: Path) -> nn.Module:
    import diffusers

    class_name = str(_read_json(folder / "config.json").get("_class_name"))
    of_class(class_name)
    dtype = _stored_dtype(folder)
    with _one_line(model):
        return getattr(diffusers, class_name).from_pretrained(folder, dtype=dtype)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The float type of most bytes of a model's files, few-bit layers aside.

    Reads the headers of all its files, so that a damaged one is reported before anything is loaded.
    """
    file = folder / "config.json"
    config = _read_json(file)
    targets: Collection[str] = ()
    if is_few_bit(config):
        targets = CheckpointConfig.parse(config["quantization_config"], str(file)).targets
    weight: Counter[torch.dtype] = Counter()
    for name, (_, spec) in read_headers(weight_files(folder)).items():
        path, _, leaf = name.rpartition(".")
        if spec.dtype.is_floating_point and (path not in targets or leaf == "bias"):
            weight[spec.dtype] += spec.nbytes
    return max(weight, key=weight.__getitem__, default=torch.float32)


@contextmanager
def _one_line(model: str | Path) -> Iterator[None]:
    """Turns what diffusers and transformers say about a damaged folder into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(f"model {str(model)!r} cannot be loaded: {_first_line(error)}") from error


def _bytes_of(place: Path) -> int:
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({_first_line(error)}): fetch or write it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no mapping: fetch or write it again")
    return content


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.resolve().parents if parent.exists())


def _disk_problem(error: Exception) -> str | None:
    """What the disk said, if this is the disk's error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (isinstance(error, shutil.Error) or type(error).__name__ == "SafetensorError"):
        # These two give the number only in their text.
        match = re.search(r"(?:os error|Errno) (\d+)", str(error))
        number = int(match[1]) if match else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
        return f"{os.strerror(number)}, choose another place"
    return os.strerror(number) if number else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
