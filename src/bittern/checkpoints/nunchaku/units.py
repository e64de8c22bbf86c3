"""Which layers of a model a packed layer holds: the two ways in which Nunchaku names and cuts a model.

Original files know FLUX by names of their own: q, k and v are one layer, the single block's `proj_out` is two (its two
inputs), rows of adaLN linears are interleaved. Nunchaku Lite names every layer as diffusers does and cuts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bittern.architectures import known
from bittern.errors import UserError

GELU_SHIFT = 0.171875
"""What int4 files add behind a GELU, where activations then have no sign."""

MODEL_CLASSES = {
    "NunchakuFluxTransformer2dModel": "FluxTransformer2DModel",
    "NunchakuFluxTransformer2DModelV2": "FluxTransformer2DModel",
}
"""What original files call the models that we can read, and what diffusers calls them."""


@dataclass(frozen=True)
class Unit:
    """Targets whose numbers lie together.

    Attributes:
        targets: Layers of the model, their rows behind one another.
        packed: Names in the packed file; of several each holds a K-segment.
        rows: Outputs of each target.
        segments: Inputs of each K-segment.
        shifts: What is added to each K-segment before 4-bit rounding; 0 for nothing.
        splits: Of a W4A16 layer, chunks whose rows are interleaved; 1 for none, 0 for a layer that is no W4A16 one.
    """

    targets: tuple[str, ...]
    packed: tuple[str, ...]
    rows: tuple[int, ...]
    segments: tuple[int, ...]
    shifts: tuple[float, ...]
    splits: int = 0

    @property
    def is_awq(self) -> bool:
        """Whether activations keep 16 bits."""
        return self.splits > 0

    @property
    def n(self) -> int:
        """Rows of all targets."""
        return sum(self.rows)

    @property
    def k(self) -> int:
        """Inputs."""
        return sum(self.segments)


# Packed name -> targets, by kind of block; `>` marks layers behind a GELU.
_DOUBLE = {
    "norm1.linear": ("norm1.linear",),
    "norm1_context.linear": ("norm1_context.linear",),
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_proj_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "out_proj": ("attn.to_out.0",),
    "out_proj_context": ("attn.to_add_out",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "mlp_context_fc1": ("ff_context.net.0.proj",),
    "mlp_context_fc2": ("ff_context.net.2",),
}
_SINGLE = {
    "norm.linear": ("norm.linear",),
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "mlp_fc1": ("proj_mlp",),
    "out_proj": ("proj_out",),
    "mlp_fc2": ("proj_out",),
}
_BEHIND_GELU = ("mlp_fc2", "mlp_context_fc2")
_SPLITS = {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3}
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def flux_units(model: nn.Module, *, shifted: bool) -> list[Unit]:
    """The units of an original FLUX file, in the order of the model's layers.

    Args:
        model: A FluxTransformer2DModel, on any device.
        shifted: Whether inputs behind a GELU are shifted: those of int4 files are, those of nvfp4 files not.
    """
    units: list[Unit] = []
    for prefix, table in _flux_blocks(model):
        joined: dict[tuple[str, ...], list[str]] = {}
        for packed, targets in table.items():
            joined.setdefault(targets, []).append(packed)
        for targets, packed in joined.items():
            layers: list[Any] = [model.get_submodule(f"{prefix}.{target}") for target in targets]
            k = layers[0].in_features
            first = layers[0].out_features  # of proj_out as of to_v: its first input is the attention's output
            units.append(
                Unit(
                    targets=tuple(f"{prefix}.{target}" for target in targets),
                    packed=tuple(f"{prefix}.{name}" for name in packed),
                    rows=tuple(layer.out_features for layer in layers),
                    segments=(k,) if len(packed) == 1 else (first, k - first),
                    shifts=tuple(GELU_SHIFT if shifted and name in _BEHIND_GELU else 0.0 for name in packed),
                    splits=_SPLITS.get(packed[0], 0),
                )
            )
    return units


def flux_names(model: nn.Module) -> dict[str, str]:
    """What an original FLUX file calls tensors that are not quantized and have another name there."""
    names: dict[str, str] = {}
    for prefix, _ in _flux_blocks(model):
        for norm in _NORMS:
            if hasattr(model.get_submodule(f"{prefix}.attn"), norm):
                names[f"{prefix}.attn.{norm}.weight"] = f"{prefix}.{norm}.weight"
    return names


def _flux_blocks(model: nn.Module) -> Iterator[tuple[str, Mapping[str, tuple[str, ...]]]]:
    for kind, table in (("transformer_blocks", _DOUBLE), ("single_transformer_blocks", _SINGLE)):
        for index in range(len(getattr(model, kind))):
            yield f"{kind}.{index}", table


def lite_units(model: nn.Module, targets: Iterable[str], awq: Iterable[str]) -> list[Unit]:
    """The units of a Nunchaku Lite model: one for each layer.

    Args:
        model: The model, on any device.
        targets: Layers with 4-bit activations.
        awq: Layers with 16-bit activations.

    Raises:
        UserError: for a target that is no linear of the model, is named twice, or whose inputs cannot be told apart.
    """
    units: list[Unit] = []
    for splits, paths in ((0, targets), (1, awq)):
        for path in paths:
            layer = _linear(model, path)
            segments = _segments(model, path, layer.in_features)
            units.append(Unit((path,), (path,), (layer.out_features,), segments, (0.0,) * len(segments), splits))
    seen: set[str] = set()
    for unit in units:
        if unit.targets[0] in seen:
            raise UserError(f"quantization_config names the target {unit.targets[0]!r} twice: remove one")
        seen.add(unit.targets[0])
    return units


def lite_groups(model: nn.Module, units: Sequence[Unit]) -> list[tuple[str, ...]]:
    """Targets that read one tensor, as the model's family knows them."""
    present = {unit.targets[0] for unit in units if not unit.is_awq}
    family = known(type(model).__name__)
    groups: dict[tuple[str, ...], None] = {}
    for path in (unit.targets[0] for unit in units):
        site = family.site(path) if family else None
        if site is not None and len(site.group) > 1 and present.issuperset(site.group):
            groups[site.group] = None
    return list(groups)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise UserError(f"target {path!r} is no linear of {type(model).__name__}: the config is another model's")
    return module


def _segments(model: nn.Module, path: str, k: int) -> tuple[int, ...]:
    """Lengths of the tensors whose concatenation a layer reads, where the family's forward hands them over apart."""
    family = known(type(model).__name__)
    site = family.site(path) if family else None
    if family is None or family.forward is None or site is None or len(site.sources) != 2:
        return (k,)
    first = _linear(model, site.sources[0]).out_features
    if not 0 < first < k:
        raise UserError(f"target {path!r} has {k} inputs: expected more than {first}, those of {site.sources[0]}")
    return (first, k - first)
