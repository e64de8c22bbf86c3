"""Pipelines by name: find, load, call as they were made to be called, and write whole folders or nothing."""

from __future__ import annotations

import errno
import inspect as python_inspect
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bittern.checkpoints import CheckpointConfig, is_few_bit, read_headers, weight_files
from bittern.checkpoints.files import TensorSpec
from bittern.errors import UserError, did_you_mean
from bittern.quantization import Progress, Report, predict_size, quantize
from bittern.recipes import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BUILT_IN = "tiny-flux"
INDEX = "model_index.json"


@dataclass(frozen=True)
class CallDefaults:
    """How a pipeline wants to be called.

    Attributes:
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        steps: Denoising steps.
        max_sequence_length: Text tokens; None if the pipeline does not ask.
        guidance: Guidance scale; 0 for a model that was not trained with one.
    """

    height: int
    width: int
    steps: int
    max_sequence_length: int | None
    guidance: float


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
        dtype: What the layers in 16 bits or more compute in; None takes for each component what it is stored in.
        device: Where to put it.

    Raises:
        UserError: for an unknown model, a folder that is no pipeline or is damaged, a device that is not there.
    """
    check_device(device)
    folder = resolve(model)
    index = _read_json(folder / INDEX)
    import diffusers
    from safetensors import SafetensorError

    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or not hasattr(diffusers, class_name):
        raise UserError(f"{folder / INDEX} names the pipeline class {class_name!r}, which diffusers does not have")
    stored = _stored_dtypes(folder)
    dtypes: Any = dtype or {**stored, "default": torch.float32}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtypes)
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(f"model {str(model)!r} cannot be loaded: {_first_line(error)}") from error
    return pipe.to(device)


def defaults(pipe: DiffusionPipeline) -> CallDefaults:
    """Size, steps, text length and guidance that a pipeline was made for, from its components' configs."""
    call = python_inspect.signature(pipe.__call__).parameters
    vae, transformer = getattr(pipe, "vae", None), getattr(pipe, "transformer", None)
    size = int(vae.config.sample_size) if vae is not None else 1024
    steps, guidance = int(call["num_inference_steps"].default), float(call["guidance_scale"].default)
    if transformer is not None and transformer.config.get("guidance_embeds") is False:
        # FLUX.1-schnell was distilled to 4 steps; a small model was not distilled.
        steps, guidance = 4 if size >= 512 else 24, 0.0
    length = None
    if "max_sequence_length" in call:
        tokenizer = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
        length = min(int(call["max_sequence_length"].default), int(tokenizer.model_max_length))
    return CallDefaults(size, size, steps, length, guidance)


def quantize_folder(
    model: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Loads a pipeline, quantizes it and writes it to `out`: all of it, or nothing.

    Raises:
        UserError: as `load`, `quantize` and `new_folder` do, and if the disk is too small; what can be told
            beforehand is told before anything is solved.
    """
    source = resolve(model)
    check_out(out, force=force, source=source)
    pipe = load(source, device=device)
    others = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    others -= sum(file.stat().st_size for file in weight_files(source / "transformer"))
    needed = predict_size(pipe, recipe) + others
    free = shutil.disk_usage(_existing_parent(Path(out).expanduser())).free
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB free: make room")
    report = quantize(pipe, recipe, seed=seed, progress=progress)
    save(pipe, out, force=force)
    return report


def save(pipe: DiffusionPipeline, out: str | Path, *, force: bool = False) -> Path:
    """Writes a pipeline as a diffusers folder, whole or not at all, with the same bytes wherever it came from.

    Raises:
        UserError: as `new_folder` does.
    """
    with new_folder(out, force=force) as folder:
        pipe.save_pretrained(folder)
        _forget_origin(folder)
    return Path(out)


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


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """For each component with safetensors files, the float type that most of its bytes have.

    Reads every few-bit component's headers, so that a damaged one is reported before anything is loaded.
    """
    dtypes: dict[str, torch.dtype] = {}
    for config_file in sorted(folder.glob("*/config.json")):
        place, config = config_file.parent, _read_json(config_file)
        targets: frozenset[str] = frozenset()
        files = sorted(place.glob("*.safetensors"))
        if is_few_bit(config):
            targets = frozenset(CheckpointConfig.parse(config["quantization_config"], str(config_file)).targets)
            files = weight_files(place)
        weight: dict[torch.dtype, int] = {}
        for name, (_, spec) in read_headers(files).items():
            if spec.dtype.is_floating_point and not _belongs(name, targets):
                weight[spec.dtype] = weight.get(spec.dtype, 0) + TensorSpec(*spec).nbytes
        if weight:
            dtypes[place.name] = max(weight, key=lambda dtype: weight[dtype])
    return dtypes


def _belongs(name: str, targets: frozenset[str]) -> bool:
    path, _, leaf = name.rpartition(".")
    return path in targets and leaf != "bias"


def _forget_origin(folder: Path) -> None:
    """Removes `_name_or_path`, the folder each component was loaded from, which only its maker can use."""
    for file in [*folder.glob("*.json"), *folder.glob("*/config.json")]:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    """What the disk said, if this is the disk's error; safetensors gives the number only in its text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and type(error).__name__ == "SafetensorError":
        match = re.search(r"os error (\d+)", str(error))
        number = int(match[1]) if match else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
        return f"{os.strerror(number)}, choose another place"
    return os.strerror(number) if number else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
