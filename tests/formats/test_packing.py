from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bittern import formats
from bittern.errors import UserError
from bittern.formats.packing import PACKINGS

shapes = st.tuples(st.lists(st.integers(0, 4), max_size=2), st.integers(0, 41)).map(lambda s: (*s[0], s[1]))


def random_codes(shape: tuple[int, ...], low: int, high: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize(("name", "low", "high"), [("nibbles", -8, 7), ("crumbs", -1, 1), ("trits", -1, 1)])
@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**32))
def test_unpacking_inverts_packing(name, low, high, shape, seed):
    packing = PACKINGS[name]
    codes = random_codes(shape, low, high, seed)
    packed = packing.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packing.bytes_per_row(shape[-1]))
    assert torch.equal(packing.unpack(packed, shape[-1]), codes)
    packing.check(packed, shape[-1])


def test_every_nibble_pair_and_every_crumb_and_trit_byte():
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = formats.packing.pack_nibbles(pairs)
    assert packed.unique().numel() == 256
    assert torch.equal(formats.packing.unpack_nibbles(packed, 2), pairs)
    trits = torch.cartesian_prod(*[torch.arange(-1, 2)] * 5).to(torch.int8)
    assert sorted(formats.packing.pack_trits(trits).flatten().tolist()) == list(range(243))
    crumbs = torch.cartesian_prod(*[torch.arange(-1, 2)] * 4).to(torch.int8)
    assert torch.equal(formats.packing.unpack_crumbs(formats.packing.pack_crumbs(crumbs), 4), crumbs)


def test_the_bytes_are_those_of_the_specification():
    codes = torch.tensor([[-8, 7, -1]], dtype=torch.int8)
    # Even k low: -8 is 0x8 and 7 is 0x7; the odd one out is alone in the low nibble.
    assert formats.packing.pack_nibbles(codes).tolist() == [[0x78, 0x0F]]
    codes = torch.tensor([[1, 0, -1, 1, -1]], dtype=torch.int8)
    # Digits 2 1 0 2 from the low bits; then 0, and three codes of 0 as filling.
    assert formats.packing.pack_crumbs(codes).tolist() == [[0b10_00_01_10, 0b01_01_01_00]]
    assert formats.packing.pack_trits(codes).tolist() == [[2 + 1 * 3 + 0 * 9 + 2 * 27 + 0 * 81]]


@pytest.mark.parametrize(
    ("name", "byte", "bad"), [("crumbs", 0xFF, 4), ("crumbs", 0b01_11_01_01, 1), ("trits", 243, 1)]
)
def test_check_counts_codes_out_of_range(name, byte, bad):
    packed = torch.full((3, 2), 0x55 if name == "crumbs" else 121, dtype=torch.uint8)
    packed[1, 0] = byte
    k = 2 * PACKINGS[name].codes_per_byte
    with pytest.raises(UserError, match=f"{bad} of {3 * k} codes are out of range"):
        PACKINGS[name].check(packed, k)


def test_check_ignores_the_filling_of_the_last_byte_and_takes_any_nibble():
    PACKINGS["crumbs"].check(torch.tensor([[0b11_11_01_01]], dtype=torch.uint8), 2)
    PACKINGS["nibbles"].check(torch.arange(256).to(torch.uint8)[None], 512)


def test_check_counts_over_many_rows():
    packed = torch.full((5000, 1), 0x55, dtype=torch.uint8)
    packed[::1000] = 0xFF
    with pytest.raises(UserError, match="20 of 20000"):
        PACKINGS["crumbs"].check(packed, 4)


def test_check_refuses_wrong_dtype_and_width():
    with pytest.raises(UserError, match=r"torch\.int8: expected torch\.uint8"):
        PACKINGS["crumbs"].check(torch.zeros(2, 4, dtype=torch.int8), 16)
    with pytest.raises(UserError, match="4 bytes a row: expected 5"):
        PACKINGS["crumbs"].check(torch.zeros(2, 4, dtype=torch.uint8), 17)


def test_packing_refuses_what_would_spill():
    with pytest.raises(UserError, match=r"span -2\.\.1: expected -1\.\.1"):
        formats.get("ternary").pack(torch.tensor([[-2, 1]], dtype=torch.int8))
    with pytest.raises(UserError, match=r"torch\.int64: expected torch\.int8"):
        formats.get("int4").pack(torch.zeros(1, 2, dtype=torch.int64))


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'ternary'"):
        formats.get("ternery")
    with pytest.raises(UserError, match="did you mean 'nibbles'"):
        formats.get_packing("nibble")
    with pytest.raises(UserError, match="unknown stored type 'float16'"):
        formats.dtype_of("float16")
