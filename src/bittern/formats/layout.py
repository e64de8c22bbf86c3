"""Where the K inputs of a weight lie in its rows of codes: segments, padding, groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Shaped
from torch import Tensor

from bittern.errors import UserError

# Without groups a segment is still padded to this many inputs, so that its codes fill whole bytes.
ROW_MULTIPLE = 4


@dataclass(frozen=True)
class Segment:
    """One stretch of a row: its inputs, its codes and its scales, as slices of the three axes."""

    logical: slice
    """Inputs, on the axis of length `KLayout.k`."""
    padded: slice
    """Codes, on the axis of length `KLayout.padded_k`."""
    groups: slice
    """Scales, on the axis of length `KLayout.num_groups`."""
    size: int
    """Codes under one scale."""
    padding: int
    """How many of the last codes are padding."""

    @property
    def unpadded(self) -> slice:
        """Codes that are not padding."""
        return slice(self.padded.start, self.padded.stop - self.padding)


@dataclass(frozen=True)
class KLayout:
    """The axis K of a weight, cut into segments (one per input tensor) and groups (one per scale).

    Segments partition K: usually there is one; FLUX's single-block `proj_out` has two, attention and mlp.
    Each is zero-padded to a multiple of the group, and no group crosses a segment. `group_size=None` means
    one scale per row and segment; the segment is then padded to a multiple of 4.
    """

    segments: tuple[int, ...]
    group_size: int | None = 64

    def __post_init__(self) -> None:
        if not self.segments or any(length < 1 for length in self.segments):
            raise UserError(f"segments {self.segments}: expected at least one length, each 1 or more")
        if self.group_size is not None and (self.group_size < 1 or self.group_size % ROW_MULTIPLE):
            raise UserError(
                f"group_size {self.group_size}: expected a positive multiple of {ROW_MULTIPLE}, "
                "or null for one scale per row"
            )

    @cached_property
    def k(self) -> int:
        """Number of inputs."""
        return sum(self.segments)

    @cached_property
    def padded_segments(self) -> tuple[int, ...]:
        """Length of each segment with its padding."""
        multiple = self.group_size or ROW_MULTIPLE
        return tuple(-(-length // multiple) * multiple for length in self.segments)

    @cached_property
    def padded_k(self) -> int:
        """Number of codes in a row."""
        return sum(self.padded_segments)

    @cached_property
    def groups_per_segment(self) -> tuple[int, ...]:
        """Number of scales of each segment in a row."""
        if self.group_size is None:
            return (1,) * len(self.segments)
        return tuple(length // self.group_size for length in self.padded_segments)

    @cached_property
    def num_groups(self) -> int:
        """Number of scales in a row."""
        return sum(self.groups_per_segment)

    @property
    def is_padded(self) -> bool:
        """Whether any code is padding."""
        return self.padded_k != self.k

    def __iter__(self) -> Iterator[Segment]:
        logical = padded = group = 0
        for length, wide, groups in zip(self.segments, self.padded_segments, self.groups_per_segment, strict=True):
            yield Segment(
                slice(logical, logical + length),
                slice(padded, padded + wide),
                slice(group, group + groups),
                wide // groups,
                wide - length,
            )
            logical, padded, group = logical + length, padded + wide, group + groups

    def pad(self, weight: Shaped[Tensor, "*rows k"]) -> Shaped[Tensor, "*rows padded_k"]:
        """Zeros behind each segment, up to `padded_k`; the tensor itself where there is nothing to pad."""
        self._expect("weight", weight.shape[-1], self.k)
        if not self.is_padded:
            return weight
        out = weight.new_zeros(*weight.shape[:-1], self.padded_k)
        for segment in self:
            out[..., segment.unpadded] = weight[..., segment.logical]
        return out

    def unpad(self, weight: Shaped[Tensor, "*rows padded_k"]) -> Shaped[Tensor, "*rows k"]:
        """The inverse of `pad`; a view where there is one segment."""
        self._expect("padded weight", weight.shape[-1], self.padded_k)
        if not self.is_padded:
            return weight
        parts = [weight[..., segment.unpadded] for segment in self]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def expand_scales(self, scales: Shaped[Tensor, "*rows groups"]) -> Shaped[Tensor, "*rows padded_k"]:
        """Each scale repeated over the codes of its group."""
        self._expect("scales", scales.shape[-1], self.num_groups)
        parts = [scales[..., s.groups].repeat_interleave(s.size, dim=-1) for s in self]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def _expect(what: str, length: int, expected: int) -> None:
        if length != expected:
            raise UserError(f"{what} has {length} columns: expected {expected}")
