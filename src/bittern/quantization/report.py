"""What a few-bit model is made of: one row per target, and totals. Reads shapes only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bittern import recipes
from bittern.architectures import Plan, known, plan
from bittern.checkpoints import (
    CheckpointConfig,
    TensorSpec,
    check_headers,
    is_few_bit,
    on_disk,
    read_headers,
    weight_files,
)
from bittern.checkpoints.files import file_bytes
from bittern.checkpoints.nunchaku import is_lite
from bittern.errors import UserError
from bittern.quantization.jobs import check_targets, checkpoint_config, other_shapes
from bittern.quantization.on_meta import model_on_meta
from bittern.recipes import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

COMPONENTS = ("transformer", "unet")
"""Names under which pipelines hold the model that denoises."""


@dataclass(frozen=True)
class Row:
    """One target.

    Attributes:
        path: Where it is in the model.
        format: Weight format.
        group_size: Inputs under one scale; None for one scale per row and segment.
        rank: Of the low-rank branch.
        activations: Bits of the least precise activations it was solved for.
        error: Relative weight error |W - What| / |W|; None before it is solved.
        shape: (N, K); of a convolution K counts the inputs of all its taps.
        bytes: Of the tensors stored under its name, bias excluded. A group's shared tensors count for its
            first member.
        bits_per_weight: 8 bytes / (N K).
        kernel: Of a convolution: height and width.
        stages: Relative output error after each of the solver's stages, if it was calibrated; None if not.
    """

    path: str
    format: str
    group_size: int | None
    rank: int
    activations: int
    error: float | None
    shape: tuple[int, int]
    bytes: int
    bits_per_weight: float
    kernel: tuple[int, int] | None = None
    stages: dict[str, float] | None = None


@dataclass(frozen=True, repr=False)
class Report:
    """All targets of a model, and totals. A model in 16 bits has no rows.

    Attributes:
        recipe: Name of the recipe; None for a model in 16 bits.
        rows: The targets.
        bytes: Of all the model's tensors as saved, kept layers included.
        parameters: Logical parameters of the model.
        block_weights: Those of them that are weights of linears and convolutions inside blocks; 0 for a model of no
            known family.
        file_bytes: Size of the weight file, if it is one.
    """

    recipe: str | None
    rows: tuple[Row, ...]
    bytes: int
    parameters: int
    block_weights: int
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """8 x all bytes of the targets (codes, scales, smoothing, branch) / their weights.

        For a model without targets: 8 x all its bytes / its parameters.
        """
        if not self.rows:
            return 8 * self.bytes / self.parameters
        return 8 * sum(row.bytes for row in self.rows) / sum(row.shape[0] * row.shape[1] for row in self.rows)

    @property
    def ternary_weights(self) -> int:
        """Weights of ternary targets."""
        return sum(row.shape[0] * row.shape[1] for row in self.rows if row.format == "ternary")

    @property
    def ternary_share(self) -> float:
        """Ternary weights / all parameters of the model."""
        return self.ternary_weights / self.parameters

    @property
    def ternary_share_blocks(self) -> float:
        """Ternary weights / weights of linears and convolutions inside blocks; 0 for a family without known blocks."""
        return self.ternary_weights / self.block_weights if self.block_weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values. Keys may be added, never renamed."""
        return {
            "recipe": self.recipe,
            "bits_per_weight": self.bits_per_weight,
            "ternary_weights": self.ternary_weights,
            "ternary_share": self.ternary_share,
            "ternary_share_blocks": self.ternary_share_blocks,
            "bytes": self.bytes,
            "parameters": self.parameters,
            "targets": [
                {**asdict(row), "shape": list(row.shape), "kernel": row.kernel and list(row.kernel)}
                for row in self.rows
            ],
        }

    def __repr__(self) -> str:
        return (
            f"<Report {self.recipe or '16 bits'}: {len(self.rows)} layers, "
            f"{self.bits_per_weight:.2f} bits per weight, {self.bytes / 1e6:.1f} MB>"
        )


def inspect(target: DiffusionPipeline | nn.Module | str | Path) -> Report:
    """The report of a pipeline, a model, or a folder of either; of a folder only the headers are read.

    A few-bit folder is checked as far as headers tell, as loading it does: tensors that are missing, belong to no layer
    or have a wrong shape or dtype. Values (codes out of range, NaN) are checked when it is loaded.

    Raises:
        UserError: if it is none of these, or the folder is damaged.
    """
    if isinstance(target, str | Path):
        return _inspect_folder(Path(target).expanduser())
    model = component(target)
    config = getattr(model, "config", {}).get("quantization_config")
    config = config.to_dict() if hasattr(config, "to_dict") else config
    few_bit = is_few_bit({"quantization_config": config})
    return _report(type(model).__name__, _specs(model), CheckpointConfig.parse(config) if few_bit else None)


def predict(target: DiffusionPipeline | nn.Module, recipe: str | Path | Recipe, made: Plan | None = None) -> Report:
    """The report that quantizing would give, but for the errors; solves nothing.

    Args:
        target: A pipeline or a model.
        recipe: As for `quantize`.
        made: The plan, where it has been made.

    Raises:
        UserError: as `quantize` does, but for what only the weights' values tell.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    model = component(target)
    refuse_quantized(model)
    config = checkpoint_config(made or plan(model, recipe), recipe, seed=0)
    return _report(type(model).__name__, _specs(model), config)


def predict_size(target: DiffusionPipeline | nn.Module, recipe: str | Path | Recipe) -> int:
    """Bytes of the weight file that quantizing and saving would write."""
    return predict(target, recipe).file_bytes


def growth(before: int, after: int) -> str | None:
    """What a person should know if a weight file grows.

    Args:
        before: Bytes of the model's weight file as it is.
        after: Of the few-bit one.
    """
    if after <= before:
        return None
    return (
        f"warning: the few-bit model is larger than the original, {after / 1e6:.2f} MB and not {before / 1e6:.2f} MB: "
        "lower `rank` in the recipe"
    )


def whole_size(model: nn.Module) -> int:
    """Bytes of the weight file of a model as it is."""
    return file_bytes(_specs(model))


def tensor_bytes(config: CheckpointConfig) -> int:
    """Bytes on disk of all few-bit tensors."""
    return sum(TensorSpec(*spec).nbytes for path in config.targets for spec in config.leaves(path).values())


def component(target: DiffusionPipeline | nn.Module) -> nn.Module:
    """The model that denoises: the target itself, or the pipeline's transformer or U-Net.

    Raises:
        UserError: if the target is neither a module nor a pipeline with one.
    """
    if isinstance(target, nn.Module):
        return target
    for name in COMPONENTS:
        if isinstance(model := getattr(target, name, None), nn.Module):
            return model
    raise UserError(f"{type(target).__name__} has no {' or '.join(COMPONENTS)}: expected a pipeline or a model")


def refuse_quantized(model: nn.Module) -> None:
    """Refuses a model that is quantized already, by whatever library.

    Raises:
        UserError: naming the method.
    """
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", "unknown method")
        raise UserError(f"the model is already quantized ({getattr(method, 'value', method)}): load the original")


def _inspect_folder(folder: Path) -> Report:
    for place in (folder, *(folder / name for name in COMPONENTS)):
        file = place / "config.json"
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            few_bit = is_few_bit(config)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is not a model's config: {error}") from None
        if is_lite(config):
            raise UserError(f"{str(place)!r} is packed for Nunchaku Lite: bittern convert makes a few-bit model of it")
        headers = read_headers(weight_files(place))
        checkpoint = CheckpointConfig.parse(config["quantization_config"], str(file)) if few_bit else None
        if checkpoint:
            made_of = {key: value for key, value in config.items() if key != "quantization_config"}
            model = model_on_meta(str(config.get("_class_name")), made_of, torch.bfloat16, str(file))
            check_targets(model, checkpoint)
            check_headers(headers, checkpoint, other_shapes(model, checkpoint))
        specs = {name: spec for name, (_, spec) in headers.items()}
        return _report(config.get("_class_name", ""), specs, checkpoint)
    raise UserError(f"{str(folder)!r} is no model: expected a folder with config.json or {COMPONENTS[0]}/config.json")


def _specs(model: nn.Module) -> dict[str, TensorSpec]:
    """The state dict without values, as if no adapter were loaded."""
    return {
        name.replace(".base_layer.", "."): TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def _report(class_name: str, specs: Mapping[str, TensorSpec], config: CheckpointConfig | None) -> Report:
    stored = on_disk(specs, config) if config else dict(specs)
    targets = config.targets if config else {}
    logical = sum(n * k for n, k in (target.shape for target in targets.values()))
    others = {
        name: spec for name, spec in stored.items() if name.rpartition(".")[0] not in targets or name.endswith(".bias")
    }
    return Report(
        recipe=str(config.recipe.get("name", "?")) if config else None,
        rows=tuple(_row(path, config) for path in sorted(targets, key=_natural)) if config else (),
        bytes=sum(spec.nbytes for spec in stored.values()),
        parameters=logical + sum(spec.numel for spec in others.values()),
        block_weights=_block_weights(class_name, others, targets),
        file_bytes=file_bytes(stored),
    )


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10. (A loaded config has its keys in alphabetical order.)"""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _row(path: str, config: CheckpointConfig) -> Row:
    scheme, shape = config.scheme(path), config.targets[path].shape
    nbytes = sum(TensorSpec(*spec).nbytes for spec in config.leaves(path).values())
    return Row(
        path=path,
        format=scheme.weight,
        group_size=scheme.group_size,
        rank=scheme.rank,
        activations=scheme.activations,
        error=config.errors.get(path),
        stages=config.stages.get(path),
        shape=shape,
        bytes=nbytes,
        bits_per_weight=8 * nbytes / (shape[0] * shape[1]),
        kernel=config.targets[path].kernel,
    )


def _block_weights(class_name: str, others: Mapping[str, TensorSpec], targets: Mapping[str, Any]) -> int:
    family = known(class_name)
    if family is None:
        return 0
    kept = {
        name.removesuffix(".weight"): spec.numel
        for name, spec in others.items()
        if name.endswith(".weight") and len(spec.shape) in (2, 4)
    }
    sizes = {**kept, **{path: target.shape[0] * target.shape[1] for path, target in targets.items()}}
    return sum(size for path, size in sizes.items() if family.site(path))
