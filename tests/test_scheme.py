from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bittern.errors import UserError
from bittern.scheme import Scheme

schemes = st.builds(
    Scheme,
    weight=st.just("int4"),
    group_size=st.sampled_from([None, 16, 64, 128]),
    scale_dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    activations=st.sampled_from([4, 8, 16]),
    rank=st.integers(0, 64),
    branch_dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    smooth=st.booleans(),
    shift=st.sampled_from([(), (0.171875,), (0.0,)]),
) | st.builds(
    Scheme,
    weight=st.just("ternary"),
    group_size=st.sampled_from([None, 16, 64]),
    rank=st.integers(0, 64),
    packing=st.sampled_from([None, "crumbs", "trits"]),
)


@settings(max_examples=60, deadline=None)
@given(scheme=schemes)
def test_a_scheme_survives_json(scheme):
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_every_field_is_written_and_checked():
    assert set(Scheme().to_dict()) == {field.name for field in dataclasses.fields(Scheme)}
    assert Scheme().packing == "nibbles"
    assert Scheme(weight="ternary").packing == "crumbs"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"wieght": "int4"}, "unknown key 'wieght' in a scheme: did you mean 'weight'"),
        ({"weight": "int5"}, "unknown weight format 'int5': did you mean 'int4'"),
        ({"weight": 4}, "weight 4 in a scheme: expected str"),
        ({"rank": True}, "rank True in a scheme: expected int"),
        ({"rank": "32"}, "rank '32' in a scheme: expected int"),
        ({"rank": -1}, "rank -1: expected 0 or more"),
        ({"group_size": 10}, "group_size 10: expected a positive multiple of 4"),
        ({"group_size": 64.0}, "expected int or null"),
        ({"activations": 5}, "activations 5: expected 4, 8 or 16"),
        ({"scale_dtype": "bf17"}, "did you mean 'bf16'"),
        ({"branch_dtype": "float"}, "unknown stored type 'float'"),
        ({"smooth": 1}, "smooth 1 in a scheme: expected bool"),
        ({"shift": [float("nan")]}, "shift"),
        ({"shift": 0.17}, "expected list or tuple"),
        ({"shift": ["a"]}, "shift"),
        ({"packing": "trits"}, "packing 'trits' does not fit int4"),
        ({"packing": "trit", "weight": "ternary"}, "did you mean 'trits'"),
    ],
)
def test_mistakes_are_named(data, message):
    with pytest.raises(UserError) as caught:
        Scheme.from_dict(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shift_needs_one_value_a_segment():
    scheme = Scheme(shift=(0.0, 0.171875))
    assert scheme.layout((4, 8)).segments == (4, 8)
    with pytest.raises(UserError, match="2 values for 1 segments"):
        scheme.layout((12,))


def test_shapes_and_bits_in_numbers():
    scheme = Scheme(rank=32, smooth=True)
    assert scheme.tensor_shapes(3072, (3072, 12288)) == {
        "codes": ((3072, 7680), torch.uint8),
        "scales": ((3072, 240), torch.bfloat16),
        "smooth": ((15360,), torch.bfloat16),
        "down": ((32, 15360), torch.bfloat16),
        "up": ((3072, 32), torch.bfloat16),
    }
    assert Scheme().bits_per_weight(3072, 3072) == 4.25
    assert Scheme(rank=32).bits_per_weight(3072, 3072) == pytest.approx(4.25 + 16 * 32 * 2 / 3072)
    # Rank 32 at hidden 256 is no small branch: nearly as large as the codes themselves.
    assert Scheme(rank=32).bits_per_weight(256, 256) == 8.25
    ternary = Scheme(weight="ternary", group_size=None)
    assert ternary.bits_per_weight(3072, 3072) == pytest.approx(2 + 16 / 3072)
    trits = dataclasses.replace(ternary, packing="trits")
    assert trits.bits_per_weight(3072, 3072) == pytest.approx(8 * 615 / 3072 + 16 / 3072)
    assert trits.tensor_shapes(10, (3072,))["codes"][0] == (10, 768)
    assert trits.tensor_shapes(10, (3072,), "trits")["codes"][0] == (10, 615)


def test_padding_counts():
    assert Scheme().bits_per_weight(10, 65) == pytest.approx(8 * (10 * 64 + 10 * 2 * 2) / 650)
