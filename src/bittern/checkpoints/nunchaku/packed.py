"""One unit's tensors, packed and as bittern stores them.

A packed W4A4 layer computes what a bittern layer computes (the module docstring of `bittern.ops.reference`), with

- `smooth`, `lora_down`, `lora_up` (in the newer generation of names `smooth_factor`, `proj_down`, `proj_up`) as
  `smooth`, `down` and `up`;
- of a layer behind a GELU in an int4 file, the bias with the shift's correction taken off already: the true bias is
  b = stored + h · sum_j What_ij / s_j;
- of nvfp4, a scale for each row (`wcscales`) and one for all (`wtscale`), which multiply the scales of the groups.

A W4A16 layer computes w = code · wscales + wzeros with codes 0..15. As signed codes c = code - 8 that is
c · wscales + (wzeros + 8 · wscales): where the second term is not zero everywhere, it is a branch of one rank for each
group, whose first factor adds up the group's inputs, in float32 so that nothing is rounded.

Numbers that are worked out here (biases that are corrected or added up) are stored in float32 for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bittern import formats
from bittern.checkpoints.files import TensorSpec
from bittern.checkpoints.nunchaku import layout
from bittern.checkpoints.nunchaku.layout import FP4_GROUP, GROUP, padded
from bittern.checkpoints.nunchaku.units import Unit
from bittern.errors import UserError
from bittern.scheme import Scheme

Read = Callable[[str], Tensor]
"""A tensor by its name."""


@dataclass(frozen=True)
class Generation:
    """What a packed file calls the tensors whose names have changed."""

    smooth: str
    smooth_orig: str
    down: str
    up: str


OLDER = Generation("smooth", "smooth_orig", "lora_down", "lora_up")
NEWER = Generation("smooth_factor", "smooth_factor_orig", "proj_down", "proj_up")


@dataclass(frozen=True)
class Style:
    """How one packed file stores its layers.

    Attributes:
        weight: "int4" or "nvfp4".
        dtype: Of everything that is a float of 16 bits.
        names: The generation of names.
    """

    weight: str
    dtype: torch.dtype
    names: Generation

    @property
    def group(self) -> int:
        """Weights under one scale."""
        return GROUP if self.weight == "int4" else FP4_GROUP


def leaves(unit: Unit, style: Style, rank: int) -> dict[str, TensorSpec]:
    """The packed tensors of a unit, with the rank of each of its packed layers."""
    found: dict[str, TensorSpec] = {}
    n, dtype, names = padded(unit.n), style.dtype, style.names
    for name, k in _inputs(unit):
        if unit.is_awq:
            specs = {
                "qweight": TensorSpec((unit.n // 4, k // 2), torch.int32),
                "wscales": TensorSpec((k // GROUP, unit.n), dtype),
                "wzeros": TensorSpec((k // GROUP, unit.n), dtype),
                "bias": TensorSpec((unit.n,), dtype),
            }
        else:
            k = padded(k)
            scales = dtype if style.weight == "int4" else torch.float8_e4m3fn
            specs = {
                "qweight": TensorSpec((n, k // 2), torch.int8),
                "wscales": TensorSpec((k // style.group, n), scales),
                names.smooth: TensorSpec((k,), dtype),
                names.down: TensorSpec((k, rank), dtype),
                names.up: TensorSpec((n, rank), dtype),
                "bias": TensorSpec((n,), dtype),
            }
            if style.weight == "nvfp4":
                specs |= {"wcscales": TensorSpec((n,), dtype), "wtscale": TensorSpec((1,), dtype)}
        found |= {f"{name}.{leaf}": spec for leaf, spec in specs.items()}
    return found


def optional(unit: Unit) -> set[str]:
    """Packed tensors that a unit may do without: scales that are 1, and all biases but one, which are 0."""
    scales = {f"{name}.{leaf}" for name in unit.packed for leaf in ("wcscales", "wtscale")}
    return scales | {f"{name}.bias" for name in unit.packed[:-1]}


def scheme(unit: Unit, style: Style, rank: int) -> Scheme:
    """What a unit's targets are. `rank` is that of the branches of all its packed layers together."""
    dtype = next(name for name, dtype in formats.DTYPES.items() if dtype == style.dtype)
    if unit.is_awq:
        return Scheme(weight="int4", scale_dtype=dtype, activations=16, rank=rank, branch_dtype="fp32")
    return Scheme(
        weight=style.weight,
        group_size=style.group,
        scale_dtype=dtype if style.weight == "int4" else "e4m3",
        activations=4,
        rank=rank,
        branch_dtype=dtype,
        smooth=True,
        shift=unit.shifts if any(unit.shifts) else (),
    )


def read_unit(unit: Unit, style: Style, scheme: Scheme, read: Read, has: Callable[[str], bool]) -> dict[str, Tensor]:
    """A unit's packed tensors as bittern stores them, by name; what a group shares under its first target.

    Args:
        unit: What to read.
        style: Of the file.
        scheme: What the targets are.
        read: Gives packed tensors.
        has: Whether there is one of this name.

    Raises:
        UserError: for scales of nvfp4 that are below 0, or one for all that is 0.
    """
    tensors = _read_awq(unit, scheme, read) if unit.is_awq else _read_svdq(unit, style, scheme, read, has)
    if has(f"{unit.packed[-1]}.bias"):
        tensors["bias"] = _bias(unit, scheme, tensors, read, has)
    shared = ("smooth", "down")
    out: dict[str, Tensor] = {}
    start = 0
    for target, rows in zip(unit.targets, unit.rows, strict=True):
        for leaf, tensor in tensors.items():
            if leaf in shared:
                if start == 0:
                    out[f"{target}.{leaf}"] = tensor
            else:
                out[f"{target}.{leaf}"] = tensor[start : start + rows]
        start += rows
    return out


def _read_svdq(unit: Unit, style: Style, scheme: Scheme, read: Read, has: Callable[[str], bool]) -> dict[str, Tensor]:
    n, group = unit.n, style.group
    unpack_scales = layout.unpack_scales if style.weight == "int4" else layout.unpack_fp4_scales
    parts: dict[str, list[Tensor]] = {leaf: [] for leaf in ("codes", "scales", "smooth", "down", "up")}
    row_scales: list[Tensor] = []
    for name, k in _inputs(unit):
        groups = -(-k // group)
        parts["codes"].append(layout.unpack_weight(read(f"{name}.qweight"))[:n, : groups * group // 2])
        parts["scales"].append(unpack_scales(read(f"{name}.wscales"))[:n, :groups])
        parts["smooth"].append(layout.unpack_vector(read(f"{name}.{style.names.smooth}"))[:k])
        parts["down"].append(layout.unpack_down(read(f"{name}.{style.names.down}"))[:, :k])
        parts["up"].append(layout.unpack_up(read(f"{name}.{style.names.up}"))[:n])
        if style.weight == "nvfp4":
            # Beyond the sign bit alone, which is -0.
            _check_scales(f"{name}.wscales", parts["scales"][-1].view(torch.uint8) > 128, "0 or more")
            row_scales.append(_row_scales(name, n, read, has))
    tensors = {
        leaf: found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        for leaf, found in parts.items()
        if leaf != "down"
    }
    tensors["down"] = _block_diagonal(parts["down"])
    if row_scales:
        # One packed layer may hold several segments.
        columns = row_scales if len(unit.packed) > 1 else row_scales * len(unit.segments)
        tensors["row_scales"] = torch.stack(columns, dim=1)
    return tensors


def _row_scales(name: str, n: int, read: Read, has: Callable[[str], bool]) -> Float[Tensor, " n"]:
    rows = torch.ones(n)
    if has(f"{name}.wcscales"):
        rows = layout.unpack_vector(read(f"{name}.wcscales"))[:n].float()
        _check_scales(f"{name}.wcscales", ~(rows >= 0), "0 or more")
    if has(f"{name}.wtscale"):
        whole = read(f"{name}.wtscale").float()
        _check_scales(f"{name}.wtscale", ~(whole > 0), "a value above 0")
        rows = rows * whole
    return rows


def _check_scales(name: str, wrong: Tensor, expected: str) -> None:
    if bad := int(wrong.sum()):
        raise UserError(f"tensor {name!r}: {bad} of {wrong.numel()} scales are negative, 0 or NaN: expected {expected}")


def _read_awq(unit: Unit, scheme: Scheme, read: Read) -> dict[str, Tensor]:
    (name,), (k,) = unit.packed, (unit.k,)
    scales = read(f"{name}.wscales").T
    tensors = {
        "codes": layout.deinterleave(layout.unpack_awq(read(f"{name}.qweight")), unit.splits),
        "scales": layout.deinterleave(scales, unit.splits).contiguous(),
    }
    if scheme.rank:
        offsets = offset(read(f"{name}.wscales"), read(f"{name}.wzeros")).T
        tensors["up"] = layout.deinterleave(offsets, unit.splits).contiguous()
        tensors["down"] = group_sums(k)
    return tensors


def offset(wscales: Float[Tensor, "groups n"], wzeros: Float[Tensor, "groups n"]) -> Float[Tensor, "groups n"]:
    """What a W4A16 layer adds to each weight of a group beyond its signed code; exact in float32."""
    return wzeros.float() + 8 * wscales.float()


def group_sums(k: int) -> Float[Tensor, "groups k"]:
    """The factor that adds up the inputs of each group."""
    return torch.eye(k // GROUP).repeat_interleave(GROUP, dim=1)


def _bias(
    unit: Unit, scheme: Scheme, tensors: Mapping[str, Tensor], read: Read, has: Callable[[str], bool]
) -> Float[Tensor, " n"]:
    if unit.is_awq:
        bias = layout.deinterleave(read(f"{unit.packed[0]}.bias"), unit.splits)
        if unit.splits == 1:
            return bias
        chunks = bias.float().reshape(unit.splits, -1)
        for chunk in raised(unit.splits):
            chunks[chunk] -= 1
        return chunks.reshape(-1)
    stored = [layout.unpack_vector(read(f"{name}.bias"))[: unit.n] for name in unit.packed if has(f"{name}.bias")]
    if len(unit.packed) == 1 and not scheme.shift:
        return stored[0]
    bias = torch.stack([part.double() for part in stored]).sum(dim=0)
    if scheme.shift:
        bias += correction(tensors["codes"], tensors["scales"], tensors["smooth"], unit.segments, scheme)
    return bias.float()


def raised(splits: int) -> set[int]:
    """The chunks of an adaLN linear that are scales: their biases are stored with 1 added."""
    return {1, splits - 2}


def correction(
    codes: Shaped[Tensor, "n bytes"],
    scales: Float[Tensor, "n groups"],
    smooth: Float[Tensor, " k"],
    segments: Sequence[int],
    scheme: Scheme,
) -> Shaped[Tensor, " n"]:
    """H · sum_j What_ij / s_j, in float64: what unsigned activations take off the bias."""
    lay = scheme.layout(segments)
    # What the sum over a group adds to the output for a scale of one.
    weights = torch.zeros(lay.padded_k)
    for segment, shift in zip(lay, scheme.shift, strict=True):
        weights[segment.unpadded] = shift / smooth[segment.logical].float()
    total = torch.empty(codes.shape[0], dtype=torch.float64)
    size = int(scheme.group_size or 0)
    for start in range(0, codes.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        unpacked = scheme.format.unpack(codes[rows], lay.padded_k).float()
        sums = (unpacked * weights).view(unpacked.shape[0], -1, size).sum(dim=-1)
        total[rows] = (sums.double() * scales[rows].double()).sum(dim=-1)
    return total


# Their float32 copies stay in a CPU's cache.
_ROWS = 32


def _block_diagonal(parts: Sequence[Float[Tensor, "_ _"]]) -> Float[Tensor, "r k"]:
    return parts[0] if len(parts) == 1 else torch.block_diag(*parts)


def _inputs(unit: Unit) -> Iterator[tuple[str, int]]:
    """Each packed layer with its inputs."""
    return zip(unit.packed, unit.segments if len(unit.packed) > 1 else (unit.k,), strict=True)
