"""From bittern's tensors to packed files: what fits, why the rest does not, and the bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bittern import formats
from bittern.checkpoints.config import CheckpointConfig
from bittern.checkpoints.files import TensorSpec
from bittern.checkpoints.native import Headers, from_disk
from bittern.checkpoints.nunchaku import layout, packed
from bittern.checkpoints.nunchaku.layout import FP4_GROUP, GROUP, PADDING, RANK_MULTIPLE, padded
from bittern.checkpoints.nunchaku.packed import NEWER, OLDER, Generation, Read, Style
from bittern.checkpoints.nunchaku.units import Unit
from bittern.errors import UserError
from bittern.formats import KLayout, round_to
from bittern.scheme import Scheme


@dataclass(frozen=True)
class Outgoing:
    """A few-bit model on its way into a packed file.

    Attributes:
        style: Of the file.
        units: What the file's packed layers are.
        rank: Of each packed layer's branch.
        config: Of the checkpoint.
        copies: Tensors that stay as they are: our name -> the file's.
        headers: Of the checkpoint.
        notes: What a person should know of the result.
    """

    style: Style
    units: tuple[Unit, ...]
    rank: int
    config: CheckpointConfig
    copies: Mapping[str, str]
    headers: Headers
    notes: tuple[str, ...]

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the file."""
        found = {theirs: self.headers[ours][1] for ours, theirs in self.copies.items()}
        for unit in self.units:
            leaves = packed.leaves(unit, self.style, self.rank)
            if self.style.names is OLDER and not unit.is_awq:
                for name in unit.packed:
                    leaves[f"{name}.{OLDER.smooth_orig}"] = leaves[f"{name}.{OLDER.smooth}"]
            elif self.style.names is NEWER and f"{unit.targets[0]}.bias" not in self.headers:
                del leaves[f"{unit.packed[0]}.bias"]
            found |= leaves
        return found

    def tensors(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the file, one unit at a time in memory."""
        wanted = self.specs()
        for ours, theirs in self.copies.items():
            yield theirs, read(ours)
        for unit in self.units:
            leaves = stacked(unit, self.config, self.headers, read)
            scheme = self.config.scheme(unit.targets[0])
            made = _awq(unit, self.style, leaves) if unit.is_awq else _svdq(unit, self.style, scheme, self.rank, leaves)
            if self.style.names is OLDER and not unit.is_awq:
                made |= {f"{name}.{OLDER.smooth_orig}": made[f"{name}.{OLDER.smooth}"] for name in unit.packed}
            yield from ((name, tensor) for name, tensor in made.items() if name in wanted)


def outgoing(
    config: CheckpointConfig,
    headers: Headers,
    units: Sequence[Unit],
    read: Read,
    names: Generation,
    what: str,
    renamed: Mapping[str, str] | None = None,
) -> Outgoing:
    """What a checkpoint becomes in a packed file.

    Args:
        config: Of the checkpoint.
        headers: Of its files.
        units: What the file's packed layers are; they hold every target.
        read: Gives the checkpoint's tensors.
        names: The generation of names, which also tells the kind of file: newer ones are Lite's.
        what: What messages call the target format.
        renamed: What the file calls tensors that are not quantized.

    Raises:
        UserError: with the reason, for the first layer that the format cannot hold.
    """
    plain = [unit for unit in units if not unit.is_awq]
    first = config.scheme((plain or units)[0].targets[0])
    if first.weight not in ("int4", "nvfp4"):
        raise UserError(f"{what} has no {first.weight} weights: expected a checkpoint in int4 or nvfp4")
    style = Style(first.weight, _dtype(first, what), names)
    notes: list[str] = []
    for unit in units:
        for target in unit.targets:
            _check(target, unit, config, style, what)
    ranks = {name: rank for unit in plain for name, rank in _ranks(unit, config, headers, read).items()}
    wide = {name: -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE or RANK_MULTIPLE for name, rank in ranks.items()}
    if len(set(wide.values())) > 1:
        one, other = min(wide, key=wide.__getitem__), max(wide, key=wide.__getitem__)
        raise UserError(
            f"{one} has rank {ranks[one]} and {other} rank {ranks[other]}: {what} has one rank for all layers; "
            "quantize with one rank; what was imported of an original file goes back with --to nunchaku"
        )
    rank = next(iter(wide.values()), 0)
    if ranks and set(ranks.values()) != {rank}:
        notes.append(f"branches are filled up with zeros to rank {rank}, which changes no output")
    if any(config.scheme(target).shift for unit in plain for target in unit.targets) and not any(
        any(unit.shifts) for unit in plain
    ):
        notes.append(f"{what} has no unsigned activations: inputs behind a GELU will be rounded with their sign")
    biases = (headers[f"{target}.bias"][1] for unit in units for target in unit.targets if f"{target}.bias" in headers)
    if any(spec.dtype != style.dtype for spec in biases):
        notes.append(f"biases are stored in {style.dtype}: wider ones are rounded")
    taken = {target for unit in units for target in unit.targets}
    kept = [name for name in headers if name.rpartition(".")[0] not in taken]
    copies = {name: (renamed or {}).get(name, name) for name in kept}
    return Outgoing(style, tuple(units), rank, config, copies, headers, tuple(notes))


def _dtype(scheme: Scheme, what: str) -> torch.dtype:
    name = scheme.scale_dtype if scheme.weight == "int4" else scheme.branch_dtype
    if name not in ("bf16", "fp16"):
        raise UserError(f"{what} has scales in 16 bits, and these are {name}: quantize with scale_dtype bf16 or fp16")
    return formats.dtype_of(name)


def _check(target: str, unit: Unit, config: CheckpointConfig, style: Style, what: str) -> None:
    """Refuses a target that its packed layer cannot hold."""
    if target not in config.targets:
        raise UserError(f"{target} was kept in 16 bits: {what} packs it; quantize it as well")
    if config.targets[target].kernel:
        raise UserError(f"{target} is a convolution: {what} packs linears only")
    scheme, shape = config.scheme(target), config.targets[target].shape
    group = GROUP if unit.is_awq else style.group
    wanted = "int4" if unit.is_awq else style.weight
    if scheme.weight != wanted:
        raise UserError(
            f"{target} is {scheme.weight} with {scheme.activations}-bit activations: "
            f"expected {wanted}, as {what} has it there"
        )
    if scheme.group_size != group:
        said = "whole rows" if scheme.group_size is None else f"groups of {scheme.group_size}"
        raise UserError(f"{target} has one scale for {said}: {what} has groups of {group}; quantize with these")
    floats = {scheme.branch_dtype} if scheme.rank or scheme.smooth else set[str]()
    floats |= {scheme.scale_dtype} if scheme.weight == "int4" else set()
    if any(formats.dtype_of(name) != style.dtype for name in floats) and not unit.is_awq:
        raise UserError(f"{target} mixes {' and '.join(sorted(floats))}: {what} has one type, {style.dtype}")
    if unit.is_awq:
        if scheme.activations != 16 or scheme.smooth or (scheme.rank and scheme.rank * GROUP != shape[1]):
            raise UserError(
                f"{target} has {scheme.activations}-bit activations, rank {scheme.rank} and smoothing "
                f"{scheme.smooth}: {what} packs it for 16-bit activations, without a branch and smoothing"
            )
        if shape[0] % 4 or shape[1] % GROUP:
            raise UserError(f"{target} is {shape[0]} x {shape[1]}: {what} has multiples of 4 x {GROUP}")
        return
    if scheme.activations != 4:
        raise UserError(f"{target} was solved for {scheme.activations}-bit activations: {what} has 4-bit ones there")
    # Its modules have no padding.
    if style.names is NEWER and (shape[0] % PADDING or shape[1] % PADDING):
        raise UserError(f"{target} is {shape[0]} x {shape[1]}: {what} has multiples of {PADDING} only")
    if config.leaders[target] != config.leaders[unit.targets[0]]:
        raise UserError(f"{target} shares no smoothing with {unit.targets[0]}: {what} packs the two as one layer")


def _ranks(unit: Unit, config: CheckpointConfig, headers: Headers, read: Read) -> dict[str, int]:
    """The rank of each packed layer: of several inputs, how many components read each."""
    rank = config.scheme(unit.targets[0]).rank
    if len(unit.packed) == 1 or not rank:
        return dict.fromkeys(unit.packed, rank)
    down = read(f"{config.leaders[unit.targets[0]]}.down")
    parts = down.split(unit.segments, dim=1)
    return {name: int(part.any(dim=1).sum()) for name, part in zip(unit.packed, parts, strict=True)}


def stacked(unit: Unit, config: CheckpointConfig, headers: Headers, read: Read) -> dict[str, Tensor]:
    """A unit's tensors as one layer's, its targets' rows behind one another."""
    leaders = {"smooth", "down"}
    scheme, out = config.scheme(unit.targets[0]), dict[str, Tensor]()
    for leaf in scheme.tensor_shapes(1, unit.segments):
        if leaf in leaders:
            out[leaf] = read(f"{config.leaders[unit.targets[0]]}.{leaf}")
        else:
            parts = [from_disk(read(f"{target}.{leaf}"), leaf, target, config) for target in unit.targets]
            out[leaf] = torch.cat(parts)
    if any(f"{target}.bias" in headers for target in unit.targets):
        biases = [
            read(f"{target}.bias").float() if f"{target}.bias" in headers else torch.zeros(rows)
            for target, rows in zip(unit.targets, unit.rows, strict=True)
        ]
        out["bias"] = torch.cat(biases)
    return out


def _svdq(unit: Unit, style: Style, scheme: Scheme, rank: int, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    n, dtype, names = unit.n, style.dtype, style.names
    rows = padded(n)
    lay = KLayout(unit.segments, style.group)
    ones = torch.ones(unit.k, dtype=dtype)
    smooth = leaves.get("smooth", ones)
    none = torch.zeros(1, unit.k, dtype=dtype), torch.zeros(n, 1, dtype=dtype)
    down, up = leaves.get("down", none[0]), leaves.get("up", none[1])
    bias = leaves.get("bias", torch.zeros(n)).double()
    if any(unit.shifts):
        shifted = replace(scheme, shift=unit.shifts)
        bias = bias - packed.correction(leaves["codes"], leaves["scales"], smooth, unit.segments, shifted)
    out: dict[str, Tensor] = {}
    if style.weight == "nvfp4" and len(unit.packed) < len(unit.segments):
        leaves = {**leaves, **_one_row_scale(unit, leaves)}
    for place, name in enumerate(unit.packed):
        whole = len(unit.packed) == 1
        segment = list(lay)[place]
        codes = slice(None) if whole else slice(segment.padded.start // 2, segment.padded.stop // 2)
        logical, groups = (slice(None),) * 2 if whole else (segment.logical, segment.groups)
        k = unit.k if whole else unit.segments[place]
        columns = padded(k)
        first, second = _components(down[:, logical], up, rank)
        last = place == len(unit.packed) - 1
        scales = layout.fill(leaves["scales"][:, groups], (rows, columns // style.group))
        pack_scales = layout.pack_scales if style.weight == "int4" else layout.pack_fp4_scales
        made = {
            "qweight": layout.pack_weight(layout.fill(leaves["codes"][:, codes], (rows, columns // 2))),
            "wscales": pack_scales(scales),
            names.smooth: layout.pack_vector(layout.fill(smooth[logical], (columns,), 1)),
            names.down: layout.pack_down(layout.fill(first, (rank, columns))),
            names.up: layout.pack_up(layout.fill(second, (rows, rank))),
            "bias": layout.pack_vector(layout.fill(round_to(bias * last, dtype), (rows,))),
        }
        if style.weight == "nvfp4":
            made |= _row_scales(name, leaves["row_scales"][:, place], rows, dtype)
        out |= {f"{name}.{leaf}": tensor for leaf, tensor in made.items()}
    return out


def _components(
    down: Float[Tensor, "r k"], up: Float[Tensor, "n r"], rank: int
) -> tuple[Float[Tensor, "_ k"], Float[Tensor, "n _"]]:
    """The components that read these inputs, where all of them would be too many."""
    if down.shape[0] <= rank:
        return down, up
    reads = down.any(dim=1)
    return down[reads], up[:, reads]


def _one_row_scale(unit: Unit, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scales of several K-segments under one scale a row."""
    first = leaves["row_scales"][:, :1]
    if bool((leaves["row_scales"] == first).all()):
        return {"row_scales": first}
    lay = KLayout(unit.segments, FP4_GROUP)
    whole = KLayout((unit.k,), FP4_GROUP)
    combined = formats.nvfp4.combine(leaves["scales"], leaves["row_scales"], lay)
    scales, rows = formats.nvfp4.split(combined, whole)
    if not torch.equal(formats.nvfp4.combine(scales, rows, whole), combined):
        raise UserError(f"the scales of {unit.packed[0]} do not fit under one scale a row, which is all its file has")
    return {"scales": scales, "row_scales": rows}


def _row_scales(name: str, scales: Float[Tensor, " n"], rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    for whole in _factors(float(scales.amax()), dtype):
        stored = (scales / whole).to(dtype)
        if torch.equal(stored.float() * whole, scales):
            made = layout.pack_vector(layout.fill(stored, (rows,), 1))
            return {"wcscales": made, "wtscale": whole.to(dtype).reshape(1)}
    raise UserError(
        f"the scales of {name}'s rows need more than 16 bits: Nunchaku stores them in {dtype}, with one factor for all"
    )


def _factors(largest: float, dtype: torch.dtype) -> Float[Tensor, " m"]:
    """What rows may have been multiplied with: 1, and what leaves the largest between a half and 2."""
    info = torch.finfo(dtype)
    power = 2.0 ** min(max(math.frexp(largest)[1] - 1, math.log2(info.tiny)), math.log2(info.max) - 1)
    return torch.cat([torch.ones(1), torch.arange(1, 2, info.eps) * power])


def _awq(unit: Unit, style: Style, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    (name,) = unit.packed
    scales = leaves["scales"]
    offsets = torch.zeros_like(scales, dtype=torch.float32)
    if "up" in leaves:
        if not torch.equal(leaves["down"].float(), packed.group_sums(unit.k)):
            raise UserError(f"{name} has a branch that is no offset of groups: W4A16 layers have none")
        offsets = leaves["up"].float()
    zeros = offsets - 8 * scales.float()
    bias = leaves.get("bias", torch.zeros(unit.n)).double()
    if unit.splits > 1:
        chunks = bias.reshape(unit.splits, -1).clone()
        for chunk in packed.raised(unit.splits):
            chunks[chunk] += 1
        bias = chunks.reshape(-1)
    made = {
        "qweight": layout.pack_awq(layout.interleave(leaves["codes"], unit.splits)),
        "wscales": layout.interleave(scales, unit.splits).T.contiguous(),
        "wzeros": layout.interleave(round_to(zeros, style.dtype), unit.splits).T.contiguous(),
        "bias": layout.interleave(round_to(bias, style.dtype), unit.splits),
    }
    return {f"{name}.{leaf}": tensor for leaf, tensor in made.items()}
