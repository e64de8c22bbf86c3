"""What a recipe would do to a model: targets, sizes, kept layers and why. Reads configs and headers, no weights."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bittern import recipes
from bittern.architectures import plan
from bittern.checkpoints import read_headers, weight_files
from bittern.errors import UserError
from bittern.quantization.calibration import Progress
from bittern.quantization.fit import Fit, foreseen
from bittern.quantization.on_meta import model_on_meta
from bittern.quantization.report import COMPONENTS, Report, component, growth, predict, refuse_quantized, whole_size
from bittern.quantization.stream import reader
from bittern.recipes import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Kept:
    """A linear or convolution that stays in 16 bits.

    Attributes:
        path: Where it is in the model.
        shape: Of its weight: [N, K], or [N, C, kh, kw].
        bytes: Of its weight.
        reason: Why it stays.
    """

    path: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class Preview:
    """What a recipe would do.

    Attributes:
        architecture: Name of the model's family.
        notes: What a person should know about the family and the sizes.
        report: The targets and the predicted sizes; no errors, since nothing is solved.
        groups: Paths of targets that share smoothing and the branch's first factor.
        kept: Every other linear and convolution.
        original_bytes: Of all tensors of the model as it is.
    """

    architecture: str
    notes: tuple[str, ...]
    report: Report
    groups: tuple[tuple[str, ...], ...]
    kept: tuple[Kept, ...]
    original_bytes: int

    @property
    def few_bit_share(self) -> float:
        """Weights of targets / all parameters of the model."""
        return sum(row.shape[0] * row.shape[1] for row in self.report.rows) / self.report.parameters

    def to_dict(self) -> dict[str, Any]:
        """The preview as JSON values. Keys may be added, never renamed."""
        return {
            "architecture": self.architecture,
            "notes": list(self.notes),
            **self.report.to_dict(),
            "few_bit_share": self.few_bit_share,
            "original_bytes": self.original_bytes,
            "predicted_bytes": self.report.file_bytes,
            "groups": [list(group) for group in self.groups],
            "kept": [
                {"path": kept.path, "shape": list(kept.shape), "bytes": kept.bytes, "reason": kept.reason}
                for kept in self.kept
            ],
        }


def preview(
    target: DiffusionPipeline | nn.Module | str | Path,
    recipe: str | Path | Recipe,
    *,
    fit: str | int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    name: str | None = None,
) -> Preview:
    """What `quantize` would do to a pipeline, a model, or a folder of either.

    Of a folder only `config.json` and the headers of the weight files are read; without weight files sizes are those
    for bf16, and a note says so. With `fit` the weights are read, too.

    Args:
        target: A pipeline, a model, or a folder.
        recipe: As for `quantize`.
        fit: As for `quantize`.
        seed: As for `quantize`.
        progress: Called as weights are read for `fit`.
        name: What errors call a folder.

    Raises:
        UserError: as `quantize` does, but for what only the weights' values tell; and for a folder that is no model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    is_folder = isinstance(target, str | Path)
    model, notes = skeleton(Path(target).expanduser(), name) if is_folder else (component(target), ())
    refuse_quantized(model)
    if fit is not None:
        wanted = Fit.of(model, recipe, fit)
        read = reader(model, _place(Path(target).expanduser())) if isinstance(target, str | Path) else None
        errors = foreseen(wanted, model, read or model.get_parameter, seed=seed, progress=progress)
        recipe = wanted.choose(errors)
    made = plan(model, recipe)
    weights = {path: model.get_submodule(path).weight for path in made.kept}
    report = predict(model, recipe, made)
    grown = growth(whole_size(model), report.file_bytes)
    return Preview(
        architecture=made.architecture.name,
        notes=(*made.architecture.notes, *notes, *([grown] if grown else [])),
        report=report,
        groups=tuple(job.paths for job in made.jobs if len(job.paths) > 1),
        kept=tuple(
            Kept(path, tuple(weights[path].shape), weights[path].nbytes, reason) for path, reason in made.kept.items()
        ),
        original_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
    )


def skeleton(folder: Path, name: str | None = None) -> tuple[nn.Module, tuple[str, ...]]:
    """The model of a folder on the meta device, in the dtypes it would be loaded in, and what to say about them.

    Args:
        folder: The model's, or the pipeline's around it.
        name: What an error calls the model; None for the folder's.

    Raises:
        UserError: for a folder that is no model, is damaged, or holds a quantized one.
    """
    place = _place(folder)
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        class_name = str(config["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place / 'config.json'} is not a model's config: {error!r}") from None
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(f"{(name or str(folder))!r} is already quantized ({method}): give the original")
    notes: tuple[str, ...] = ()
    try:
        dtype = stored_dtype(place)
    except UserError:
        if any(place.glob("*.safetensors*")):
            raise
        dtype, notes = torch.bfloat16, ("no weight files: sizes are those of layers kept in bf16",)
    return model_on_meta(class_name, config, dtype, str(place / "config.json")), notes


def _place(folder: Path) -> Path:
    """Where the model of a folder is: there, or in the denoiser's folder."""
    places = [place for place in (folder, *(folder / name for name in COMPONENTS)) if (place / "config.json").is_file()]
    if not places:
        raise UserError(f"{str(folder)!r} is no model: expected config.json or {' or '.join(COMPONENTS)} in it")
    return places[0]


def stored_dtype(folder: Path, few_bit: Collection[str] = ()) -> torch.dtype:
    """The float type of most bytes of a model's files; float32 if there are none.

    Reads the headers of all its files, so that a damaged one is reported before anything is loaded.

    Args:
        folder: The model's.
        few_bit: Paths of few-bit layers, of which only the biases count.

    Raises:
        UserError: for files that are missing or damaged.
    """
    weight: dict[torch.dtype, int] = {}
    for name, (_, spec) in read_headers(weight_files(folder)).items():
        path, _, leaf = name.rpartition(".")
        if spec.dtype.is_floating_point and (path not in few_bit or leaf == "bias"):
            weight[spec.dtype] = weight.get(spec.dtype, 0) + spec.nbytes
    return max(weight, key=weight.__getitem__, default=torch.float32)
