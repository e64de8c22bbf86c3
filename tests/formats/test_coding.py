from __future__ import annotations

import pytest
import torch
from coding_helpers import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from bittern import formats
from bittern.formats import KLayout, coding, decode, dtype_of, encode, int4, round_to, ternary


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["int4", "ternary"]),
    segments=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    group=st.sampled_from([None, 4, 16]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_decoding_is_code_times_scale_of_the_group(name, segments, group, rows, seed):
    layout, fmt = KLayout(segments, group), formats.get(name)
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, layout.padded_k)
    codes = torch.randint(fmt.code_min, fmt.code_max + 1, shape, dtype=torch.int8, generator=generator)
    scales = torch.randn(rows, layout.num_groups, generator=generator).bfloat16()
    expected = torch.cat(
        [
            codes[:, segment.unpadded].double()
            * scales[:, segment.groups]
            .double()
            .repeat_interleave(segment.size, dim=1)[
                :, : segment.size * (segment.groups.stop - segment.groups.start) - segment.padding
            ]
            for segment in layout
        ],
        dim=1,
    )
    for given_codes in (codes, fmt.pack(codes)):
        decoded = fmt.decode(given_codes, scales, layout)
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded.double(), expected)


@pytest.mark.parametrize("rule", [int4.absmax, int4.search, ternary.absmean, ternary.least_squares])
def test_working_in_blocks_of_rows_changes_nothing(rule, monkeypatch):
    layout = KLayout((100, 30), 64)
    weight = draw("laplace", 37, 130, seed=3)
    whole = encode(weight, layout, rule, torch.bfloat16)
    monkeypatch.setattr(coding, "_CPU_BLOCK", 300)
    blocks = encode(weight, layout, rule, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks, strict=True))
    monkeypatch.setattr(coding, "_CPU_BLOCK", 1)
    assert torch.equal(decode(*whole, layout), formats.get("int4").decode(*whole, layout))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_type_is_encoded_as_its_float32_values(dtype):
    layout = KLayout((64,), 16)
    weight = draw("gaussian", 4, 64, seed=0).to(dtype)
    expected = encode(weight.float(), layout, int4.search, torch.bfloat16)
    assert all(
        torch.equal(a, b) for a, b in zip(encode(weight, layout, int4.search, torch.bfloat16), expected, strict=True)
    )


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_rounding_to_a_stored_type_stays_finite(name):
    dtype = dtype_of(name)
    extremes = torch.tensor([1e39, -1e39, 1e-46, 0.0, 3e38, 1.0], dtype=torch.float64)
    rounded = round_to(extremes, dtype)
    assert rounded.isfinite().all()
    limit = torch.finfo(dtype).max
    assert rounded.tolist()[:2] == [limit, -limit]
    assert rounded.tolist()[3] == 0
    assert rounded.tolist()[5] == 1
