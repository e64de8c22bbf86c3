from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_oracle import assert_close, expect, random_inputs, random_layer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bittern import formats, ops
from bittern.formats import KLayout, ternary
from bittern.ops import reference

KINDS = ["gaussian", "zeros", "zero rows", "outlier", "late outlier", "denormal", "positive", "equal"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [("int4", 64), ("int4", 32), ("int4", None), ("ternary", 64), ("ternary", 128), ("ternary", None)]
FORMATS.append(("nvfp4", 16))


@pytest.fixture(scope="module", autouse=True)
def by_the_reference() -> Iterator[None]:
    """Whatever else this machine has."""
    with ops.use_backend("torch"):
        yield


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    path=st.sampled_from(ops.PATHS),
    form=st.sampled_from(FORMATS),
    n=st.sampled_from([1, 5, 33, 48]),
    m=st.sampled_from([0, 1, 7, 33]),
    segments=st.sampled_from([(64,), (100,), (1,), (7, 65), (130,), (64, 72), (3, 64, 5), (300, 270)]),
    rank=st.sampled_from([0, 16, 40]),
    smooth=st.booleans(),
    bias=st.booleans(),
    shifted=st.booleans(),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    zero_rows=st.booleans(),
)
def test_agrees_with_the_formula_in_float64(
    seed: int,
    path: str,
    form: tuple[str, int | None],
    n: int,
    m: int,
    segments: tuple[int, ...],
    rank: int,
    smooth: bool,
    bias: bool,
    shifted: bool,
    kind: str,
    dtype: torch.dtype,
    stored: torch.dtype,
    zero_rows: bool,
) -> None:
    layer = random_layer(seed, n, segments, *form, rank, smooth, bias, stored, zero_rows)
    inputs = random_inputs(seed + 1, kind, m, segments, dtype)
    shift = tuple(0.171875 if i % 2 == 0 else 0.0 for i in range(len(segments))) if shifted else ()
    y = ops.few_bit_linear(inputs, path=path, shift=shift, **layer.kwargs())
    assert y.dtype == dtype and y.shape == (m, n)
    assert_close(y, *expect(inputs, layer, path, shift))


@pytest.mark.parametrize("path", ops.PATHS)
def test_codes_in_the_padding_are_ignored(path: str) -> None:
    layer = random_layer(0, 12, (70, 9), "int4", 64)
    codes = formats.get("int4").unpack(layer.codes, layer.layout.padded_k)
    cleaned = formats.get("int4").pack(layer.layout.pad(layer.layout.unpad(codes)))
    assert not torch.equal(cleaned, layer.codes)
    inputs = random_inputs(1, "gaussian", 5, (70, 9), torch.float32)
    y, clean = (ops.few_bit_linear(inputs, path=path, **{**layer.kwargs(), "codes": c}) for c in (layer.codes, cleaned))
    assert torch.equal(y, clean)


@pytest.mark.parametrize(("weight", "group"), [("int4", 64), ("int4", None), ("ternary", None)])
@pytest.mark.parametrize("large", [False, True])
def test_int8_sums_are_exact_to_the_last_bit(weight: str, group: int | None, large: bool) -> None:
    k = 5000
    layer = random_layer(3, 9, (k,), weight, group, bias=False)
    (x,) = random_inputs(4, "gaussian", 6, (k,), torch.float32)
    if large:
        # Nearly every product is nearly 127 * 127, so that float32 sums of all K would round.
        layer.codes.fill_(0x77 if weight == "int4" else 0b10101010)
        layer.scales.fill_(0.01)
        x = 1 + 0.1 * torch.rand(6, k)
    codes, a, _ = ops.quantize_activations(x, None, None, "int8")
    if group is None:
        c = layer.scales.float().numpy()
        folded = formats.get(weight).unpack(layer.codes, layer.layout.padded_k)[:, :k].numpy()
    else:
        groups = layer.scales.float().numpy()
        largest = np.float32(8 if weight == "int4" else 1) * abs(groups).max(1, keepdims=True)
        c = np.maximum(largest * (1 / np.float32(127)), np.finfo(np.float32).tiny)
        whole = formats.get(weight).unpack(layer.codes, layer.layout.padded_k)[:, :k].numpy()
        folded = np.rint(whole * np.repeat(groups * (1 / c), group, axis=1)[:, :k])
    total = codes.numpy().astype(np.int64) @ folded.astype(np.int64).T
    assert not large or group is None or total.min() > 2**25
    want = total.astype(np.float32) * a.numpy() * c.T
    y = ops.few_bit_linear([x], path="a8-int8", **layer.kwargs())
    assert np.array_equal(y.numpy(), want)


@pytest.mark.parametrize(("format", "most"), [("int8", 2e-5), ("fp8", 2e-3)])
@pytest.mark.parametrize("group", [64, 128])
def test_ternary_in_groups_folds_for_next_to_nothing(format: str, most: float, group: int) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    layout = formats.KLayout((1024,), group)
    codes, scales = formats.encode(weight, layout, ternary.least_squares, torch.bfloat16)
    missed = (weight - formats.decode(codes, scales, layout)).norm()
    folded = reference.fold((codes.float(), scales.float()), next(iter(layout)), format, 1)
    assert folded.scale is not None
    got = folded.values * folded.scale
    assert float((weight - got).norm()) < (1 + most) * float(missed)
    assert torch.equal(got.sign(), codes.float())


def test_ternary_per_row_folds_to_the_codes_themselves() -> None:
    layer = random_layer(0, 16, (96,), "ternary", None, bias=False)
    x = torch.randint(-127, 128, (8, 96)).float()
    x[:, 0] = 127
    # The activation scale is 1 and the codes are small integers, so nothing is rounded.
    exact = ops.few_bit_linear([x], path="a16", **layer.kwargs())
    assert torch.allclose(ops.few_bit_linear([x], path="a8-int8", **layer.kwargs()), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", ops.PATHS)
def test_batch_shape_and_strides_do_not_matter(path: str) -> None:
    layer = random_layer(0, 20, (72,), rank=16, smooth=True)
    x = torch.randn(3, 5, 72)
    y = ops.few_bit_linear([x], path=path, **layer.kwargs())
    strided = torch.empty(5, 3, 144)[..., ::2].transpose(0, 1).copy_(x)
    assert not strided.is_contiguous()
    assert y.shape == (3, 5, 20)
    assert torch.equal(ops.few_bit_linear([strided], path=path, **layer.kwargs()), y)
    assert torch.equal(ops.few_bit_linear([x.flatten(0, 1)], path=path, **layer.kwargs()), y.flatten(0, 1))
    assert ops.few_bit_linear([x[0, 0]], path=path, **layer.kwargs()).shape == (20,)
    assert ops.few_bit_linear([x[:0]], path=path, **layer.kwargs()).shape == (0, 5, 20)


@pytest.mark.parametrize("path", ops.PATHS)
def test_a_split_input_equals_its_parts(path: str) -> None:
    layer = random_layer(0, 20, (64, 128), rank=16, smooth=True)
    x = torch.randn(7, 192)
    parts = ops.few_bit_linear(list(x.split((64, 128), dim=-1)), path=path, **layer.kwargs())
    assert_close(parts, *expect(list(x.split((64, 128), dim=-1)), layer, path))
    # Without activation scales there is nothing that knows of segments.
    if path == "a16":
        assert torch.allclose(parts, ops.few_bit_linear([x], path=path, **layer.kwargs()), atol=1e-5)


@pytest.mark.parametrize(("path", "shift"), [*((path, ()) for path in ops.PATHS), ("a4", (0.171875,))])
@pytest.mark.parametrize("rank", [16, 0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_stays_visible_and_alone(
    path: str, shift: tuple[float, ...], rank: int, value: float
) -> None:
    layer = random_layer(0, 20, (1500,), rank=rank, smooth=True)
    x = torch.randn(6, 1500)
    clean = ops.few_bit_linear([x], path=path, shift=shift, **layer.kwargs())
    x[2, 7] = value
    y = ops.few_bit_linear([x], path=path, shift=shift, **layer.kwargs())
    assert not y[2].isfinite().any()
    others = torch.arange(6) != 2
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("path", ops.PATHS)
def test_blocks_of_rows_do_not_change_the_numbers(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(0, 50, (200,), rank=16, smooth=True)
    inputs = [torch.randn(9, 200)]
    whole = ops.few_bit_linear(inputs, path=path, **layer.kwargs())
    monkeypatch.setitem(reference._BLOCK, "cpu", 7 * layer.layout.padded_k)
    assert_close(ops.few_bit_linear(inputs, path=path, **layer.kwargs()), *expect(inputs, layer, path))
    assert torch.allclose(ops.few_bit_linear(inputs, path=path, **layer.kwargs()), whole, atol=1e-5)


class _LargestFloat(TorchDispatchMode):
    """Elements of the largest float tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.largest = max(self.largest, leaf.numel())
        return out


@pytest.mark.parametrize("path", ["a16", "a8-int8"])
def test_a_large_weight_is_never_float_as_a_whole(path: str) -> None:
    n, k = 12288, 3072
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = torch.rand(n, k // 64).to(torch.bfloat16)
    with _LargestFloat() as seen:
        reference.few_bit_linear([torch.randn(2, k)], packed, scales, *[None] * 4, "int4", 64, path, ())
        reference.few_bit_linear_backward(torch.randn(2, n), packed, scales, *[None] * 3, "int4", 64, (k,))
    assert seen.largest <= reference._BLOCK["cpu"] < n * k / 30


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    form=st.sampled_from(FORMATS),
    segments=st.sampled_from([(64,), (100,), (7, 65)]),
    rank=st.sampled_from([0, 16]),
    smooth=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_dequantize_gives_the_effective_weight(
    seed: int,
    form: tuple[str, int | None],
    segments: tuple[int, ...],
    rank: int,
    smooth: bool,
    dtype: torch.dtype,
) -> None:
    layer = random_layer(seed, 33, segments, *form, rank, smooth, bias=False)
    args = layer.args()[:5]
    got = ops.dequantize(*args, layer.weight, layer.group_size, segments, dtype)
    # Unit vectors as inputs read the weight off, column by column.
    want, size = expect(list(torch.eye(sum(segments)).split(segments, dim=-1)), layer, "a16")
    assert got.dtype == dtype
    assert_close(got, want.T, size.T)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    format=st.sampled_from(["int8", "fp8", "int4", "uint4"]),
    k=st.sampled_from([1, 64, 100, 192]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    smooth=st.booleans(),
    rank=st.sampled_from([0, 16]),
)
def test_activation_codes_are_the_nearest(
    seed: int, format: str, k: int, kind: str, dtype: torch.dtype, smooth: bool, rank: int
) -> None:
    layer = random_layer(seed, 4, (k,), rank=rank, smooth=smooth)
    (x,) = random_inputs(seed, kind, 6, (k,), dtype)
    x = x.reshape(2, 3, k)
    h = 0.5 if format == "uint4" else 0.0
    codes, scales, low = ops.quantize_activations(x, layer.smooth, layer.down, format, h)
    u = ((x.float() + h) / (1.0 if layer.smooth is None else layer.smooth.float())).double()
    assert low.shape == (2, 3, rank) and scales.dtype == low.dtype == torch.float32
    if layer.down is not None:
        bound = x.double().abs() @ layer.down.double().abs().T
        assert ((low.double() - x.double() @ layer.down.double().T).abs() <= 2e-6 * bound + 2**-126).all()
    if format in ("int8", "fp8"):
        assert codes.dtype == (torch.int8 if format == "int8" else torch.float8_e4m3fn)
        numbers, per_code = codes.double(), scales.double()
    else:
        assert codes.dtype == torch.uint8 and codes.shape[-1] * 2 == -(-k // 64) * 64
        numbers = formats.packing.unpack_nibbles(codes, codes.shape[-1] * 2).double()
        numbers = numbers % 16 if format == "uint4" else numbers
        assert not numbers[..., k:].any()
        per_code = scales.double().repeat_interleave(64, dim=-1)[..., :k]
        numbers = numbers[..., :k]
    least, most = reference.RANGES[format]
    assert (numbers >= least).all() and (numbers <= most).all()
    assert (scales != 0 if format == "int4" else scales > 0).all()
    if format == "fp8":
        # Half a step of e4m3: 2^-4 of a normal number, 2^-10 of a code below 2^-6.
        step = 1.0001 * torch.maximum(numbers.abs() / 16, torch.full_like(numbers, 2**-10))
    else:
        # Half a code, and the float32 rounding of a quotient of up to 127.
        step = torch.full_like(numbers, 0.5 + 127 * 2**-22)
    if format == "int4":
        # Up to 8.25 is cut off to 7 on one side.
        step[numbers == most] = 1.25001
    want = u.clamp_min(0) if format == "uint4" else u
    assert ((numbers * per_code - want).abs() <= step * per_code.abs()).all()


def test_ties_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    codes, scales, _ = ops.quantize_activations(x, None, None, "int8")
    assert scales.item() == 1 and codes.tolist() == [[127, 0, 2, 2, 0, -2]]
    x = torch.tensor([[28.0, 17.0, 19.0]])
    codes, scales, _ = ops.quantize_activations(x, None, None, "fp8")
    assert scales.item() == 1 and codes.float().tolist() == [[28, 16, 20]]


@pytest.mark.parametrize(("first", "last", "scale"), [(28.0, 448.0, 1.0), (28.0, 449.0, 449 / 448), (0.0, 448.0, 1.0)])
def test_first_inputs_foretell_the_scale_of_a_token(first: float, last: float, scale: float) -> None:
    x = torch.zeros(1, 300)
    x[0, 255], x[0, 256] = first, -last
    codes, scales, _ = ops.quantize_activations(x, None, None, "fp8")
    assert scales.item() == pytest.approx(scale) and codes.float()[0, 256] == -448


@pytest.mark.parametrize(("outlier", "allowed"), [(100.0, 0.0267), (1000.0, 0.0295)])
def test_what_headroom_costs_beside_an_outlier(outlier: float, allowed: float) -> None:
    x = torch.randn(64, 3072, generator=torch.Generator().manual_seed(0))
    x[:, 3] = outlier
    codes, scales, _ = ops.quantize_activations(x, None, None, "fp8")
    error = (codes.float() * scales - x)[:, 4:]
    assert error.norm() <= allowed * x[:, 4:].norm()


FOLDING = [
    ("int4", 64, (128,), 1, True),
    ("int4", 64, (64, 192), 16, True),
    ("int4", 128, (320,), 40, True),
    ("int4", None, (64,), 3, False),
]


def any_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches are folded whatever the number of tokens and their rank."""
    monkeypatch.setattr(reference, "FOLDED_FROM", 0)
    monkeypatch.setattr(reference, "INPUTS_PER_RANK", 0)


@pytest.mark.parametrize("case", FOLDING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_branch_agrees_with_the_formula_in_float64(
    case: Any, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_branch(monkeypatch)
    weight, group, segments, rank, smooth = case
    for zero_rows in (False, True):
        layer = random_layer(0, 33, segments, weight, group, rank, smooth, zero_rows=zero_rows)
        inputs = random_inputs(1, kind, 7, segments, dtype)
        y = ops.few_bit_linear(inputs, path="a8-fp8-folded", **layer.kwargs())
        assert_close(y, *expect(inputs, layer, "a8-fp8-folded", folded=True))


def test_which_branches_are_folded() -> None:
    layer = random_layer(0, 4, (4096,), rank=64)

    def folds(m: int = 1024, weight: str = "int4", path: str = "a8-fp8-folded", **changed: Any) -> bool:
        given = vars(layer) | changed
        return reference.folds_branch(m, given["down"], given["up"], weight, given["layout"], path)

    assert folds() and folds(m=70000)
    assert not any(folds(path=path) for path in ops.PATHS if path != "a8-fp8-folded")
    assert not folds(m=1023) and not folds(weight="nvfp4") and not folds(weight="ternary")
    assert not folds(down=None, up=None) and not folds(up=layer.up.half()) and not folds(down=layer.down.float())
    for rank, k in ((65, 8192), (49, 3072)):
        wider = random_layer(0, 4, (k,), rank=rank)
        assert not folds(down=wider.down, up=wider.up, layout=wider.layout)
    assert folds(layout=KLayout((2048, 2048), None)) and folds(layout=KLayout((2048, 2048), 128))
    assert not folds(layout=KLayout((4000, 96), 64)) and not folds(layout=KLayout((4096,), 32))


@pytest.mark.parametrize("m", [1023, 1024])
def test_tokens_decide_what_becomes_of_a_branch(m: int) -> None:
    layer = random_layer(0, 20, (1024,), rank=16, smooth=True)
    inputs = random_inputs(1, "gaussian", m, (1024,), torch.float32)
    y = ops.few_bit_linear(inputs, path="a8-fp8-folded", **layer.kwargs())
    near, far = (expect(inputs, layer, "a8-fp8-folded", folded=folded)[0] for folded in (m == 1024, m != 1024))
    error = [np.linalg.norm(y.numpy() - want) / np.linalg.norm(want) for want in (near, far)]
    assert error[0] < 1e-4 and error[1] > 1e-2


def test_layers_whose_branch_is_not_folded_are_those_of_the_other_path() -> None:
    for m, case in ((1024, ("ternary", None, 16)), (1024, ("int4", 64, 0)), (1023, ("int4", 64, 16))):
        layer = random_layer(0, 20, (1024,), *case, smooth=True)
        inputs = random_inputs(1, "gaussian", m, (1024,), torch.bfloat16)
        y = ops.few_bit_linear(inputs, path="a8-fp8-folded", **layer.kwargs())
        assert torch.equal(ops.few_bit_linear(inputs, path="a8-fp8", **layer.kwargs()), y)


def test_error_of_a_folded_branch() -> None:
    """Beside the layer in float32: 3.7 %, of inputs and of weights 2.65 each, whatever smoothing does."""
    layer = random_layer(0, 96, (3072,), rank=32, smooth=True)
    assert layer.smooth is not None
    (x,) = random_inputs(1, "gaussian", 1024, (3072,), torch.float32)
    for factor in (1.0, 20.0, 1e-6):
        # An input that hardly is one has hardly a divisor, and takes no room from the others.
        x[:, :10] *= factor
        layer = dataclasses.replace(layer, smooth=layer.smooth * torch.where(torch.arange(3072) < 10, factor, 1.0))
        y = ops.few_bit_linear([x], path="a8-fp8-folded", **layer.kwargs())
        want = ops.few_bit_linear([x], path="a16", **layer.kwargs())
        assert 0.03 < ((y - want).norm() / want.norm()).item() <= 0.04


def test_a_folded_branch_does_not_mind_which_factor_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    any_branch(monkeypatch)
    layer = random_layer(0, 150, (128,), rank=16)
    assert layer.down is not None and layer.up is not None
    inputs = random_inputs(1, "gaussian", 7, (128,), torch.float32)
    y = ops.few_bit_linear(inputs, path="a8-fp8-folded", **layer.kwargs())
    by_rank = 2.0 ** torch.arange(-24, 24, 3)
    for sizes in (by_rank, torch.full_like(by_rank, 2.0**20)):
        other = dataclasses.replace(
            layer, down=(layer.down * sizes[:, None]).bfloat16(), up=(layer.up / sizes).bfloat16()
        )
        assert torch.equal(ops.few_bit_linear(inputs, path="a8-fp8-folded", **other.kwargs()), y)


@pytest.mark.parametrize("dominant", ["scales", "branch", "one input", "nothing"])
@pytest.mark.parametrize("size", [2.0**-100, 1.0, 2.0**100])
def test_no_folded_weight_passes_its_bound(dominant: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    any_branch(monkeypatch)
    layer = random_layer(0, 33, (256,), rank=16, smooth=True)
    assert layer.down is not None and layer.up is not None and layer.smooth is not None
    (segment,) = layer.layout
    down, up, smooth, scales = layer.down.clone(), layer.up.clone(), layer.smooth.clone(), layer.scales.clone()
    scales *= {"scales": size, "nothing": 0.0}.get(dominant, 1.0)
    up *= {"branch": size, "nothing": 0.0}.get(dominant, 1.0)
    if dominant == "one input":
        smooth[7] = 1 / size
        down[:, 9] *= size
    codes = formats.get("int4").unpack(layer.codes, 256).float()
    found = reference.fold_with_branch((codes, scales.float()), slice(0, 33), segment, smooth, down, up, 8)
    assert found.scale is not None and found.values.isfinite().all() and found.scale.isfinite().all()
    assert found.values.abs().max() <= 256
    if dominant == "nothing":
        assert not found.values.any()
    else:
        want = (
            reference.dequantize(layer.codes, scales, smooth, down, up, "int4", 64, (256,), torch.float64)
            * smooth.double()
        )
        # Rows that are no smaller than what c can be.
        seen = want.norm(dim=1) > 2.0**-60
        error = (found.values * found.scale - want).norm(dim=1) / want.norm(dim=1)
        assert (error[seen] <= 2.0**-4).all()
