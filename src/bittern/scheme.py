"""Scheme: the numbers of one few-bit layer. Everything above the formats speaks it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch

from bittern import formats
from bittern.errors import UserError, did_you_mean
from bittern.formats import DtypeName, Format, KLayout

WeightFormat = Literal["int4", "nvfp4", "ternary"]
PackingName = Literal["nibbles", "e2m1", "crumbs", "trits"]

ACTIVATION_BITS = (4, 8, 16)
ACTIVATION_GROUP = 64
"""4-bit activations have one scale per token and this many inputs."""


@dataclass(frozen=True)
class Scheme:
    """One layer's formats and sizes.

    Attributes:
        weight: Format of the weight codes.
        group_size: Inputs under one weight scale; None for one scale per row and K-segment.
        scale_dtype: Stored type of the weight scales.
        activations: Bits of the least precise activations the layer was solved for.
        rank: Rank of the low-rank branch; 0 for none.
        branch_dtype: Stored type of `smooth`, `down` and `up`.
        smooth: Whether activations are divided by a vector per input.
        shift: What is added to the activations of each K-segment before 4-bit quantization with unsigned
            codes; empty, or zeros, for none.
        packing: How codes lie on disk; None takes the packing in memory.
    """

    weight: WeightFormat = "int4"
    group_size: int | None = 64
    scale_dtype: DtypeName = "bf16"
    activations: int = 16
    rank: int = 0
    branch_dtype: DtypeName = "bf16"
    smooth: bool = False
    shift: tuple[float, ...] = ()
    packing: PackingName | None = None

    def __post_init__(self) -> None:
        fmt = formats.get(self.weight)
        KLayout((1,), self.group_size)
        formats.dtype_of(self.scale_dtype)
        formats.dtype_of(self.branch_dtype)
        if self.branch_dtype == "e4m3":
            raise UserError("branch_dtype 'e4m3': expected 16 or 32 bits, bf16, fp16 or fp32")
        if fmt.scale_dtype != (self.scale_dtype if self.scale_dtype == "e4m3" else None):
            raise UserError(
                f"scale_dtype {self.scale_dtype!r} does not fit {self.weight}: expected "
                + (f"{fmt.scale_dtype!r}" if fmt.scale_dtype else "bf16, fp16 or fp32")
            )
        if fmt.group_size is not None and self.group_size != fmt.group_size:
            raise UserError(f"group_size {self.group_size} does not fit {self.weight}: expected {fmt.group_size}")
        if self.activations not in ACTIVATION_BITS:
            raise UserError(f"activations {self.activations!r}: expected 4, 8 or 16 bits")
        if self.rank < 0:
            raise UserError(f"rank {self.rank}: expected 0 or more")
        if not all(math.isfinite(h) and h >= 0 for h in self.shift):
            raise UserError(f"shift {self.shift}: expected finite numbers, 0 or more")
        if self.packing is None:
            object.__setattr__(self, "packing", fmt.packing.name)
        if self.packing not in fmt.disk_packings:
            raise UserError(
                f"packing {self.packing!r} does not fit {self.weight}: "
                + did_you_mean(str(self.packing), fmt.disk_packings)
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**dataclasses.asdict(self), "shift": list(self.shift)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """The scheme that `to_dict` wrote; fields that are absent take their defaults.

        Raises:
            UserError: for an unknown key, a value of the wrong type or out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key, value in data.items():
            if key not in fields:
                raise UserError(f"unknown key {key!r} in a scheme: {did_you_mean(key, fields)}")
            _expect_type(key, value)
        values = dict(data)
        if "shift" in values:
            values["shift"] = tuple(float(h) for h in values["shift"])
        return cls(**values)

    @property
    def format(self) -> Format:
        """The grid of the weight codes."""
        return formats.get(self.weight)

    @property
    def solved_scale_dtype(self) -> torch.dtype:
        """The type in which rules give scales: the stored one, or float32 where those are of two levels."""
        return torch.float32 if self.format.has_row_scales else formats.dtype_of(self.scale_dtype)

    def layout(self, segments: Sequence[int]) -> KLayout:
        """Segments, groups and padding of K for this scheme.

        Raises:
            UserError: if there is a shift for a different number of segments.
        """
        if self.shift and len(self.shift) != len(segments):
            raise UserError(
                f"shift has {len(self.shift)} values for {len(segments)} segments: expected one each, or none"
            )
        return KLayout(tuple(segments), self.group_size)

    def tensor_shapes(
        self, n: int, segments: Sequence[int], packing: str | None = None, taps: int = 1
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a layer with n outputs.

        Args:
            n: Outputs.
            segments: Lengths of the K-segments.
            packing: Packing of the codes: the one in memory, unless a name is given.
            taps: Taps of a convolution's kernel, which share the smoothing of their channels.
        """
        layout = self.layout(segments)
        pack = formats.get_packing(packing) if packing else self.format.packing
        branch = formats.dtype_of(self.branch_dtype)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((n, pack.bytes_per_row(layout.padded_k)), torch.uint8),
            "scales": ((n, layout.num_groups), formats.dtype_of(self.scale_dtype)),
        }
        if self.format.has_row_scales:
            shapes["row_scales"] = ((n, len(segments)), torch.float32)
        if self.smooth:
            shapes["smooth"] = ((layout.k // taps,), branch)
        if self.rank:
            shapes["down"] = ((self.rank, layout.k), branch)
            shapes["up"] = ((n, self.rank), branch)
        return shapes

    def bits_per_weight(self, n: int, k: int, segments: Sequence[int] | None = None) -> float:
        """Bits of all stored tensors of an [n, k] layer on its own, without its bias, over its weights."""
        shapes = self.tensor_shapes(n, segments or (k,), self.packing)
        stored = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        return 8 * stored / (n * k)


_TYPES: dict[str, tuple[type, ...]] = {
    "weight": (str,),
    "group_size": (int, type(None)),
    "scale_dtype": (str,),
    "activations": (int,),
    "rank": (int,),
    "branch_dtype": (str,),
    "smooth": (bool,),
    "shift": (list, tuple),
    "packing": (str, type(None)),
}
assert get_args(WeightFormat) == tuple(formats.FORMATS)


def _expect_type(key: str, value: object) -> None:
    expected = _TYPES[key]
    # bool is an int to Python, but `rank: true` is a slip.
    wrong = not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected)
    if not wrong and key == "shift":
        wrong = not all(isinstance(h, (int, float)) for h in cast("Sequence[object]", value))
    if wrong:
        names = " or ".join("null" if t is type(None) else t.__name__ for t in expected)
        raise UserError(f"{key} {value!r} in a scheme: expected {names}")
