"""Checkpoints of other engines, in and out: packed files to few-bit folders and back, a layer at a time in memory."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bittern.checkpoints import (
    CheckpointConfig,
    TensorSpec,
    check_headers,
    check_values,
    is_few_bit,
    read_headers,
    weight_files,
)
from bittern.checkpoints.files import MEND, STEM, opened, streamed_file
from bittern.checkpoints.native import Headers, check_value, is_leaf
from bittern.checkpoints.nunchaku import (
    MODEL_CLASSES,
    NEWER,
    OLDER,
    Incoming,
    Lite,
    Outgoing,
    describe,
    flux_names,
    flux_units,
    incoming,
    is_lite,
    lite,
    lite_groups,
    lite_units,
    original,
    outgoing,
)
from bittern.errors import UserError, did_you_mean
from bittern.outputs import INDEX, check_file_out, check_out, disk_problem, existing_parent, new_folder
from bittern.pipelines import BUILT_IN, denoiser_name, other_components, read_json, resolve
from bittern.quantization import Progress, Report, inspect, model_on_meta
from bittern.quantization.report import COMPONENTS
from bittern.threads import one_thread

Read = Callable[[str], Tensor]


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
    path = _found(source)
    if not path.exists():
        raise UserError(f"no file or folder {str(source)!r}: expected a .safetensors file or a Nunchaku Lite folder")
    base = None if pipeline is None else resolve(pipeline)
    _check_folder(out, force, path)
    if path.is_file():
        files, config, load = _original(path, base)
        name = denoiser_name(base) if base else None
    else:
        place, name = _place(path)
        files, config, load = _lite(place)
        base, name = base or (path if name else None), denoiser_name(base) if base else name
    if base is not None:
        _check_family(base, str(name), str(config["_class_name"]))
    headers = read_headers(files)
    with opened(headers) as read:
        found = load(headers, read)
        with _folder(out, base, name, found.specs(), force) as place:
            tensors = _checked(found.tensors(read), found.config)
            _write(place / f"{STEM}.safetensors", found.specs(), tensors, progress)
            write_config(place, config, found.config.dump())
    return inspect(Path(out).expanduser())


def _found(source: str | Path) -> Path:
    """A file or folder, or that of an embedded model."""
    path = Path(source).expanduser()
    return resolve(source) if not path.exists() and str(source) in BUILT_IN else path


def _check_family(pipeline: Path, name: str, class_name: str) -> None:
    """Refuses a pipeline around another kind of model: it would be written and could not be loaded."""
    own = read_json(pipeline / name / "config.json").get("_class_name")
    if own != class_name:
        raise UserError(f"{pipeline} has a {own} as its {name}: expected a pipeline with a {class_name}")


Load = Callable[[Headers, Read], Incoming]


def _original(file: Path, base: Path | None) -> tuple[list[Path], dict[str, Any], Load]:
    said = original(file)
    class_name, config, where = said.class_name, said.config, f"config in {file}"
    if class_name is None or config is None:
        if base is None:
            lacking = "names no model_class" if class_name is None else "has no config"
            raise UserError(f"{file} {lacking} in its metadata: name a pipeline of the model with --pipeline")
        place = base / denoiser_name(base) / "config.json"
        own = read_json(place)
        class_name = class_name or str(own.get("_class_name"))
        _check_family(base, denoiser_name(base), class_name)
        config, where = (own, str(place)) if config is None else (config, where)
    _check_original(class_name)
    model, config = _model(class_name, config, [file], where)

    def load(headers: Headers, read: Read) -> Incoming:
        stored = "nvfp4" if any(spec.dtype == torch.float8_e4m3fn for _, spec in headers.values()) else "int4"
        units = flux_units(model, shifted=stored == "int4")
        shapes, names = shapes_of(model), flux_names(model)
        return incoming(headers, units, shapes, read, renamed=names, weight=said.weight, rank=said.rank)

    return [file], config, load


def _lite(place: Path) -> tuple[list[Path], dict[str, Any], Load]:
    config = read_json(place / "config.json")
    if is_few_bit(config):
        raise UserError(f"{place} is a few-bit model of bittern's: expected --to with the format to convert it to")
    if not is_lite(config):
        raise UserError(f"{place} is not packed for Nunchaku Lite: its config.json has no such quant_method")
    said = lite(config["quantization_config"], str(place / "config.json"))
    class_name = str(config.get("_class_name"))
    model, config = _model(class_name, config, weight_files(place), str(place / "config.json"))

    def load(headers: Headers, read: Read) -> Incoming:
        units = lite_units(model, said.targets, said.awq)
        groups, shapes = lite_groups(model, units), shapes_of(model)
        return incoming(headers, units, shapes, read, groups=groups, **said.expected, name="nunchaku-lite")

    return weight_files(place), config, load


@dataclass(frozen=True)
class Exported:
    """What was written for another engine.

    Attributes:
        layers: Targets.
        rank: Of the branches.
        bytes: Of the weight file.
        notes: What a person should know of it.
    """

    layers: int
    rank: int
    bytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**asdict(self), "notes": list(self.notes)}


TARGETS = {"nunchaku-lite": "Nunchaku Lite", "nunchaku": "Nunchaku"}
"""The formats that `export_checkpoint` writes, and what messages call them."""


def export_checkpoint(
    source: str | Path, out: str | Path, to: str, *, force: bool = False, progress: Progress | None = None
) -> Exported:
    """Writes a few-bit model of bittern's as Nunchaku packs it, without requantizing: all of it, or nothing.

    Args:
        source: A few-bit folder, of a model or of a whole pipeline.
        out: The folder to write; for "nunchaku" the .safetensors file.
        to: "nunchaku-lite", whose folder diffusers reads, or "nunchaku", one file of a FLUX model.
        force: Whether to replace what is there: a model's folder, or the file.
        progress: Called as tensors are written.

    Raises:
        UserError: with the reason, for a model that the format cannot hold; for a source that is no few-bit model.
    """
    if to == "comfyui":
        raise UserError(
            "ComfyUI's own loader has no layers with smoothing and a low-rank branch: "
            "convert FLUX.1 with --to nunchaku, which Nunchaku's nodes for ComfyUI load"
        )
    if to not in TARGETS:
        raise UserError(f"unknown format {to!r}: {did_you_mean(to, TARGETS)}")
    path = _found(source)
    if not path.is_dir():
        raise UserError(f"no folder {str(source)!r}: expected a few-bit model of bittern's")
    place, name = _place(path)
    config = read_json(place / "config.json")
    if not is_few_bit(config):
        raise UserError(f"{place} is no few-bit model of bittern's: quantize or import it first")
    checkpoint = CheckpointConfig.parse(config["quantization_config"], str(place / "config.json"))
    class_name = str(config.get("_class_name"))
    model, config = _model(class_name, config, weight_files(place), str(place / "config.json"))
    headers = read_headers(weight_files(place))
    others = {key: shape for key, shape in shapes_of(model).items() if not is_leaf(key, checkpoint)}
    added = {f"{path}.bias": target.shape[:1] for path, target in checkpoint.targets.items() if target.bias}
    check_headers(headers, checkpoint, {**others, **added})
    surplus = next((key for key in added if key not in others), None)
    if surplus:
        raise UserError(f"{surplus} was added by the solver: in {TARGETS[to]} this layer has no bias")
    # Nobody looks at the numbers again before a picture is black.
    check_values(headers, checkpoint)
    base = path if name else None
    with opened(headers) as read:
        if to == "nunchaku":
            found = _to_original(model, class_name, checkpoint, headers, read)
            said = describe(class_name, config, found.style.weight, found.rank, dict(model.config))
            with _new_file(out, force, path) as file:
                _write(file, found.specs(), found.tensors(read), progress, said)
            size = Path(out).expanduser().stat().st_size
        else:
            _check_folder(out, force, path)
            found, quantization = _to_lite(model, checkpoint, headers, read)
            with _folder(out, base, name, found.specs(), force) as folder:
                _write(folder / f"{STEM}.safetensors", found.specs(), found.tensors(read), progress)
                write_config(folder, config, quantization)
                size = (folder / f"{STEM}.safetensors").stat().st_size
    return Exported(len(checkpoint.targets), found.rank, size, found.notes)


def _to_original(
    model: nn.Module, class_name: str, checkpoint: CheckpointConfig, headers: Headers, read: Read
) -> Outgoing:
    _check_original(class_name)
    weights = {checkpoint.scheme(path).weight for path in checkpoint.targets}
    units = flux_units(model, shifted="nvfp4" not in weights)
    surplus = set(checkpoint.targets) - {target for unit in units for target in unit.targets}
    if surplus:
        raise UserError(f"{min(surplus)} is few-bit: Nunchaku's files have it in 16 bits; keep it in the recipe")
    return outgoing(checkpoint, headers, units, read, OLDER, TARGETS["nunchaku"], flux_names(model))


def _check_original(class_name: str) -> None:
    known = sorted(set(MODEL_CLASSES.values()))
    if class_name not in known:
        raise UserError(f"{class_name} has no original Nunchaku file that we know: expected {', '.join(known)}")


def _to_lite(
    model: nn.Module, checkpoint: CheckpointConfig, headers: Headers, read: Read
) -> tuple[Outgoing, dict[str, Any]]:
    convolution = next((path for path, target in checkpoint.targets.items() if target.kernel), None)
    if convolution:
        raise UserError(f"{convolution} is a few-bit convolution: Nunchaku Lite has linears only")
    wide = [path for path in checkpoint.targets if checkpoint.scheme(path).activations == 16]
    narrow = [path for path in checkpoint.targets if path not in set(wide)]
    units = lite_units(model, narrow, wide)
    found = outgoing(checkpoint, headers, units, read, NEWER, TARGETS["nunchaku-lite"])
    dtype = str(found.style.dtype).removeprefix("torch.")
    said = Lite(found.style.weight, found.rank if narrow else None, tuple(narrow), tuple(wide), dtype)
    return found, said.dump()


def _write(
    file: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Progress | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    # The work is moving bytes, and a second thread writes them: more would wait for one another.
    with one_thread(True), streamed_file(file, specs, metadata) as put:
        for done, (name, tensor) in enumerate(tensors, 1):
            put(name, tensor)
            if progress:
                progress("converting", done, len(specs))


def _check_folder(out: str | Path, force: bool, source: Path) -> None:
    if Path(out).suffix == ".safetensors":
        raise UserError(f"output {str(out)!r} is the name of a file: expected that of a folder to write")
    check_out(out, force=force, source=source)


@contextmanager
def _new_file(out: str | Path, force: bool, source: Path) -> Iterator[Path]:
    """A temporary file beside `out` that takes its place when the block ends well and vanishes when not."""
    path = Path(out).expanduser().resolve()
    if path.suffix != ".safetensors":
        raise UserError(f"output {str(out)!r}: expected the name of a .safetensors file")
    check_file_out(path, "--out")
    if path.is_relative_to(source.resolve()):
        raise UserError(f"output {str(out)!r} lies in the model it is made from: choose another place")
    if path.exists() and not force:
        raise UserError(f"output {str(out)!r} is there: choose another name, or replace it with --force")
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"output {str(out)!r} cannot be written: {disk_problem(error)}; nothing was left") from error
    finally:
        fresh.unlink(missing_ok=True)


def _checked(tensors: Iterable[tuple[str, Tensor]], config: CheckpointConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        check_value(name, tensor, config)
        yield name, tensor


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters and buffers."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _model(
    class_name: str, config: Mapping[str, Any], files: Sequence[Path], where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model on meta that a config describes, and the config without what another library has added."""
    count = len(read_headers(files))
    for key, value in config.items():
        # Every layer has a tensor, and building many layers takes time; of few the names that are missing tell more.
        if key.endswith("layers") and isinstance(value, int) and value > max(count, 100):
            raise UserError(f"{where} has {key} {value}, and there are {count} tensors: {MEND}")
    config = _clean(config, class_name)
    return model_on_meta(class_name, config, torch.bfloat16, where), config


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
