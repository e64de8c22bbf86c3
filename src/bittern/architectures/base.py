"""The words in which a model family is described: a few frozen facts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import import_module

from jaxtyping import Float
from torch import Tensor, nn

Parameters = Callable[[str], Tensor]
"""A parameter's values by its full name."""


@dataclass(frozen=True)
class Modulated:
    """An input that is LayerNorm(h) · (1 + scale) + shift, with scale and shift computed by an adaLN linear.

    Attributes:
        linear: The adaLN linear.
        shift: Which chunk of its output is the shift.
        scale: Which chunk is the scale.
        chunks: How many chunks its output has.
    """

    linear: str
    shift: int
    scale: int
    chunks: int


REST = "*"
"""In place of the last name of a concatenation: all inputs that are left."""

FIRST, LAST, EMBEDDER = "first layer", "last layer", "embedder"
SHARED = "modulation of all blocks at once: its error would meet itself in each"


@dataclass(frozen=True)
class Block:
    """One kind of repeated block. All its linears and convolutions are targets; what lies outside stays.

    Attributes:
        prefix: Path of the blocks, with `*` for an index. Of two kinds that hold a path the first counts.
        modulation: Linears that compute the adaLN shifts, scales and gates: one input row per image.
        groups: Linears that read one and the same tensor.
        segments: Linears whose input is a concatenation, with the layers whose outputs it joins, in order; `REST`
            stands for as many inputs as the others leave.
        after_gelu: Linears that read the output of a GELU, with the K-segments that do.
        modulated: Linears that read a modulated LayerNorm.
        stream: Linears and 1 x 1 convolutions that read the residual stream as it is, without a norm: like larger
            convolutions they are solved with 16-bit activations.
    """

    prefix: str
    modulation: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    segments: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    after_gelu: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    modulated: Mapping[str, Modulated] = field(default_factory=dict[str, Modulated])
    stream: tuple[str, ...] = ()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("(" + re.escape(self.prefix).replace(r"\*", r"\d+") + r")\.(.+)")

    def site(self, path: str) -> Site | None:
        """Where `path` lies in a block of this kind; None if it does not."""
        match = self._pattern.fullmatch(path)
        return Site(self, match[1], match[2]) if match else None


@dataclass(frozen=True)
class Site:
    """A module's place: which kind of block, which block, and its name within."""

    block: Block
    parent: str
    name: str

    @property
    def is_modulation(self) -> bool:
        """Whether this is an adaLN linear."""
        return self.name in self.block.modulation

    @property
    def reads_stream(self) -> bool:
        """Whether this reads the residual stream without a norm."""
        return self.name in self.block.stream

    @property
    def group(self) -> tuple[str, ...]:
        """Paths of all linears that read the tensor that this one reads, itself included."""
        mates = next((group for group in self.block.groups if self.name in group), (self.name,))
        return tuple(f"{self.parent}.{mate}" for mate in mates)

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the layers whose outputs this one's input joins, or `REST`; empty for a plain input."""
        sources = self.block.segments.get(self.name, ())
        return tuple(source if source == REST else f"{self.parent}.{source}" for source in sources)

    @property
    def modulated(self) -> Modulated | None:
        """What modulates the input, under its full path; None for any other input."""
        found = self.block.modulated.get(self.name)
        return found and replace(found, linear=f"{self.parent}.{found.linear}")

    def shifts(self, shift: float, segments: int) -> tuple[float, ...]:
        """`shift` for the K-segments that come out of a GELU and 0 for the others; empty if none does."""
        shifted = self.block.after_gelu.get(self.name, ())
        return tuple(shift if segment in shifted else 0.0 for segment in range(segments)) if shifted else ()


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        name: Short name.
        class_names: The diffusers classes it describes.
        blocks: The kinds of blocks whose linears and convolutions are quantized.
        outside: Globs of layers outside the blocks, with the reason why they are kept; the first that matches counts.
        forward: The module whose `install` lets a model run its groups as one. Without one the members of a group
            still share smoothing and the first factor of the branch, but run one by one.
        conditioning: The module whose `conditionings` gives samples of the vector that drives the modulation;
            without one nothing is smoothed by it.
        notes: What a person should know before trusting the declaration.
    """

    name: str
    class_names: tuple[str, ...]
    blocks: tuple[Block, ...]
    outside: Mapping[str, str] = field(default_factory=dict[str, str])
    forward: str | None = None
    conditioning: str | None = None
    notes: tuple[str, ...] = ()

    def install(self, model: nn.Module) -> None:
        """Makes a model run layers that share an input as one, once they are few-bit. Changes no tensor."""
        if self.forward is not None:
            import_module(self.forward).install(model)

    def conditionings(self, model: nn.Module, parameters: Parameters) -> Float[Tensor, "samples dim"]:
        """Samples of the vector that drives the modulation. Only for a family that has `conditioning`."""
        return import_module(str(self.conditioning)).conditionings(model, parameters)

    def why_kept(self, path: str) -> str:
        """Why a layer outside the blocks keeps its 16 bits."""
        reasons = (reason for glob, reason in self.outside.items() if fnmatchcase(path, glob))
        return next(reasons, f"outside the blocks of {self.name}")

    def site(self, path: str) -> Site | None:
        """Where a module lies; None for everything outside the blocks."""
        return next((site for block in self.blocks if (site := block.site(path))), None)
