"""What every Triton kernel must compute: run on a GPU, and on CPUs by Triton's interpreter (TRITON_INTERPRET=1).

Codes and scales are the reference's, bit for bit; sums are held against float64.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ops_oracle import ROUNDING, Layer, expect, gelu, random_inputs, random_layer
from torch import Tensor

from bittern import formats
from bittern.formats import KLayout
from bittern.ops import reference
from bittern.ops.attention import codes_of
from bittern.ops.triton import attention, config, dequantize, heads, layer_plan, linear
from bittern.ops.triton.activations import CODES, scratch_bounds
from bittern.ops.triton.combine import combine
from bittern.ops.triton.dequantize import dequantize_segment
from bittern.ops.triton.fold_branch import IN_DOWN, Weight, bounds_of, find_bounds
from bittern.ops.triton.four_bits import quantize_groups
from bittern.ops.triton.launch import multiprocessors
from bittern.ops.triton.numerics import reciprocal_of_smooth
from bittern.ops.triton.projection import parts_of, project
from bittern.ops.triton.smoothing import divide
from bittern.ops.triton.unpack import unpack_segment
from bittern.ops.triton.whole_rows import quantize_whole_rows

pytestmark = pytest.mark.covering

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
DESCRIPTORS = HOPPER or DEVICE == "cpu"
BF16, FP16 = torch.bfloat16, torch.float16
KINDS = ["gaussian", "zeros", "zero rows", "outlier", "late outlier", "denormal"]
# (dtype of x, kind) without the full product of both.
INPUTS = [(BF16, kind) for kind in KINDS] + [(FP16, "gaussian"), (FP16, "denormal")]
# (weight, group, segments, rank, smooth): N and K are multiples of no tile.
LAYERS: list[tuple[str, int | None, tuple[int, ...], int, bool]] = [
    ("int4", 64, (200,), 0, False),
    ("int4", 64, (70, 300), 16, True),
    ("int4", 64, (130,), 40, True),
    ("int4", None, (100,), 16, False),
    ("ternary", None, (260,), 0, False),
    ("ternary", 128, (128, 300), 16, True),
    ("ternary", 64, (300,), 0, True),
]
# On all paths but a4. Segments of 13 and 6 inputs have one scale a row.
SMALL_GROUPS: list[tuple[str, int | None, tuple[int, ...], int, bool]] = [
    ("nvfp4", 16, (200,), 0, False),
    ("nvfp4", 16, (70, 300), 16, True),
    ("nvfp4", 16, (13, 40), 40, True),
    ("nvfp4", 16, (6,), 0, False),
    ("int4", 16, (130,), 16, True),
    ("ternary", 16, (70, 100), 0, True),
]
PATHS = ["a8-int8", "a8-fp8"]
N = 50

# Error allowed beside one rounding of the result, relative to the sum of magnitudes that went into it.
EXACT = 4e-6
"""Float32 sums."""
BRANCH = 2.0**-8
"""The low-rank product takes bf16 operands."""
SMOOTHED = 2.0**-8
"""a16 rounds a smoothed x to bf16."""
HOPPER_FP8 = 2.0**-11
"""Hopper's tensor cores keep about 14 bits of a sum of e4m3 products."""
FUSED = {"a16": 2.0**-8, "a8-fp8": HOPPER_FP8, "a8-int8": 0.0}
"""Weights unpacked in the product: a16 rounds scaled ones to bf16, and outliers are added 32 inputs at a time."""


@pytest.fixture(params=["few", "fused", "many"])
def plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers computed as with few tokens, with some more and with many, whatever their number."""
    if request.param == "many":
        request.getfixturevalue("many")
    else:
        fuse(monkeypatch, fused() if request.param == "fused" else None)
    return request.param


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "FEW_TOKENS", 0)
    fuse(monkeypatch, None)


def fused(weights_left: bool = True, descriptors: bool = False, block_m: int = 16) -> config.FusedUnpackConfig:
    """A configuration that is small, for the interpreter, and takes K in as many parts as it can."""
    return config.FusedUnpackConfig(block_m, 64, 64, weights_left=weights_left, descriptors=descriptors, programs=99)


def fuse(monkeypatch: pytest.MonkeyPatch, chosen: config.FusedUnpackConfig | None) -> None:
    """Weights of few tokens unpacked by this configuration, whose tiles then hold a group; by none with None."""

    def choose(device: Any, m: int, n: int, k: int, group: int | None, *_: Any) -> config.FusedUnpackConfig | None:
        size = group if group is not None and k > group else 0
        return chosen and dataclasses.replace(chosen, block_k=max(chosen.block_k, size))

    monkeypatch.setattr(config, "fused_unpack_for", choose)


def moved(layer: Layer) -> Layer:
    fields = vars(layer).items()
    return dataclasses.replace(layer, **{name: t.to(DEVICE) for name, t in fields if isinstance(t, Tensor)})


def make(case: Any, seed: int = 0, n: int = N, zero_rows: bool = False) -> Layer:
    weight, group, segments, rank, smooth = case
    return random_layer(seed, n, segments, weight, group, rank, smooth, zero_rows=zero_rows)


def run(inputs: list[Tensor], layer: Layer, path: str, shift: tuple[float, ...] = ()) -> Tensor:
    function = linear.plan(path, inputs[0].shape[:-1].numel())
    return function([x.to(DEVICE) for x in inputs], *moved(layer).args(), path, shift)


def check(y: Tensor, inputs: list[Tensor], layer: Layer, path: str, more: float = 0.0, folded: bool = False) -> None:
    want, size = expect(inputs, layer, path, folded=folded)
    relative, absolute = ROUNDING[y.dtype]
    allowed = EXACT + more
    if layer.up is not None:
        allowed += BRANCH
    if path == "a16" and layer.smooth is not None:
        allowed += SMOOTHED
    if path.startswith("a8-fp8") and HOPPER:
        allowed += HOPPER_FP8
    error = abs(y.cpu().reshape(want.shape).double().numpy() - want)
    assert np.isfinite(error).all()
    bound = allowed * size + relative * abs(want) + absolute + 2**-126
    assert (error <= bound).all(), f"{np.max(error / bound):.2f} times the tolerance"
    norm = np.linalg.norm(want)
    assert np.linalg.norm(error) <= 5e-3 * norm + want.size**0.5 * (absolute + 2**-126)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("dtype", "kind"), INPUTS)
@pytest.mark.parametrize(("m", "k", "rank", "smooth"), [(7, 200, 16, True), (33, 1100, 40, False), (1, 64, 0, True)])
def test_prologue(format: str, dtype: torch.dtype, kind: str, m: int, k: int, rank: int, smooth: bool) -> None:
    layer = random_layer(1, 4, (k,), rank=rank, smooth=smooth)
    (x,) = random_inputs(2, kind, m, (k,), dtype)
    want = reference.quantize_activations(x, layer.smooth, layer.down, format, 0.0)
    there = moved(layer)
    got = [t.cpu() for t in linear.quantize_activations(x.to(DEVICE), there.smooth, there.down, format, 0.0)]
    assert torch.equal(got[0].float(), want[0].float())
    assert torch.equal(got[1], want[1])
    assert got[2].shape == want[2].shape
    if layer.down is not None:
        low = x.double() @ layer.down.double().T
        size = x.double().abs() @ layer.down.double().abs().T
        assert ((got[2].double() - low).abs() <= EXACT * size + 2**-126).all()


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("dtype", "kind"), INPUTS)
@pytest.mark.parametrize(
    ("m", "k", "smooth", "tile"),
    [
        (7, 200, True, (2, 128, 4)),
        (5, 1100, False, (2, 1024, 8)),
        (3, 2048, True, (2, 1024, 8)),
        (1, 64, True, (4, 64, 4)),
        # Too wide to be held in float32.
        (5, 2100, True, (2, 128, 1)),
    ],
)
def test_prologue_of_whole_rows(
    format: str, dtype: torch.dtype, kind: str, m: int, k: int, smooth: bool, tile: tuple[int, int, int]
) -> None:
    layer = random_layer(1, 4, (k,), smooth=smooth)
    (x,) = random_inputs(2, kind, m, (k,), dtype)
    if kind == "outlier":
        x[-1, k // 2] = float("nan")
    want = reference.quantize_activations(x, layer.smooth, None, format, 0.0)
    width = -(-k // 128) * 128
    codes = torch.full((m, width), 77, device=DEVICE).to(CODES[format])
    scales = torch.full((m,), float("nan"), device=DEVICE)
    reciprocals = None if layer.smooth is None else layer.smooth.float().reciprocal().to(DEVICE)
    wide = torch.empty(m, k + 24, dtype=dtype, device=DEVICE)[:, :k].copy_(x)
    quantize_whole_rows(wide, reciprocals, codes, scales, config.WholeRowsConfig(*tile))
    assert torch.equal(scales.cpu()[:, None].nan_to_num(-1.0), want[1].nan_to_num(-1.0))
    finite = x.isfinite().all(1)
    assert finite.all() or (kind == "outlier" and scales[-1].isnan())
    assert torch.equal(codes.cpu().float()[finite, :k], want[0].float()[finite])
    assert not codes.float()[:, k:].any() or not finite.all()


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("m", "k", "parts", "rank"), [(7, 200, 3, 16), (33, 600, 1, 40), (5, 64, 17, 1)])
def test_whole_rows_take_a_sum_along_and_smoothing_as_it_is(format: str, m: int, k: int, parts: int, rank: int) -> None:
    layer = random_layer(1, 4, (k,), smooth=True)
    assert layer.smooth is not None
    (x,) = random_inputs(2, "outlier", m, (k,), BF16)
    low = torch.randn(parts, m, rank, generator=torch.Generator().manual_seed(3))
    want = torch.zeros(m, rank)
    for part in low:
        want += part
    found: list[Tensor] = []
    for smooth in (None, layer.smooth.to(DEVICE)):
        codes = torch.empty(m, k, dtype=CODES[format], device=DEVICE)
        scales, total = torch.empty(m, device=DEVICE), torch.full((m, rank), float("nan"), device=DEVICE)
        reciprocals = None if smooth is not None else layer.smooth.float().reciprocal().to(DEVICE)
        tiles = config.WholeRowsConfig(2, 128, 4)
        quantize_whole_rows(x.to(DEVICE), reciprocals, codes, scales, tiles, low.to(DEVICE), total, smooth)
        assert torch.equal(total.cpu(), want)
        found += [codes.float(), scales]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "out"), [(BF16, BF16), (FP16, BF16), (BF16, torch.float32)])
def test_divide(kind: str, dtype: torch.dtype, out: torch.dtype) -> None:
    layer = random_layer(1, 4, (1100,), smooth=True)
    assert layer.smooth is not None
    (x,) = random_inputs(2, kind, 5, (1100,), dtype)
    wide = torch.full((5, 1200), 77.0, dtype=out, device=DEVICE)
    divide(strided(x.to(DEVICE)), layer.smooth.to(DEVICE), wide[:, 50:1150])
    assert torch.equal(wide[:, 50:1150].cpu(), (x.float() * layer.smooth.float().reciprocal()).to(out))
    assert (wide[:, :50] == 77).all() and (wide[:, 1150:] == 77).all()


@pytest.mark.parametrize("rank", [0, 16, 40])
@pytest.mark.parametrize(("parts", "m", "n"), [(1, 1, 50), (3, 17, 200), (16, 64, 70)])
def test_combine(rank: int, parts: int, m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(4)
    sums, low = torch.randn(parts, m, n, generator=generator), torch.randn(5, m, rank, generator=generator)
    up, bias = torch.randn(n, rank, generator=generator).to(BF16), torch.randn(n, generator=generator).to(BF16)
    out = torch.empty(m, n, device=DEVICE)
    given = [t.to(DEVICE) for t in (sums, low, up, bias)]
    combine(given[0], given[1] if rank else None, given[2] if rank else None, given[3], out, n // 3)
    terms = [*sums.double(), low.double().sum(0) @ up.double().T, bias.double().expand(m, n)]
    branch = low.double().abs().sum(0) @ up.double().abs().T
    want, size = gelu(sum(terms).numpy(), sum(t.abs() for t in terms).numpy(), n // 3)
    error = abs(out.cpu().double().numpy() - want)
    # The branch's factor is rounded to bf16.
    assert (error <= EXACT * size + BRANCH * branch.numpy() + 2**-126).all()


@pytest.mark.parametrize("case", [*LAYERS, *SMALL_GROUPS])
@pytest.mark.parametrize(("format", "zero_rows"), [("int8", False), ("fp8", False), ("fp8", True)])
def test_unpack(case: Any, format: str, zero_rows: bool) -> None:
    n = 15
    layer = make(case, n=n, zero_rows=zero_rows)
    block = (formats.get(layer.weight).unpack(layer.codes, layer.layout.padded_k).float(), layer.scales.float())
    there = moved(layer)
    for segment in layer.layout:
        want = reference.fold((block[0].clone(), block[1]), segment, format, formats.get(layer.weight).largest)
        width = want.values.shape[1] + 40
        out = torch.full((n, width), 77, device=DEVICE).to(CODES[format])
        scales = torch.full((n,), float("nan"), device=DEVICE)
        smooth = None if there.smooth is None else there.smooth[segment.logical]
        reciprocals = None if smooth is None else torch.full((len(smooth),), float("nan"), device=DEVICE)
        unpack_segment(
            there.codes,
            there.scales,
            layer.weight,
            segment,
            out,
            scales,
            config.unpack_for(config.device_of(torch.device(DEVICE)), width, layer.group_size is not None),
            smooth=smooth,
            reciprocals=reciprocals,
        )
        if smooth is not None and reciprocals is not None:
            assert torch.equal(reciprocals, smooth.float().reciprocal())
        assert torch.equal(out.float().cpu()[:, : width - 40], want.values)
        assert not out.float()[:, width - 40 :].any()
        assert want.scale is not None and torch.equal(scales.cpu(), want.scale[:, 0])


def hostile_scales(kind: str) -> Layer:
    """An nvfp4 layer with scales of two levels that are as far out as a file's can be."""
    layer, g = make(SMALL_GROUPS[1], n=11), torch.Generator().manual_seed(7)
    scales = torch.rand(layer.scales.shape, generator=g) * 200 + 20
    rows = torch.rand(11, 2, generator=g) * 1e-4 + 1e-5
    if kind == "zeros":
        scales[:, ::3] = 0
        scales[4:9] = 0
    elif kind == "subnormal":
        scales = torch.randint(0, 8, scales.shape, generator=g) * 2.0**-9
    elif kind == "outlier":
        scales[:, 2], scales[5] = 448, 2.0**-9
        scales[5, 1] = 448
    elif kind == "tiny rows":
        rows[::2] = 2.0**-140
    combined = formats.nvfp4.combine(scales.to(torch.float8_e4m3fn), rows, layer.layout)
    return dataclasses.replace(layer, scales=combined)


@pytest.mark.parametrize("kind", ["zeros", "subnormal", "outlier", "tiny rows"])
def test_hostile_scales_of_two_levels(kind: str) -> None:
    layer = hostile_scales(kind)
    there, unpacked = moved(layer), formats.get("nvfp4").unpack(layer.codes, layer.layout.padded_k).float()
    for format in ("int8", "fp8"):
        for segment in layer.layout:
            want = reference.fold((unpacked.clone(), layer.scales), segment, format, 12)
            out = torch.empty(want.values.shape, device=DEVICE).to(CODES[format])
            columns = torch.empty(11, device=DEVICE)
            unpack_segment(
                there.codes,
                there.scales,
                "nvfp4",
                segment,
                out,
                columns,
                config.unpack_for(config.device_of(torch.device(DEVICE)), 300, True),
            )
            assert torch.equal(out.float().cpu(), want.values)
            assert want.scale is not None and torch.equal(columns.cpu(), want.scale[:, 0])
    inputs = random_inputs(11, "gaussian", 9, layer.layout.segments, BF16)
    for path in ("a8-fp8", "a16"):
        check(run(inputs, layer, path), inputs, layer, path)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_float_of_four_bits(dtype: torch.dtype) -> None:
    """Each byte by itself: what the product takes for its two codes, and what the other kernels do."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    layer = Layer(codes, torch.ones(256, 1), None, None, None, None, "nvfp4", 16, KLayout((16,), 16))
    want = formats.get("nvfp4").unpack(codes, 2).to(dtype)
    inputs = torch.eye(16, dtype=dtype)[:2]
    assert torch.equal(run([inputs], layer, "a16").cpu().T, want)
    unpacked = torch.empty(256, 16, dtype=dtype, device=DEVICE)
    there = moved(layer)
    (segment,) = layer.layout
    dequantize_segment(there.codes, there.scales, None, None, None, "nvfp4", segment, unpacked)
    assert torch.equal(unpacked[:, :2].cpu(), want)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("case", "m"),
    [(case, 33) for case in LAYERS]
    + [(case, 9) for case in SMALL_GROUPS[:3]]
    + [(LAYERS[0], 7), (LAYERS[1], 1), (LAYERS[5], 16)],
)
def test_eight_bit_linear(path: str, case: Any, m: int) -> None:
    layer = make(case)
    inputs = random_inputs(m, "gaussian", m, case[2], BF16)
    check(run(inputs, layer, path), inputs, layer, path)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "kind"), [(BF16, "zero rows"), (BF16, "denormal"), (FP16, "outlier")])
def test_eight_bit_linear_on_hostile_inputs(path: str, dtype: torch.dtype, kind: str) -> None:
    layer = make(LAYERS[1])
    inputs = random_inputs(3, kind, 33, layer.layout.segments, dtype)
    y = run(inputs, layer, path)
    assert y.dtype == dtype
    check(y, inputs, layer, path)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [LAYERS[1], LAYERS[2], LAYERS[5]])
def test_branches_beside_whole_rows(path: str, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's GEMM projects the inputs where rows are kept in registers; of two segments perhaps one's."""
    wide = max(case[2])
    whole = config.WholeRowsConfig(2, 128, 4)
    monkeypatch.setattr(config, "whole_rows_for", lambda device, m, k, rank=0: whole if k == wide else None)
    layer = make(case)
    inputs = random_inputs(9, "outlier", 9, case[2], BF16)
    check(run(inputs, layer, path), inputs, layer, path)


@pytest.mark.parametrize("case", [*LAYERS, *SMALL_GROUPS])
@pytest.mark.parametrize(("m", "dtype"), [(1, BF16), (7, BF16), (16, FP16)])
def test_sixteen_bit_linear(case: Any, m: int, dtype: torch.dtype) -> None:
    layer = make(case)
    inputs = random_inputs(m, "gaussian", m, case[2], dtype)
    check(run(inputs, layer, "a16"), inputs, layer, "a16")


@pytest.mark.parametrize("case", [*LAYERS, *SMALL_GROUPS])
@pytest.mark.parametrize("path", [*PATHS, "a16"])
@pytest.mark.parametrize("weights_left", [True, False])
@pytest.mark.parametrize(("m", "kind", "dtype"), [(7, "gaussian", BF16), (70, "outlier", BF16), (33, "denormal", FP16)])
def test_weights_unpacked_in_the_product(
    case: Any, path: str, weights_left: bool, m: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse(monkeypatch, fused(weights_left, DESCRIPTORS, 16 if weights_left else 64))
    layer = make(case, zero_rows=kind == "outlier")
    inputs = random_inputs(m, kind, m, case[2], dtype)
    check(run(inputs, layer, path), inputs, layer, path, FUSED[path])


@pytest.mark.parametrize(("path", "many"), [("a8-fp8", "EightBits"), ("a16", "many_tokens")])
def test_between_few_and_many_tokens_measurements_decide(path: str, many: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def watched(name: str, make: Any) -> Any:
        return lambda *args: taken.append(name) or make(*args)

    monkeypatch.setattr(linear, many, watched(many, getattr(linear, many)))
    monkeypatch.setattr(linear, "FewTokens", watched("FewTokens", linear.FewTokens))
    layer = make(LAYERS[1])
    for chosen, dtype, most, last in (
        (None, BF16, 256, many),
        (fused(), BF16, 256, "FewTokens"),
        # In 16 bits float16 keeps its bits, and a branch may leave its range.
        (fused(), FP16, 256, many if path == "a16" else "FewTokens"),
        (fused(), BF16, 64, many),
    ):
        fuse(monkeypatch, chosen)
        monkeypatch.setattr(linear, "MIDDLE_TOKENS", most)
        inputs = random_inputs(1, "gaussian", 65, layer.layout.segments, dtype)
        check(run(inputs, layer, path), inputs, layer, path, FUSED[path])
        assert taken[-1] == last


@pytest.mark.parametrize("path", [*PATHS, "a16"])
@pytest.mark.parametrize(
    ("segments", "rank", "block_k", "parts"),
    [((2400,), 16, 64, 3), ((1700, 800), 40, 64, 2), ((3072,), 0, 64, 4), ((3904,), 16, 256, 5)],
)
def test_parts_of_weights_unpacked_in_the_product(
    path: str, segments: tuple[int, ...], rank: int, block_k: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last case has 16 tiles for five parts: the fifth is empty."""
    chosen = dataclasses.replace(fused(descriptors=DESCRIPTORS), block_k=block_k)
    assert chosen.parts(9, N, segments[0], multiprocessors(torch.device(DEVICE))) == parts
    fuse(monkeypatch, chosen)
    layer = random_layer(3, N, segments, rank=rank, smooth=True)
    inputs = random_inputs(4, "gaussian", 9, segments, BF16)
    check(run(inputs, layer, path), inputs, layer, path, FUSED[path])


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_linear_on_hostile_inputs(kind: str) -> None:
    layer = make(LAYERS[0])
    inputs = random_inputs(3, kind, 7, layer.layout.segments, BF16)
    check(run(inputs, layer, "a16"), inputs, layer, "a16")


def sum_of_parts(inputs: list[Tensor], down: Tensor) -> Tensor:
    """Inputs projected as the 16-bit path does, the parts added as its product adds them."""
    parts = [parts_of(x.shape[1]) for x in inputs]
    low = torch.full((sum(parts), len(inputs[0]), len(down)), float("nan"), device=DEVICE)
    columns = down.to(DEVICE).split([x.shape[1] for x in inputs], dim=1)
    for x, d, own in zip(inputs, columns, low.split(parts), strict=True):
        project(x.to(DEVICE), d, own)
    total = torch.zeros_like(low[0])
    for part in low:
        total += part
    return total.cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "segments", "rank", "dtype", "stored"),
    [
        (1, (64,), 1, BF16, BF16),
        (7, (1037,), 16, FP16, FP16),
        (33, (70, 1300), 40, BF16, BF16),
        (64, (8200,), 32, BF16, BF16),
        (64, (515,), 128, BF16, BF16),
        (16, (13, 600, 129), 16, BF16, torch.float32),
        (17, (515,), 40, FP16, BF16),
    ],
)
def test_projection_in_parts(
    kind: str, m: int, segments: tuple[int, ...], rank: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    inputs = random_inputs(1, kind, m, segments, dtype)
    down = (torch.randn(rank, sum(segments), generator=torch.Generator().manual_seed(2)) / 8).to(stored)
    x = torch.cat(inputs, dim=1).double()
    got = sum_of_parts(inputs, down)
    assert ((got.double() - x @ down.double().T).abs() <= EXACT * (x.abs() @ down.double().abs().T) + 2**-126).all()
    # Rows of another stride, and one token that is not finite: to the bit what it was for the others.
    wide = [torch.full((m, x.shape[1] + 24), 77.0).to(dtype)[:, 8 : 8 + x.shape[1]].copy_(x) for x in inputs]
    wide[-1][m // 2, -1] = float("nan")
    again, others = sum_of_parts(wide, down), torch.arange(m) != m // 2
    assert again[m // 2].isnan().all() and torch.equal(again[others], got[others])


@pytest.mark.parametrize(
    ("segments", "rank", "m", "dtype", "stored"),
    [((1100, 600), 40, 64, BF16, torch.float32), ((2100,), 128, 33, FP16, BF16), ((515,), 1, 1, BF16, BF16)],
)
def test_sixteen_bit_branches_of_many_parts(
    segments: tuple[int, ...], rank: int, m: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    layer = random_layer(0, N, segments, rank=rank, stored=stored)
    inputs = random_inputs(4, "outlier", m, segments, dtype)
    assert sum(map(parts_of, segments)) > 1
    check(run(inputs, layer, "a16"), inputs, layer, "a16")


# What a folded branch allows: int4, groups of 64, 128 and whole rows.
FOLDED: list[tuple[str, int | None, tuple[int, ...], int, bool]] = [
    ("int4", 64, (128,), 16, True),
    ("int4", 64, (64, 320), 40, True),
    ("int4", 128, (192,), 3, False),
    ("int4", None, (256,), 32, True),
    ("int4", None, (448, 64), 64, False),
]


@pytest.fixture(params=["plain", "specialized"] if HOPPER else ["plain"])
def folding(request: pytest.FixtureRequest, many: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every branch that can be folded is, by one kernel or the other."""
    monkeypatch.setattr(reference, "FOLDED_FROM", 0)
    monkeypatch.setattr(reference, "INPUTS_PER_RANK", 0)
    if request.param == "plain":
        monkeypatch.setattr(config, "has_gluon", lambda device: False)


@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize("m", [1, 70])
@pytest.mark.parametrize(("dtype", "kind"), INPUTS)
@pytest.mark.parametrize("case", FOLDED)
def test_folded_branches(case: Any, dtype: torch.dtype, kind: str, m: int) -> None:
    for zero_rows in (False, True):
        layer = make(case, zero_rows=zero_rows)
        inputs = random_inputs(3, kind, m, case[2], dtype)
        y = run(inputs, layer, "a8-fp8-folded")
        check(y, inputs, layer, "a8-fp8-folded", folded=True)
        assert torch.equal(run(inputs, layer, "a8-fp8-folded"), y)


@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 2.0**100])
@pytest.mark.parametrize("dominant", ["scales", "up", "down"])
def test_folded_branches_of_all_sizes(dominant: str, size: float) -> None:
    layer = make(FOLDED[1], n=150)
    own = getattr(layer, dominant)
    inputs = random_inputs(3, "gaussian", 9, layer.layout.segments, BF16)
    layer = dataclasses.replace(layer, **{dominant: own * size})
    check(run(inputs, layer, "a8-fp8-folded"), inputs, layer, "a8-fp8-folded", folded=True)


@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize("case", FOLDED)
@pytest.mark.parametrize("odd", [1, 4, 16])
def test_folded_branches_of_matrices_with_room_between_rows(case: Any, odd: int) -> None:
    """Of rows that begin anywhere; where they do not begin at words of codes, the plain kernel computes them."""
    layer = make(case)
    inputs = random_inputs(3, "gaussian", 9, case[2], BF16)

    def apart(x: Tensor) -> Tensor:
        wide = torch.full((len(x), x.shape[1] + 3 * odd), 77, dtype=x.dtype, device=x.device)
        return wide[:, odd : odd + x.shape[1]].copy_(x)

    there = moved(layer)
    other = dataclasses.replace(there, **{name: apart(getattr(there, name)) for name in MATRICES})
    y = run(inputs, other, "a8-fp8-folded")
    check(y, inputs, layer, "a8-fp8-folded", folded=True)
    # The two kernels add up ranks in other orders, and some weights become their neighbours.
    assert odd == 1 or torch.equal(run(inputs, layer, "a8-fp8-folded"), y)


@pytest.mark.parametrize("m", [7, 70, 300])
@pytest.mark.parametrize("case", [FOLDED[1], ("ternary", None, (192,), 16, True)])
def test_layers_whose_branch_is_not_folded_are_those_of_the_other_path(case: Any, m: int) -> None:
    layer = make(case)
    inputs = random_inputs(3, "gaussian", m, case[2], BF16)
    assert torch.equal(run(inputs, layer, "a8-fp8-folded"), run(inputs, layer, "a8-fp8"))


@pytest.mark.parametrize("case", FOLDED)
@pytest.mark.parametrize("with_tokens", [False, True])
def test_bounds_of_folded_branches(case: Any, with_tokens: bool) -> None:
    layer = moved(random_layer(0, 200, case[2], *case[:2], *case[3:]))
    assert layer.down is not None and layer.up is not None
    *_, segment = layer.layout
    columns, n = segment.logical, 200
    smooth = None if layer.smooth is None else layer.smooth[columns].contiguous()
    found = torch.full((bounds_of(n, case[3]),), float("nan"), device=DEVICE)
    weight = Weight(
        layer.codes,
        layer.scales[:, segment.groups],
        segment.size,
        smooth,
        layer.down[:, columns],
        layer.up,
        found,
        found,
    )
    x = random_inputs(3, "gaussian", 5, (columns.stop - columns.start,), BF16)[0].to(DEVICE)
    codes, scales = torch.empty(5, 512, dtype=torch.float8_e4m3fn, device=DEVICE), torch.empty(5, device=DEVICE)
    if with_tokens:
        tile = config.WholeRowsConfig(2, 256, 4)
        quantize_whole_rows(x, None, codes, scales, tile, weight=weight)
        want = reference.quantize_activations(x.cpu(), None, None, "fp8", 0.0)
        assert torch.equal(codes[:, : x.shape[1]].cpu().float(), want[0].float())
        assert torch.equal(scales.cpu(), want[1][:, 0])
    else:
        find_bounds(weight)
    down = layer.down[:, columns].float().cpu()
    if smooth is not None:
        down = (down * smooth.float().cpu()).bfloat16().float()
    peak = layer.scales[:, segment.groups].float().cpu().abs().amax(1) * 8
    assert torch.equal(found[:n].cpu(), peak)
    of_down, of_up = found[n:].cpu().view(-1, config.padded_rank(case[3])).split([IN_DOWN, 4])
    assert torch.equal(of_down.amax(0)[: len(down)], down.abs().amax(1)) and not of_down[:, len(down) :].any()
    together = torch.stack([rows.abs().amax(0) for rows in layer.up.float().cpu().split(64)])
    assert torch.equal(of_up[:, : len(down)], together) and not of_up[:, len(down) :].any()


MATRICES = ("codes", "scales", "down", "up")


def strided(x: Tensor) -> Tensor:
    """The same numbers with others between."""
    return torch.stack([x, torch.full_like(x, 77)], dim=-1)[..., 0]


def upside_down(x: Tensor) -> Tensor:
    """The same numbers, columns behind one another."""
    return x.T.contiguous().T


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("path", [*PATHS, "a4", "a16"])
def test_strides_and_batches_do_not_matter_and_runs_are_equal(path: str) -> None:
    layer = moved(random_layer(0, N, (200,), rank=16, smooth=True))
    x = torch.randn(3, 5, 200, generator=torch.Generator().manual_seed(0)).to(BF16).to(DEVICE)
    function = linear.plan(path, 15)
    y = function([x], *layer.args(), path, ())
    assert y.shape == (3, 5, N)
    assert torch.equal(function([x], *layer.args(), path, ()), y)
    strided = torch.empty(5, 3, 400, dtype=BF16, device=DEVICE)[..., ::2].transpose(0, 1).copy_(x)
    assert not strided.is_contiguous()
    assert torch.equal(linear.plan(path, 15)([strided], *layer.args(), path, ()), y)
    turned = dataclasses.replace(layer, **{name: upside_down(getattr(layer, name)) for name in MATRICES})
    assert not any(getattr(turned, name).is_contiguous() for name in MATRICES)
    assert torch.equal(linear.plan(path, 15)([x], *turned.args(), path, ()), y)
    column = torch.empty(15, 300, dtype=BF16, device=DEVICE)[:, 50:250].copy_(x.flatten(0, 1))
    assert torch.equal(linear.plan(path, 15)([column], *layer.args(), path, ()), y.flatten(0, 1))


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize(("path", "shift"), [*((path, ()) for path in (*PATHS, "a4", "a16")), ("a4", (0.171875,))])
@pytest.mark.parametrize("rank", [16, 0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_stays_visible_and_alone(
    path: str, shift: tuple[float, ...], rank: int, value: float
) -> None:
    layer = random_layer(0, 20, (300,), rank=rank, smooth=True)
    (x,) = random_inputs(1, "gaussian", 6, (300,), BF16)
    clean = run([x], layer, path, shift)
    x[2, 7] = value
    y = run([x], layer, path, shift)
    others = torch.arange(6) != 2
    assert not y[2].isfinite().any()
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("kind", [*KINDS, "positive", "outlier channels"])
@pytest.mark.parametrize("shift", [0.0, 0.171875])
@pytest.mark.parametrize(("m", "k", "rank"), [(7, 200, 16), (33, 1100, 40), (1, 64, 0)])
def test_four_bit_prologue(kind: str, shift: float, m: int, k: int, rank: int) -> None:
    layer = random_layer(1, 4, (k,), rank=rank, smooth=True)
    (x,) = hostile_inputs(kind, m, (k,))
    format = "uint4" if shift else "int4"
    packed, scales, low = reference.quantize_activations(x, layer.smooth, layer.down, format, shift)
    there, width = moved(layer), -(-k // 128) * 128
    codes = torch.full((m, width), 77, dtype=torch.int8, device=DEVICE)
    got = torch.full((width // 64, m), float("nan"), device=DEVICE)
    sums = torch.full((m, rank), float("nan"), device=DEVICE) if rank else None
    quantize_groups(x.to(DEVICE), there.smooth, there.down, codes, got, sums, shift)
    want = formats.get_packing("nibbles").unpack(packed, scales.shape[1] * 64)
    known = scales.shape[1]
    assert torch.equal(codes[:, : known * 64].cpu(), want & 15 if shift else want)
    assert not codes[:, known * 64 :].any()
    assert torch.equal(got[:known].T.cpu(), scales)
    assert got.isfinite().all()
    if sums is not None:
        assert torch.allclose(sums.cpu(), low, rtol=1e-4, atol=1e-4 * low.abs().max().item())


@pytest.mark.parametrize(
    ("case", "m", "shift"),
    [(case, 33, ()) for case in LAYERS]
    + [
        (LAYERS[0], 7, (0.171875,)),
        (LAYERS[1], 1, ()),
        (LAYERS[1], 40, (0.0, 0.171875)),
        (LAYERS[3], 16, (0.171875,)),
        (LAYERS[5], 16, (0.25, 0.5)),
        (("int4", 32, (200, 72), 16, True), 9, (0.0, 0.171875)),
        (("ternary", None, (70, 300), 16, True), 9, (0.171875, 0.0)),
        (("int4", 256, (700,), 0, False), 9, ()),
    ],
)
def test_four_bit_linear(case: Any, m: int, shift: tuple[float, ...]) -> None:
    layer = make(case)
    inputs = random_inputs(m, "gaussian", m, case[2], BF16)
    check_four_bits(inputs, layer, shift)


@pytest.mark.parametrize("shift", [(), (0.0, 0.171875)])
@pytest.mark.parametrize("kind", [*KINDS, "outlier channels"])
def test_four_bit_linear_on_hostile_inputs(kind: str, shift: tuple[float, ...]) -> None:
    layer = make(LAYERS[1], zero_rows=True)
    check_four_bits(hostile_inputs(kind, 33, layer.layout.segments), layer, shift)


def hostile_inputs(kind: str, m: int, segments: tuple[int, ...]) -> list[Tensor]:
    if kind != "outlier channels":
        return random_inputs(2, kind, m, segments, BF16)
    inputs = random_inputs(2, "gaussian", m, segments, BF16)
    for x in inputs:
        x[:, ::13] *= 20
        x[:, 64:128] = 0
    return inputs


def check_four_bits(inputs: list[Tensor], layer: Layer, shift: tuple[float, ...]) -> None:
    m = len(inputs[0])
    y = linear.plan("a4", m)([x.to(DEVICE) for x in inputs], *moved(layer).args(), "a4", shift).cpu()
    want, size = expect(inputs, layer, "a4", shift)
    allowed = EXACT + (BRANCH if layer.up is not None else 0.0)
    error = abs(y.double().numpy() - want)
    assert (error <= allowed * size + ROUNDING[BF16][0] * abs(want) + 2**-126).all()
    ours = reference.few_bit_linear(inputs, *layer.args(), "a4", shift)
    assert (y.float() - ours.float()).norm() <= 5e-3 * ours.float().norm() + 2**-126


@pytest.mark.usefixtures("many")
def test_int8_is_the_reference_to_the_last_bit_without_a_branch() -> None:
    layer = random_layer(0, N, (200,), bias=False)
    inputs = random_inputs(1, "gaussian", 33, (200,), BF16)
    want = reference.few_bit_linear(inputs, *layer.args(), "a8-int8", ())
    assert torch.equal(run(inputs, layer, "a8-int8").cpu(), want)


@pytest.mark.parametrize("case", [*LAYERS, *SMALL_GROUPS])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_dequantize(case: Any, dtype: torch.dtype) -> None:
    layer = make(case)
    want = reference.dequantize(*layer.args()[:5], layer.weight, layer.group_size, case[2], torch.float32)
    size = reference.dequantize(
        layer.codes, layer.scales, layer.smooth, None, None, layer.weight, layer.group_size, case[2], torch.float32
    ).abs()
    if layer.up is not None and layer.down is not None:
        size += layer.up.float().abs() @ layer.down.float().abs()
    out = torch.full(want.shape, float("nan"), dtype=dtype, device=DEVICE)
    dequantized(layer, out)
    assert ((out.cpu().float() - want).abs() <= EXACT * size + ROUNDING[dtype][0] * want.abs()).all()


def dequantized(layer: Layer, out: Tensor) -> None:
    there = moved(layer)
    for segment in layer.layout:
        dequantize_segment(
            there.codes,
            there.scales,
            None if there.smooth is None else there.smooth[segment.logical],
            None if there.down is None else there.down[:, segment.logical],
            there.up,
            layer.weight,
            segment,
            out[:, segment.logical],
        )


@pytest.mark.parametrize("factor", [BF16, torch.float32])
@pytest.mark.parametrize("case", [("ternary", None, (70, 300), 144, True), ("int4", 64, (130,), 40, False)])
def test_dequantize_takes_a_rank_in_pieces(case: Any, factor: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(case)
    assert layer.down is not None and layer.up is not None
    layer = dataclasses.replace(layer, down=layer.down.to(factor), up=layer.up.to(factor))
    want = reference.dequantize(*layer.args()[:5], layer.weight, layer.group_size, case[2], torch.float32)
    out = torch.full(want.shape, float("nan"), device=DEVICE)
    monkeypatch.setattr(dequantize, "ranks_at_once", lambda *_: 16)
    dequantized(layer, out)
    size = want.abs() + layer.up.float().abs() @ layer.down.float().abs()
    assert ((out.cpu() - want).abs() <= EXACT * size).all()


# Lengths beside every multiple of a tile, a group and a byte: 1 and 3 inputs, and one more or less than 256 and 512.
RAGGED = [
    ("int4", 64, (1, 255)),
    ("int4", None, (257, 3)),
    ("int4", 16, (511, 513)),
    ("int4", 256, (513,)),
    ("ternary", None, (1, 513)),
    ("ternary", 64, (257, 129)),
    ("ternary", 128, (3, 255)),
    ("nvfp4", 16, (1, 257)),
]


@pytest.mark.parametrize(("weight", "group", "segments"), RAGGED)
@pytest.mark.parametrize("n", [1, 65])
def test_kernels_of_weights_keep_to_their_rows_and_columns(
    weight: str, group: int | None, segments: tuple[int, ...], n: int
) -> None:
    """Codes of the padding are as good as any, and what lies around a result is not written."""
    layer = make((weight, group, segments, 16, True), n=n)
    codes = formats.get(weight).unpack(layer.codes, layer.layout.padded_k)
    known = torch.zeros(layer.layout.padded_k, dtype=torch.bool)
    for segment in layer.layout:
        known[segment.unpadded] = True
    garbage = torch.where(known, codes, torch.ones_like(codes))
    assert weight == "nvfp4" or group is None or not torch.equal(garbage, codes)
    dirty = dataclasses.replace(layer, codes=formats.get(weight).pack(garbage))
    want = reference.dequantize(*layer.args()[:5], weight, group, segments, torch.float32)
    around = torch.full((n + 2, sum(segments) + 6), 77.0, device=DEVICE)
    inner = around[1:-1, 3:-3]
    dequantized(dirty, inner)
    assert torch.allclose(inner.cpu(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert (around.sum() - inner.sum()).isclose(77.0 * torch.tensor(around.numel() - inner.numel()).to(DEVICE))
    block = formats.get(weight).unpack(layer.codes, layer.layout.padded_k).float(), layer.scales.float()
    there = moved(dirty)
    for segment in layer.layout:
        folded = reference.fold((block[0].clone(), block[1]), segment, "int8", formats.get(weight).largest)
        k = folded.values.shape[1]
        whole = torch.full((n + 2, k + 46), 77, dtype=torch.int8, device=DEVICE)
        part, scales = whole[1:-1, 3:-3], torch.full((n + 2,), 77.0, device=DEVICE)
        unpack_segment(
            there.codes, there.scales, weight, segment, part, scales[1:-1],
            config.unpack_for(config.device_of(part.device), k, group is not None),
        )  # fmt: skip
        assert torch.equal(part[:, :k].cpu().float(), folded.values) and not part[:, k:].any()
        part.fill_(77)
        assert (whole == 77).all() and (scales[[0, -1]] == 77).all()


def test_many_tokens_on_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "FEW_TOKENS", 8)
    for case in (LAYERS[1], LAYERS[4], SMALL_GROUPS[1]):
        layer = make(case)
        inputs = random_inputs(5, "gaussian", 9, case[2], BF16)
        want, _ = expect(inputs, layer, "a16")
        error = run(inputs, layer, "a16").cpu().double().numpy() - want
        assert np.linalg.norm(error) <= 5e-3 * np.linalg.norm(want)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("gelu_from", [None, 17])
@pytest.mark.parametrize("rank", [96, 144])
@pytest.mark.parametrize(("path", "m"), [*((path, 33) for path in (*PATHS, "a4")), ("a16", 7), ("a16", 70)])
def test_branches_of_many_loras(path: str, m: int, rank: int, gelu_from: int | None) -> None:
    """Within the kernels, and apart from them where they have no room for so much rank."""
    layer = make(("int4", 64, (70, 300), rank, True))
    assert linear.is_apart(layer.down) == (rank > config.LARGEST_RANK)
    inputs = random_inputs(3, "gaussian", m, layer.layout.segments, BF16)
    args = ([x.to(DEVICE) for x in inputs], *moved(layer).args(), path, (), gelu_from)
    want, size = expect(inputs, layer, path)
    # Apart, the output is rounded once more, and so is what goes into a GELU.
    allowed = EXACT + BRANCH + ROUNDING[BF16][0]
    if path == "a16":
        allowed += SMOOTHED
    if path == "a8-fp8" and HOPPER:
        allowed += HOPPER_FP8
    if gelu_from is not None:
        want, size = gelu(want, size, gelu_from)
    error = abs(linear.plan(path, m)(*args).cpu().double().numpy() - want)
    assert (error <= allowed * size + ROUNDING[BF16][0] * abs(want) + 2**-126).all()
    assert np.linalg.norm(error) <= 6e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("path", [*PATHS, "a4", "a16"])
@pytest.mark.parametrize("rank", [16, 40, 144])
def test_a_branch_whose_middle_is_beyond_float16(path: str, rank: int, plans: str) -> None:
    layer = random_layer(0, N, (70, 300), rank=rank, smooth=True, stored=FP16)
    assert layer.down is not None and layer.up is not None
    layer = dataclasses.replace(layer, down=layer.down * 2**12, up=layer.up * 2.0**-12)
    inputs = random_inputs(3, "gaussian", 9, layer.layout.segments, FP16)
    for x in inputs:
        x *= torch.tensor([0.0, 1e-3, 1, 30, 60, 100, 200, 400, 500], dtype=FP16)[:, None]
    low = sum(x.float() @ d.float().T for x, d in zip(inputs, layer.down.split(layer.layout.segments, 1), strict=True))
    assert isinstance(low, Tensor) and low.abs().max() > 10 * torch.finfo(FP16).max
    if path == "a4":
        check_four_bits(inputs, layer, ())
        return
    y = run(inputs, layer, path)
    if path == "a16" and plans == "many":
        # The branch is part of the weight, which is rounded.
        want, _ = expect(inputs, layer, path)
        assert np.linalg.norm(y.cpu().double().numpy() - want) <= 5e-3 * np.linalg.norm(want)
    else:
        check(y, inputs, layer, path, FUSED[path] if plans == "fused" else 0.0)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("path", [*PATHS, "a4", "a16"])
@pytest.mark.parametrize("gelu_from", [0, 17, N])
def test_gelu_in_the_epilogue(path: str, gelu_from: int) -> None:
    layer = make(LAYERS[1])
    layer = dataclasses.replace(layer, scales=layer.scales * 4)
    inputs = random_inputs(3, "gaussian", 33, layer.layout.segments, BF16)
    args = ([x.to(DEVICE) for x in inputs], *moved(layer).args(), path, (), gelu_from)
    want, size = gelu(*expect(inputs, layer, path), gelu_from)
    error = abs(linear.plan(path, 33)(*args).cpu().double().numpy() - want)
    allowed = EXACT + BRANCH
    if path == "a16":
        # It rounds the smoothed input, and the output before the GELU.
        allowed += SMOOTHED + ROUNDING[BF16][0]
    if path == "a8-fp8" and HOPPER:
        allowed += HOPPER_FP8
    assert (error <= allowed * size + ROUNDING[BF16][0] * abs(want) + 2**-126).all()
    assert np.linalg.norm(error) <= 5e-3 * np.linalg.norm(want)


@pytest.mark.usefixtures("plans")
def test_gelu_everywhere() -> None:
    # In the interpreter every tile takes its time.
    points = 4001 if DEVICE == "cuda" else 1001
    y = torch.cat([torch.linspace(-12, 12, points), torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30])])
    layer = random_layer(0, len(y), (64,))
    layer = dataclasses.replace(layer, bias=y, scales=layer.scales * 0)
    x = torch.zeros(1, 64, device=DEVICE)
    got = linear.plan("a8-int8", 1)([x], *moved(layer).args(), "a8-int8", (), 0).cpu()[0]
    want = torch.nn.functional.gelu(y.double(), approximate="tanh")
    assert ((got.double() - want).abs() <= 1e-5 * want.abs() + 1e-12).all()


@pytest.mark.parametrize(("path", "rank"), [*((path, rank) for path in PATHS for rank in (16, 40)), ("a4", 40)])
def test_branches_in_float32(path: str, rank: int, plans: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(("int4", 64, (70, 300), rank, True))
    assert layer.down is not None and layer.up is not None
    layer = dataclasses.replace(layer, down=layer.down.float(), up=layer.up.float())
    inputs = random_inputs(3, "gaussian", 9, layer.layout.segments, BF16)
    beside: list[int] = []
    branch = layer_plan.with_branch
    monkeypatch.setattr(layer_plan, "with_branch", lambda *args: beside.append(rank) or branch(*args))
    y = run(inputs, layer, path)
    assert bool(beside) == (path != "a4" and rank > 32 and plans == "many")
    if not beside:
        check(y, inputs, layer, path)
        return
    # The output is rounded once more.
    want, size = expect(inputs, layer, path)
    allowed = EXACT + BRANCH + ROUNDING[BF16][0] + (HOPPER_FP8 if path == "a8-fp8" and HOPPER else 0.0)
    error = abs(y.cpu().double().numpy() - want)
    assert (error <= allowed * size + ROUNDING[BF16][0] * abs(want)).all()


@pytest.mark.parametrize(
    ("capability", "rank", "room"), [((9, 0), 32, True), ((9, 0), 33, False), ((10, 0), 16, False)]
)
def test_where_a_branch_in_float32_has_room(
    capability: tuple[int, int], rank: int, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "device_of", lambda _: config.Device(capability, 227 << 10))
    assert linear.has_room_for_float32(torch.zeros(rank, 64)) is room


def test_segments_fill_whole_tiles() -> None:
    assert scratch_bounds(KLayout((70, 300, 128), 64)) == [(0, 128), (128, 512), (512, 640)]


@triton.jit
def _reciprocals(s, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, reciprocal_of_smooth(tl.load(s + at, mask=at < n, other=1.0)), mask=at < n)


def reciprocals(s: Tensor) -> Tensor:
    out = torch.empty(len(s), device=s.device)
    _reciprocals[(triton.cdiv(len(s), 256),)](s, out, len(s), 256, enable_fp_fusion=False)
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind", ["gaussian", "zeros", "outlier", "denormal"])
@pytest.mark.parametrize(("lengths", "count", "size"), [((5, 8), 3, 32), ((7,), 24, 64), ((1,), 1, 2)])
def test_heads(dtype: torch.dtype, kind: str, lengths: tuple[int, ...], count: int, size: int) -> None:
    """Against the formulas in float64, from slices of one tensor, as fused projections give them."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, length, 3, count, size) for length in lengths]
    streams = [torch.randn(shape, generator=g) for shape in shapes]
    for stream in streams:
        if kind == "zeros":
            stream.zero_()
        stream[..., 0] *= {"outlier": 1e3, "denormal": 1e-7}.get(kind, 1.0)
    fused = [stream.to(DEVICE, dtype) for stream in streams]
    q, k = ([x[:, :, i] for x in fused] for i in (0, 1))
    weights = [[(torch.rand(size, generator=g) + 0.5).to(DEVICE, dtype) for _ in lengths] for _ in range(2)]
    angles = torch.rand(sum(lengths), size // 2, generator=g).mul(6).repeat_interleave(2, dim=1).to(DEVICE)
    tables = angles.cos(), angles.sin()
    found = heads.rotary_heads(q, k, *weights, 1e-6, *tables)
    spread = [[strided(w) for w in side] for side in weights]
    again = heads.rotary_heads(q, k, *spread, 1e-6, upside_down(tables[0]), strided(tables[1]))
    for i, (y, same) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(y, same) and torch.isfinite(y).all()
        parts = [(x[:, :, i].double(), w.double()) for x, w in zip(fused, weights[i], strict=True)]
        n = torch.cat([x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w for x, w in parts], dim=1)
        turned = torch.stack([-n[..., 1::2], n[..., ::2]], -1).flatten(-2)
        cos, sin = (t.double()[:, None] for t in tables)
        # The normalized number and the result are rounded once each.
        unit = torch.finfo(dtype).eps / 2
        tiny = torch.finfo(dtype).tiny * 2 * unit
        allowed = 2.1 * unit * ((n * cos).abs() + (turned * sin).abs()) + 2 * tiny
        assert ((y.double() - n * cos - turned * sin).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind", ["gaussian", "zeros", "outlier", "denormal", "nan", "infinity"])
@pytest.mark.parametrize(
    ("images", "tokens", "key_tokens", "count", "size"), [(2, 13, 13, 3, 32), (1, 3, 270, 2, 48), (1, 1, 1, 1, 128)]
)
def test_attention_codes(
    dtype: torch.dtype, kind: str, images: int, tokens: int, key_tokens: int, count: int, size: int
) -> None:
    """Codes and scales of queries, keys and values are the reference's, from slices and whole tensors."""
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(images, key_tokens, 2, count, size, generator=g).mul(3)
    q = torch.randn(images, count, tokens, size, generator=g)
    place = (-1, -1, 1, -1, -1)
    if kind == "zeros":
        fused.zero_()
    elif kind == "denormal":
        fused *= 2.0**-140 if dtype == BF16 else 2.0**-22
    elif kind != "gaussian":
        fused[place] = {"outlier": -3e4, "nan": float("nan"), "infinity": float("inf")}[kind]
    fused = fused.to(DEVICE, dtype)
    given = [q.to(DEVICE, dtype).transpose(1, 2), fused[:, :, 0], fused[:, :, 1]]
    codes = [torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=DEVICE) for x in given]
    scalars = torch.full((8, attention.SLOT), float("nan"), device=DEVICE)
    attention.quantize(*given, codes, scalars, 256.0)
    wanted = codes_of(*(x.cpu() for x in given))
    scales = [scale for _, scale in wanted]
    for found, (want, scale), scalar in zip(codes, wanted, scalars, strict=False):
        assert torch.equal(scalar[:1].cpu(), scale[None]) or (scale.isnan() and scalar[0].isnan())
        if scale.isfinite():
            off = (found.cpu().float() - want.float()).abs()
            # Float32 sums have another order: a number at a boundary goes to the next code.
            assert (off <= want.float().abs() / 8 + 2**-9).all() and off.count_nonzero() <= 0.01 * off.numel() + 1
            assert scale.log2() == scale.log2().round() and want.float().abs().max() <= 448
    assert not scales[2].isfinite() or torch.equal(codes[2].cpu().float(), wanted[2][0].float())
    assert scales[2].isfinite() == (kind not in ("nan", "infinity"))
    assert scalars[3:5, 0].tolist() == [1 / 256, 256.0]
    result_scale = 0.5 / scales[2]
    assert torch.equal(scalars[5, :1].cpu().nan_to_num(-1.0), result_scale[None].nan_to_num(-1.0))
    if not result_scale.isfinite() or not result_scale:
        return
    out = torch.full((images, key_tokens, count, size), float("nan"), dtype=dtype, device=DEVICE)
    attention.dequantize(codes[2], scalars[5], out)
    assert torch.equal(out.cpu(), (wanted[2][0].float() / result_scale).to(dtype))
