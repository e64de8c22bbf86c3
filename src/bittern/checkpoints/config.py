"""The `quantization_config` of a checkpoint: everything a reader must know before it opens a tensor.

It is written into `config.json` by diffusers. Which tensors a checkpoint holds, and their shapes and types,
follow from it alone; nothing is guessed from shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    InstanceOf,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictInt,
    model_serializer,
    model_validator,
)

from bittern.errors import UserError
from bittern.layers.few_bit import SHARED_LEAVES
from bittern.recipes import validated
from bittern.scheme import Scheme

QUANT_METHOD = "bittern"
FORMAT_VERSION = 1


def _to_scheme(value: object) -> Scheme:
    if isinstance(value, Scheme):
        return value
    if not isinstance(value, Mapping):
        raise UserError("expected a mapping")
    return Scheme.from_dict(value)


SchemeField = Annotated[
    InstanceOf[Scheme], BeforeValidator(_to_scheme), PlainSerializer(lambda scheme: scheme.to_dict())
]


class Target(BaseModel):
    """A quantized layer: its scheme's place in the list, and its logical shape (N, K).

    A convolution has its kernel, too, (kh, kw); its K is kh · kw · C, one K-segment of length C for every tap, and its
    smoothing is per channel. A layer with `bias` has one of its own, whether or not the model's class gives it one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: StrictInt
    shape: tuple[StrictInt, StrictInt]
    kernel: tuple[StrictInt, StrictInt] | None = None
    bias: StrictBool = False

    @property
    def taps(self) -> int:
        """Taps of the kernel; 1 for a linear."""
        return self.kernel[0] * self.kernel[1] if self.kernel else 1

    @model_serializer(mode="wrap")
    def _lean(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what does not apply: linears are written as they always were."""
        return {key: value for key, value in serialize(self).items() if value is not None and value is not False}


class CheckpointConfig(BaseModel):
    """What the tensors of a few-bit model are.

    Attributes:
        recipe: The recipe that made it, for people; no reader interprets it.
        seed: The solver's seed.
        schemes: The different schemes, each once.
        targets: The quantized layers by path.
        groups: Paths of layers that read one tensor; the first carries the shared leaves.
        segments: Lengths of the K-segments, where there is more than one.
        errors: Relative weight error of each target.
        stages: Relative output error after each of the solver's stages, of targets that were calibrated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["bittern"] = QUANT_METHOD
    format_version: Literal[1] = FORMAT_VERSION
    recipe: dict[str, Any] = {}
    seed: StrictInt = 0
    schemes: tuple[SchemeField, ...]
    targets: dict[str, Target]
    groups: tuple[tuple[str, ...], ...] = ()
    segments: dict[str, tuple[StrictInt, ...]] = {}
    errors: dict[str, float] = {}
    stages: dict[str, dict[str, float]] = {}

    @classmethod
    def parse(cls, data: object, where: str = "quantization_config") -> CheckpointConfig:
        """The config that `dump` wrote.

        Raises:
            UserError: for a newer format, an unknown key, or anything that contradicts itself.
        """
        version = data.get("format_version", FORMAT_VERSION) if isinstance(data, Mapping) else FORMAT_VERSION
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{where}: format_version {version} is newer than {FORMAT_VERSION}, the newest this bittern reads: "
                "upgrade bittern"
            )
        return validated(cls, data, where)

    def dump(self) -> dict[str, Any]:
        """The config as JSON values."""
        return self.model_dump(mode="json")

    def scheme(self, path: str) -> Scheme:
        """The scheme of a target."""
        return self.schemes[self.targets[path].scheme]

    def k_segments(self, path: str) -> tuple[int, ...]:
        """Lengths of the K-segments of a target; one, of length K, for most; of a convolution one for every tap."""
        target = self.targets[path]
        if target.kernel:
            return (target.shape[1] // target.taps,) * target.taps
        return self.segments.get(path, (target.shape[1],))

    @cached_property
    def leaders(self) -> dict[str, str]:
        """For every target the path under which its shared leaves are stored: its own, or its group's first."""
        leaders = {path: path for path in self.targets}
        leaders.update({path: group[0] for group in self.groups for path in group})
        return leaders

    def leaves(self, path: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype on disk of every tensor stored under a target, without its bias."""
        scheme, target = self.scheme(path), self.targets[path]
        shapes = scheme.tensor_shapes(target.shape[0], self.k_segments(path), scheme.packing, target.taps)
        leads = self.leaders[path] == path
        return {leaf: spec for leaf, spec in shapes.items() if leads or leaf not in SHARED_LEAVES}

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        if not self.targets:
            raise UserError("targets is empty: expected at least one quantized layer")
        for path, target in self.targets.items():
            if not 0 <= target.scheme < len(self.schemes):
                raise UserError(f"target {path!r} has scheme {target.scheme}: expected 0 to {len(self.schemes) - 1}")
            if min(*target.shape, *(target.kernel or ())) < 1:
                raise UserError(f"target {path!r} has shape {list(target.shape)}: expected positive numbers")
            if target.shape[1] % target.taps:
                raise UserError(f"target {path!r} has {target.shape[1]} inputs: expected as many for each tap")
            if target.kernel and path in self.segments:
                raise UserError(f"target {path!r} is a convolution: expected no segments of its own")
        for key in ("segments", "errors", "stages"):
            for path in getattr(self, key):
                self._expect_target(key, path)
        for path in self.targets:
            lengths, k = self.k_segments(path), self.targets[path].shape[1]
            self.scheme(path).layout(lengths)
            if sum(lengths) != k:
                raise UserError(f"segments of {path!r} are {list(lengths)}: expected a sum of {k}")
        for path, error in self.errors.items():
            if not (math.isfinite(error) and error >= 0):
                raise UserError(f"error of {path!r} is {error}: expected a finite number of 0 or more")
        for path, stages in self.stages.items():
            if not all(math.isfinite(error) and error >= 0 for error in stages.values()):
                raise UserError(f"stages of {path!r} are {stages}: expected finite numbers of 0 or more")
        self._check_groups()
        return self

    def _check_groups(self) -> None:
        placed: set[str] = set()
        for group in self.groups:
            if len(group) < 2:
                raise UserError(f"group {list(group)} has fewer than two members: leave it out")
            for path in group:
                self._expect_target("groups", path)
                if self.targets[path].kernel:
                    raise UserError(f"group member {path!r} is a convolution: expected linears")
                if path in placed:
                    raise UserError(f"target {path!r} is in two groups: expected one")
                placed.add(path)
                same = (self.targets[path].scheme, self.k_segments(path))
                if same != (self.targets[group[0]].scheme, self.k_segments(group[0])):
                    raise UserError(f"group member {path!r} differs from {group[0]!r} in scheme or inputs")

    def _expect_target(self, key: str, path: str) -> None:
        if path not in self.targets:
            raise UserError(f"{key} names {path!r}, which is no target: correct or remove it")
