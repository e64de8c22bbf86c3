from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bittern.errors import UserError
from bittern.formats import KLayout

layouts = st.builds(
    KLayout,
    st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple),
    st.sampled_from([None, 4, 12, 16, 64]),
)


@settings(max_examples=80, deadline=None)
@given(layout=layouts, rows=st.integers(0, 3))
def test_padding_is_zero_behind_each_segment_and_comes_off_again(layout, rows):
    weight = torch.arange(1.0, rows * layout.k + 1).reshape(rows, layout.k)
    padded = layout.pad(weight)
    assert padded.shape == (rows, layout.padded_k)
    assert torch.equal(layout.unpad(padded), weight)
    assert int((padded == 0).sum()) == rows * (layout.padded_k - layout.k)
    for segment, length in zip(layout, layout.segments, strict=True):
        assert torch.equal(padded[:, segment.unpadded], weight[:, segment.logical])
        assert segment.unpadded.stop - segment.unpadded.start == length


@settings(max_examples=80, deadline=None)
@given(layout=layouts)
def test_segments_partition_the_three_axes(layout):
    for axis, total in (("logical", layout.k), ("padded", layout.padded_k), ("groups", layout.num_groups)):
        slices = [getattr(segment, axis) for segment in layout]
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(total))
    assert layout.padded_k % 4 == 0
    assert sum(layout.padded_segments) == layout.padded_k
    assert sum(layout.groups_per_segment) == layout.num_groups


@settings(max_examples=80, deadline=None)
@given(layout=layouts)
def test_every_scale_covers_its_own_group_and_no_scale_two_segments(layout):
    owner = layout.expand_scales(torch.arange(layout.num_groups)[None])[0]
    assert owner.shape == (layout.padded_k,)
    for segment in layout:
        inside = owner[segment.padded]
        assert inside.unique().tolist() == list(range(segment.groups.start, segment.groups.stop))
        assert all(int((inside == g).sum()) == segment.size for g in inside.unique())


def test_two_segments_in_numbers():
    layout = KLayout((5, 130), 64)
    assert layout.padded_segments == (64, 192)
    assert layout.groups_per_segment == (1, 3)
    assert (layout.k, layout.padded_k, layout.num_groups) == (135, 256, 4)
    rows = KLayout((5, 130), None)
    assert rows.padded_segments == (8, 132)
    assert rows.num_groups == 2


@pytest.mark.parametrize(("segments", "group"), [((), 64), ((0, 4), 64), ((8,), 0), ((8,), -4), ((8,), 6)])
def test_impossible_layouts_are_refused(segments, group):
    with pytest.raises(UserError, match="expected"):
        KLayout(segments, group)


def test_wrong_widths_are_refused():
    layout = KLayout((8, 8), 4)
    with pytest.raises(UserError, match="weight has 15 columns: expected 16"):
        layout.pad(torch.zeros(2, 15))
    with pytest.raises(UserError, match="scales has 3 columns: expected 4"):
        layout.expand_scales(torch.zeros(2, 3))
