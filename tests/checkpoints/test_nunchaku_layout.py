"""Index maps against the published formulas, and there and back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.checkpoints.nunchaku import layout
from bittern.formats import get_packing

TILES = st.integers(1, 3)
RANKS = st.integers(1, 4).map(lambda tiles: 16 * tiles)
SEEDS = st.integers(0, 2**31 - 1)


def numbers(seed: int, *shape: int) -> Tensor:
    """Different everywhere, so that no permutation passes for another."""
    count = torch.Size(shape).numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.to(torch.int32).view(torch.float32).reshape(shape)


def nibbles(seed: int, n: int, k: int) -> Tensor:
    return torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def places(*lengths: int) -> list[Tensor]:
    return list(torch.meshgrid(*map(torch.arange, lengths), indexing="ij"))


@given(TILES, TILES, SEEDS)
def test_weights_lie_where_the_kernels_fetch_them(rows: int, columns: int, seed: int) -> None:
    codes = nibbles(seed, 128 * rows, 128 * columns)
    n, k = places(*codes.shape)
    word = ((n // 128 * (codes.shape[1] // 64) + k // 64) * 8 + n % 128 // 16) * 8 + n % 8
    word = ((word * 4 + k % 32 // 8) * 2 + n % 16 // 8) * 2 + k % 64 // 32
    flat = torch.zeros(codes.numel(), dtype=torch.int8)
    flat[word * 8 + k % 8] = codes
    stored = get_packing("nibbles").pack(flat).view(torch.int8).reshape(codes.shape[0], -1)

    packed = get_packing("nibbles").pack(codes)
    assert torch.equal(layout.unpack_weight(stored), packed)
    assert torch.equal(layout.pack_weight(packed), stored)


@given(TILES, st.integers(1, 5), SEEDS)
def test_scales_and_vectors(rows: int, groups: int, seed: int) -> None:
    scales = numbers(seed, 128 * rows, groups)
    n, g = places(*scales.shape)
    flat = torch.empty(scales.numel())
    flat[(n // 128 * groups + g) * 128 + n % 128 // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2] = scales
    stored = flat.reshape(groups, -1)
    assert torch.equal(layout.unpack_scales(stored), scales)
    assert torch.equal(layout.pack_scales(scales), stored)
    if groups == 1:
        assert torch.equal(layout.unpack_vector(flat), scales[:, 0])
        assert torch.equal(layout.pack_vector(scales[:, 0]), flat)


@given(TILES, st.integers(1, 5), SEEDS)
def test_nvfp4_scales(rows: int, quads: int, seed: int) -> None:
    bits = torch.randint(0, 256, (128 * rows, 4 * quads), generator=torch.Generator().manual_seed(seed))
    scales = bits.to(torch.uint8)
    n, g = places(*scales.shape)
    flat = torch.empty(scales.numel(), dtype=torch.uint8)
    flat[(n // 128 * quads + g // 4) * 512 + n % 8 * 64 + n % 32 // 8 * 16 + n % 128 // 32 * 4 + g % 4] = scales
    stored = flat.reshape(4 * quads, -1)
    assert torch.equal(layout.unpack_fp4_scales(stored), scales)
    assert torch.equal(layout.pack_fp4_scales(scales), stored)


@given(TILES, RANKS, SEEDS)
def test_both_factors_of_the_branch(tiles: int, rank: int, seed: int) -> None:
    length, ranks = 128 * tiles, rank // 16
    down = numbers(seed, rank, length)
    r, c = places(*down.shape)
    flat = torch.empty(down.numel())
    place = ((c // 16 * ranks + r // 16) * 8 + r % 8) * 4 + c % 8 // 2
    flat[place * 8 + r % 16 // 8 * 4 + c % 16 // 8 * 2 + c % 2] = down
    assert torch.equal(layout.unpack_down(flat.reshape(length, rank)), down)
    assert torch.equal(layout.pack_down(down), flat.reshape(length, rank))

    up = numbers(seed, length, rank)
    c, r = places(*up.shape)
    flat = torch.empty(up.numel())
    place = ((c // 16 * ranks + r // 16) * 8 + c % 8) * 4 + r % 8 // 2
    flat[place * 8 + c % 16 // 8 * 4 + r % 16 // 8 * 2 + r % 2] = up
    assert torch.equal(layout.unpack_up(flat.reshape(length, rank)), up)
    assert torch.equal(layout.pack_up(up), flat.reshape(length, rank))


@given(st.integers(1, 8), st.integers(1, 2), SEEDS)
@settings(max_examples=12)
def test_weights_for_16_bit_activations(quarters: int, columns: int, seed: int) -> None:
    codes = nibbles(seed, 4 * quarters, 64 * columns)
    words = torch.zeros(quarters, codes.shape[1] // 2, dtype=torch.int64)
    for o in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            column = c // 64 * 32 + o % 4 * 8 + c % 64 // 32 * 4 + c % 8 // 2
            words[o // 4, column] |= (int(codes[o, c]) + 8) << 4 * (c % 32 // 8 + 4 * (c % 2))
    stored = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    packed = get_packing("nibbles").pack(codes)
    assert torch.equal(layout.unpack_awq(stored), packed)
    assert torch.equal(layout.pack_awq(packed), stored)


@given(st.sampled_from([3, 6]), st.integers(1, 40), SEEDS)
def test_rows_of_modulation(splits: int, length: int, seed: int) -> None:
    rows = numbers(seed, splits * length, 2)
    stored = layout.interleave(rows, splits)
    for s in range(splits):
        for d in range(length):
            assert torch.equal(stored[d * splits + s], rows[s * length + d])
    assert torch.equal(layout.deinterleave(stored, splits), rows)


def test_padding_lies_behind() -> None:
    small = numbers(0, 3, 5)
    wide = layout.fill(small, (4, 8), value=1)
    assert torch.equal(wide[:3, :5], small)
    assert bool((wide[3:] == 1).all()) and bool((wide[:, 5:] == 1).all())
    assert layout.padded(1) == 128 == layout.padded(128) and layout.padded(129) == 256
