"""Packed layers of any shape: read they compute what the file means, and written they are the file's bits again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import nunchaku_files as files
from bits import expect_bits
from bittern.checkpoints import TensorSpec
from bittern.checkpoints.nunchaku import OLDER, Incoming, Unit, incoming, outgoing
from bittern.checkpoints.nunchaku.units import GELU_SHIFT
from bittern.layers import QuantLinear
from converted import agree, inputs

PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LENGTHS = st.sampled_from([4, 36, 64, 100, 128, 132, 200, 256])
INPUTS = st.sampled_from([16, 48, 64, 80, 128, 144, 192, 256])
RANKS = st.sampled_from([16, 32, 48])
SEEDS = st.integers(0, 2**16)


def headers_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Path, TensorSpec]]:
    return {name: (Path("f.safetensors"), TensorSpec(tuple(t.shape), t.dtype)) for name, t in tensors.items()}


def others_of(unit: Unit) -> dict[str, tuple[int, ...]]:
    """Shapes of the dense model, which tell that the layers have biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target, rows in zip(unit.targets, unit.rows, strict=True):
        shapes |= {f"{target}.weight": (rows, unit.k), f"{target}.bias": (rows,)}
    return shapes


def read(unit: Unit, tensors: Mapping[str, Tensor]) -> tuple[Incoming, dict[str, Tensor]]:
    found = incoming(headers_of(tensors), [unit], others_of(unit), tensors.__getitem__)
    ours = dict(found.tensors(tensors.__getitem__))
    assert {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in ours.items()} == found.specs()
    return found, ours


def write(unit: Unit, found: Incoming, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = outgoing(found.config, headers_of(ours), [unit], ours.__getitem__, OLDER, "the file")
    return dict(out.tensors(ours.__getitem__))


def layers_of(unit: Unit, found: Incoming, ours: Mapping[str, Tensor]) -> list[QuantLinear]:
    """The unit's targets as layers; what a group shares is its first member's."""
    layers: list[QuantLinear] = []
    for target, rows in zip(unit.targets, unit.rows, strict=True):
        scheme = found.config.scheme(target)
        layer = QuantLinear.empty(unit.k, rows, scheme, unit.segments, device="meta", dtype=torch.float32)
        for leaf in (*scheme.tensor_shapes(rows, unit.segments), "bias"):
            name = f"{target}.{leaf}"
            layer.load(leaf, ours[name] if name in ours else ours[f"{unit.targets[0]}.{leaf}"])
        layer.path = "a16"
        layers.append(layer)
    return layers


def expect_meaning(unit: Unit, found: Incoming, ours: Mapping[str, Tensor], run: Callable[[Tensor], Tensor]) -> None:
    x = inputs(unit.k)
    parts = [layer(list(x.split(unit.segments, dim=-1))) for layer in layers_of(unit, found, ours)]
    agree(torch.cat(parts, dim=-1), run(x))


def svdq(unit: Unit, rank: int, weight: str, newer: bool, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    inputs_of = unit.segments if len(unit.packed) > 1 else (unit.k,)
    for name, k in zip(unit.packed, inputs_of, strict=True):
        made = files.svdq(files.Random(dtype, seed), name, unit.n, k, rank, weight=weight, newer=newer)
        if weight == "nvfp4":
            # A power of two, so that the product with `wcscales` is what 16 bits hold.
            made[f"{name}.wtscale"] = torch.full((1,), 2.0**-13, dtype=dtype)
        tensors |= made
    return tensors


def meaning(unit: Unit, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    if len(unit.packed) == 1:
        (name,), (shift, *_) = unit.packed, unit.shifts
        return files.meaning(files.of_layer(tensors, name), unit.n, unit.k, shift=shift)
    runs = [
        files.meaning(files.of_layer(tensors, name), unit.n, k, shift=shift)
        for name, k, shift in zip(unit.packed, unit.segments, unit.shifts, strict=True)
    ]
    return lambda x: sum(
        (run(part) for run, part in zip(runs, x.split(unit.segments, -1), strict=True)), torch.zeros(1)
    )


@PROPERTY
@given(
    rows=st.lists(LENGTHS, min_size=1, max_size=3),
    segments=st.lists(INPUTS, min_size=1, max_size=2),
    rank=RANKS,
    weight=st.sampled_from(["int4", "nvfp4"]),
    newer=st.booleans(),
    shifted=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=SEEDS,
)
@example(
    rows=[64], segments=[64, 80], rank=16, weight="nvfp4", newer=False, shifted=False, dtype=torch.bfloat16, seed=0
)
@example(rows=[100], segments=[128, 256], rank=32, weight="int4", newer=True, shifted=True, dtype=torch.float16, seed=1)
@example(
    rows=[128, 128], segments=[256], rank=32, weight="int4", newer=False, shifted=False, dtype=torch.bfloat16, seed=2
)
@example(rows=[256], segments=[128], rank=48, weight="nvfp4", newer=False, shifted=False, dtype=torch.float16, seed=3)
def test_layers_for_4_bit_activations(
    rows: list[int],
    segments: list[int],
    rank: int,
    weight: str,
    newer: bool,
    shifted: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Several targets' rows, or a layer's inputs in two packed layers; lengths that fill no tile; both formats."""
    if len(segments) > 1:
        rows = rows[:1]
    shifted = shifted and weight == "int4"
    unit = Unit(
        targets=tuple(f"block.t{i}" for i in range(len(rows))),
        packed=tuple(f"block.p{i}" for i in range(len(segments))),
        rows=tuple(rows),
        segments=tuple(segments),
        shifts=(0.0,) * (len(segments) - 1) + (GELU_SHIFT * shifted,),
    )
    tensors = svdq(unit, rank, weight, newer, dtype, seed)
    found, ours = read(unit, tensors)
    expect_meaning(unit, found, ours, meaning(unit, tensors))

    # What lies in the padding is not kept: written once it is zeros, or ones, and from then on everything stays.
    once = write(unit, found, ours)
    for name in unit.packed:
        assert once[f"{name}.smooth_orig"] is once[f"{name}.smooth"]
    found_again, again = read(unit, once)
    for name, tensor in ours.items():
        if name.endswith(".bias") and (shifted or len(segments) > 1):
            # Rounded to 16 bits behind the correction, or the sum of two.
            wide = 2.0 ** (-8 if dtype == torch.bfloat16 else -11) * (1 + tensor.abs().max() * (1 + 2 * shifted))
            assert torch.allclose(again[name], tensor, rtol=0, atol=float(wide)), name
        elif name.endswith(".row_scales"):
            assert torch.equal(again[name], tensor), name
        else:
            assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
    plain = {name: t for name, t in write(unit, found_again, again).items() if not name.endswith("bias")}
    expect_bits(plain, {name: once[name] for name in plain})

    whole = unit.n % 128 == 0 and all(length % 128 == 0 for length in segments)
    if whole and not newer:
        kept = {name: t for name, t in tensors.items() if not name.endswith(("bias", "_orig", "cscales", "wtscale"))}
        expect_bits({name: once[name] for name in kept}, kept)


@PROPERTY
@given(
    length=st.integers(1, 40),
    groups=st.integers(1, 4),
    splits=st.sampled_from([1, 3, 6]),
    symmetric=st.booleans(),
    seed=SEEDS,
)
def test_layers_for_16_bit_activations(length: int, groups: int, splits: int, symmetric: bool, seed: int) -> None:
    n, k = 4 * length * splits, 64 * groups
    unit = Unit(("block.t",), ("block.p",), (n,), (k,), (0.0,), splits)
    tensors = files.awq(files.Random(torch.bfloat16, seed), "block.p", n, k, symmetric=symmetric)
    found, ours = read(unit, tensors)
    assert found.config.scheme("block.t").rank == (0 if symmetric else groups)
    expect_meaning(unit, found, ours, files.awq_meaning(files.of_layer(tensors, "block.p"), splits))
    expect_bits(write(unit, found, ours), tensors)


def test_every_leaf_matters() -> None:
    """A layer that reads one leaf as constants would agree with no file: damaging any of them is seen."""
    unit = Unit(("block.t",), ("block.p",), (128,), (128,), (0.0,))
    for weight in ("int4", "nvfp4"):
        tensors = svdq(unit, 16, weight, False, torch.bfloat16, 0)
        found, ours = read(unit, tensors)
        x: Any = [inputs(128)]
        y = layers_of(unit, found, ours)[0](x)
        for name, tensor in tensors.items():
            if name.endswith("_orig") or name.endswith("wtscale"):
                continue
            changed = tensor.view(torch.uint8).flatten().roll(tensor.element_size() * 5).view(tensor.dtype)
            _, moved = read(unit, {**tensors, name: changed.reshape(tensor.shape)})
            assert not torch.allclose(layers_of(unit, found, moved)[0](x), y, rtol=1e-3), name
