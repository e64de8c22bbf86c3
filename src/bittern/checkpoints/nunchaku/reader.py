"""From packed files to bittern's tensors: what a file must hold, and what becomes of it. Names and headers first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.checkpoints.config import CheckpointConfig, Target
from bittern.checkpoints.files import MEND, TensorSpec
from bittern.checkpoints.native import Headers, surplus
from bittern.checkpoints.nunchaku import packed
from bittern.checkpoints.nunchaku.layout import GROUP, RANK_MULTIPLE
from bittern.checkpoints.nunchaku.packed import NEWER, OLDER, Read, Style
from bittern.checkpoints.nunchaku.units import Unit
from bittern.errors import UserError
from bittern.scheme import Scheme

_FLOATS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Incoming:
    """A packed model on its way: everything but the values.

    Attributes:
        style: Of the file.
        units: With the scheme that their targets get.
        config: Of the bittern checkpoint that it becomes.
        copies: Tensors that stay as they are: our name -> the file's.
        headers: Of the file.
    """

    style: Style
    units: tuple[tuple[Unit, Scheme], ...]
    config: CheckpointConfig
    copies: Mapping[str, str]
    headers: Headers

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the checkpoint."""
        found = {ours: self.headers[theirs][1] for ours, theirs in self.copies.items()}
        for unit, scheme in self.units:
            for target, rows in zip(unit.targets, unit.rows, strict=True):
                leaves = self.config.leaves(target)
                found |= {f"{target}.{leaf}": TensorSpec(*spec) for leaf, spec in leaves.items()}
                if f"{unit.packed[-1]}.bias" in self.headers:
                    made = len(unit.packed) > 1 or scheme.shift or unit.splits > 1
                    found[f"{target}.bias"] = TensorSpec((rows,), torch.float32 if made else self.style.dtype)
        return found

    def tensors(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the checkpoint, one unit at a time in memory."""
        wanted = self.specs()
        for ours, theirs in self.copies.items():
            yield ours, read(theirs)
        for unit, scheme in self.units:
            found = packed.read_unit(unit, self.style, scheme, read, self.headers.__contains__)
            # What a group shares comes with each member of a file that shares nothing.
            yield from ((name, tensor) for name, tensor in found.items() if name in wanted)


def incoming(
    headers: Headers,
    units: Sequence[Unit],
    others: Mapping[str, tuple[int, ...]],
    read: Read,
    *,
    renamed: Mapping[str, str] | None = None,
    groups: Iterable[Sequence[str]] = (),
    weight: str | None = None,
    rank: int | None = None,
    name: str = "nunchaku",
) -> Incoming:
    """What a packed file becomes.

    Args:
        headers: Of the file.
        units: What its packed layers are.
        others: Shapes of the model's other parameters and buffers, by our names.
        read: Gives the file's tensors; only small ones are asked for.
        renamed: What the file calls some of the others.
        groups: Targets that read one tensor; they become a group if they share smoothing and the branch's first factor.
        weight: The format of W4A4 weights that the file says it has, if it says so.
        rank: That the file says it has, if it says so.
        name: What to call the recipe.

    Raises:
        UserError: for the first tensor that is missing, surplus, or of a wrong shape or dtype.
    """
    for unit in units:
        _check_unit(unit)
    style = _style(headers, units)
    if weight not in (None, style.weight):
        raise UserError(f"the file says that its weights are {weight} and holds {style.weight}: {MEND}")
    copies = {ours: (renamed or {}).get(ours, ours) for ours in others if not _is_leaf(ours, units)}
    ranks = {unit.packed: _rank(headers, style, unit, rank) for unit in units if not unit.is_awq}
    expected: dict[str, TensorSpec] = {}
    for unit in units:
        expected |= packed.leaves(unit, style, ranks.get(unit.packed, 0))
        for target in unit.targets:
            if f"{target}.bias" not in others:
                expected.pop(f"{unit.packed[-1]}.bias", None)
    _check(headers, expected, copies, others, style, {name for unit in units for name in packed.optional(unit)})

    branched = any(
        bool(packed.offset(read(f"{unit.packed[0]}.wscales"), read(f"{unit.packed[0]}.wzeros")).any())
        for unit in units
        if unit.is_awq
    )
    found: list[tuple[Unit, Scheme]] = []
    for unit in units:
        total = unit.k // GROUP * branched if unit.is_awq else ranks[unit.packed] * len(unit.packed)
        found.append((unit, packed.scheme(unit, style, total)))
    schemes = list(dict.fromkeys(scheme for _, scheme in found))
    config = CheckpointConfig(
        recipe={"name": f"{name}-{style.weight}", "summary": f"read from a file of Nunchaku's, {style.weight}"},
        schemes=tuple(schemes),
        targets={
            target: Target(scheme=schemes.index(scheme), shape=(rows, unit.k))
            for unit, scheme in found
            for target, rows in zip(unit.targets, unit.rows, strict=True)
        },
        groups=(
            *(unit.targets for unit, _ in found if len(unit.targets) > 1),
            *_alike(groups, style, headers, dict(found_by_target(found)), read),
        ),
        segments={unit.targets[0]: unit.segments for unit, _ in found if len(unit.segments) > 1},
    )
    return Incoming(style, tuple(found), config, copies, headers)


def found_by_target(units: Iterable[tuple[Unit, Scheme]]) -> Iterator[tuple[str, Scheme]]:
    """The scheme of every target."""
    for unit, scheme in units:
        for target in unit.targets:
            yield target, scheme


def _alike(
    groups: Iterable[Sequence[str]], style: Style, headers: Headers, schemes: Mapping[str, Scheme], read: Read
) -> Iterator[tuple[str, ...]]:
    """The groups whose members have one scheme, and the same smoothing and first factor, bit for bit."""
    for group in groups:
        if any(schemes[path] != schemes[group[0]] for path in group):
            continue
        shared = [f".{style.names.smooth}", f".{style.names.down}"]
        if all(
            headers[group[0] + leaf][1] == headers[path + leaf][1]
            and torch.equal(read(group[0] + leaf), read(path + leaf))
            for leaf in shared
            for path in group[1:]
        ):
            yield tuple(group)


def _check_unit(unit: Unit) -> None:
    """Refuses a layer that the packing has no room for."""
    if unit.is_awq and (unit.n % 4 or unit.k % GROUP):
        raise UserError(
            f"{unit.packed[0]} is {unit.n} x {unit.k}: expected multiples of 4 and {GROUP}, as W4A16 layers have"
        )
    if len(unit.segments) > len(unit.packed) and any(length % GROUP for length in unit.segments[:-1]):
        raise UserError(
            f"{unit.packed[0]} reads {' + '.join(map(str, unit.segments))} inputs: expected multiples of {GROUP}, so "
            "that no group of weights reads two tensors"
        )


def _is_leaf(name: str, units: Sequence[Unit]) -> bool:
    return name.rpartition(".")[0] in {target for unit in units for target in unit.targets}


def _style(headers: Headers, units: Sequence[Unit]) -> Style:
    plain = [unit for unit in units if not unit.is_awq]
    name = plain[0].packed[0] if plain else units[0].packed[0]
    scales = _spec(headers, f"{name}.wscales")
    if not plain:
        return Style("int4", scales.dtype, OLDER)
    weight = "nvfp4" if scales.dtype == torch.float8_e4m3fn else "int4"
    names = NEWER if f"{name}.{NEWER.smooth}" in headers else OLDER
    dtype = _spec(headers, f"{name}.{names.smooth}").dtype
    if dtype not in _FLOATS:
        raise UserError(f"tensor '{name}.{names.smooth}' has dtype {dtype}: expected bfloat16 or float16")
    return Style(weight, dtype, names)


def _rank(headers: Headers, style: Style, unit: Unit, said: int | None) -> int:
    ranks = set[int]()
    for name in unit.packed:
        leaf = f"{name}.{style.names.down}"
        shape = _spec(headers, leaf).shape
        rank = shape[1] if len(shape) == 2 else 0
        if rank < 1 or rank % RANK_MULTIPLE:
            raise UserError(
                f"tensor {leaf!r} has shape {list(shape)}: expected a rank that is a multiple of {RANK_MULTIPLE}"
            )
        if said is not None and rank != said:
            raise UserError(f"tensor {leaf!r} has rank {rank}: expected {said}, as the file's own description says")
        ranks.add(rank)
    if len(ranks) > 1:
        raise UserError(f"{' and '.join(unit.packed)} have ranks {sorted(ranks)}: expected one")
    return ranks.pop()


def _spec(headers: Headers, name: str) -> TensorSpec:
    if name not in headers:
        raise UserError(f"tensor {name!r} is missing: the file is damaged, or not one of Nunchaku's")
    return headers[name][1]


def _check(
    headers: Headers,
    expected: Mapping[str, TensorSpec],
    copies: Mapping[str, str],
    others: Mapping[str, tuple[int, ...]],
    style: Style,
    optional: Collection[str],
) -> None:
    """Refuses a file whose tensors are not those that are expected."""
    for name in (*expected, *copies.values()):
        if name not in headers and name not in optional:
            raise UserError(f"tensor {name!r} is missing: {MEND}")
    shapes = {theirs: others[ours] for ours, theirs in copies.items()}
    for name, (file, spec) in headers.items():
        path, _, leaf = name.rpartition(".")
        if leaf == style.names.smooth_orig and f"{path}.{style.names.smooth}" in expected:
            continue
        if name not in expected and name not in shapes:
            raise surplus(name, file, [*expected, *shapes])
        shape = expected[name].shape if name in expected else shapes[name]
        if spec.shape != shape:
            raise UserError(
                f"tensor {name!r} in {file.name} has shape {list(spec.shape)}: expected {list(shape)}; "
                "the file does not belong to its config"
            )
        if name in expected and spec.dtype != expected[name].dtype:
            raise UserError(f"tensor {name!r} in {file.name} has dtype {spec.dtype}: expected {expected[name].dtype}")
        if name in shapes and not spec.dtype.is_floating_point:
            raise UserError(f"tensor {name!r} in {file.name} has dtype {spec.dtype}: expected a float type; {MEND}")
