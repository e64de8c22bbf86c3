"""Checkpoints of other engines, in and out: packed files to few-bit folders and back, a layer at a time in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bittern.checkpoints import CheckpointConfig, TensorSpec, read_headers, weight_files
from bittern.checkpoints.files import STEM, opened, streamed_file
from bittern.checkpoints.native import problem
from bittern.checkpoints.nunchaku import (
    Incoming,
    flux_names,
    flux_units,
    incoming,
    is_lite,
    lite,
    lite_groups,
    lite_units,
    original,
)
from bittern.errors import UserError
from bittern.outputs import INDEX, check_out, existing_parent, new_folder
from bittern.pipelines import denoiser_name, other_components, read_json, resolve
from bittern.quantization import Progress, Report, inspect, model_on_meta
from bittern.quantization.report import COMPONENTS


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    pipeline: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Writes a model that Nunchaku packed as a few-bit model of bittern's: all of it, or nothing.

    Args:
        source: An original file, or a folder of Nunchaku Lite's, of a model or a whole pipeline.
        out: The folder to write: a model's, or a pipeline's if the other components are known.
        pipeline: A pipeline of the same family whose other components are to be copied; a Lite pipeline has its own.
        force: Whether to replace a model that is in `out`.
        progress: Called as tensors are written.

    Raises:
        UserError: for a file that is damaged or not Nunchaku's, that does not fit its own description, or for an
            output that cannot be written.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"no file or folder {str(source)!r}: expected a .safetensors file or a Nunchaku Lite folder")
    base = None if pipeline is None else resolve(pipeline)
    check_out(out, force=force, source=path)
    if path.is_file():
        files, config, load = _original(path, base)
        name = denoiser_name(base) if base else None
    else:
        place, name = _place(path)
        files, config, load = _lite(place)
        base = base or (path if name else None)
    headers = read_headers(files)
    with opened(headers) as read:
        found = load(headers, read)
        with _folder(out, base, name, found.specs(), force) as place:
            done, total = 0, len(found.specs())
            with streamed_file(place / f"{STEM}.safetensors", found.specs()) as put:
                for tensor_name, tensor in found.tensors(read):
                    _check(tensor_name, tensor, found.config)
                    put(tensor_name, tensor)
                    done += 1
                    if progress:
                        progress("converting", done, total)
            write_config(place, config, found.config.dump())
    return inspect(Path(out).expanduser())


Load = Callable[[Any, Callable[[str], Tensor]], Incoming]


def _original(file: Path, base: Path | None) -> tuple[list[Path], dict[str, Any], Load]:
    said = original(file)
    config = said.config
    if config is None:
        if base is None:
            raise UserError(f"{file} has no config in its metadata: name a pipeline of the model with --pipeline")
        config = read_json(base / denoiser_name(base) / "config.json")
    config = _clean(config, said.class_name)
    model = model_on_meta(said.class_name, config, torch.bfloat16, f"config in {file}")

    def load(headers: Any, read: Callable[[str], Tensor]) -> Incoming:
        stored = "nvfp4" if any(spec.dtype == torch.float8_e4m3fn for _, spec in headers.values()) else "int4"
        if said.weight not in (None, stored):
            raise UserError(f"{file} says that its weights are {said.weight} and holds {stored}: fetch it again")
        units = flux_units(model, shifted=stored == "int4")
        return incoming(headers, units, shapes_of(model), read, renamed=flux_names(model), rank=said.rank)

    return [file], config, load


def _lite(place: Path) -> tuple[list[Path], dict[str, Any], Load]:
    config = read_json(place / "config.json")
    if not is_lite(config):
        raise UserError(f"{place} is not packed for Nunchaku Lite: expected quant_method 'nunchaku_lite' in config.json")
    said = lite(config["quantization_config"], str(place / "config.json"))
    class_name = str(config.get("_class_name"))
    config = _clean(config, class_name)
    model = model_on_meta(class_name, config, torch.bfloat16, str(place / "config.json"))

    def load(headers: Any, read: Callable[[str], Tensor]) -> Incoming:
        units = lite_units(model, said.targets, said.awq)
        groups = lite_groups(model, units)
        return incoming(headers, units, shapes_of(model), read, groups=groups, rank=said.rank, name="nunchaku-lite")

    return weight_files(place), config, load


def _check(name: str, tensor: Tensor, config: CheckpointConfig) -> None:
    target, _, leaf = name.rpartition(".")
    if target in config.targets and (wrong := problem(tensor, leaf, target, config)):
        raise UserError(f"tensor {name!r}, as converted: {wrong}")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters and buffers."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _clean(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """A model's config without what another library has added."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}
    return {**kept, "_class_name": class_name}


def _place(folder: Path) -> tuple[Path, str | None]:
    """Where the model of a folder is, and its name if a pipeline is around it."""
    if (folder / INDEX).is_file():
        name = denoiser_name(folder)
        return folder / name, name
    for name in COMPONENTS:
        if (folder / name / "config.json").is_file() and not (folder / "config.json").is_file():
            return folder / name, None
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model: expected config.json, or {INDEX} and {COMPONENTS[0]}")
    return folder, None


@contextmanager
def _folder(
    out: str | Path, base: Path | None, name: str | None, specs: Mapping[str, TensorSpec], force: bool
) -> Iterator[Path]:
    """The folder of a new model, with the other components of a pipeline around it if there is one."""
    others = [base / INDEX, *other_components(base, str(name))] if base else []
    needed = sum(spec.nbytes for spec in specs.values())
    free = shutil.disk_usage(existing_parent(Path(out).expanduser())).free
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB free: make room")
    with new_folder(out, force=force) as folder:
        for other in others:
            copy = shutil.copytree if other.is_dir() else shutil.copyfile
            copy(other, folder / other.name)
        place = folder / name if base and name else folder
        place.mkdir(exist_ok=True)
        yield place


def write_config(place: Path, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> None:
    """A model's `config.json`, as diffusers writes it."""
    text = json.dumps({**config, "quantization_config": quantization}, indent=2, sort_keys=True)
    (place / "config.json").write_text(text + "\n", encoding="utf-8")
