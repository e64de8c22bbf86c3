"""An independent evaluation of a few-bit layer: numpy, float32 only where the reference promises one.

Sums are float64, so that the oracle has no error of its own to speak of.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bittern import formats
from bittern.formats import KLayout

TINY = np.finfo(np.float32).tiny
F32 = np.float32

# Rounding of the result to its dtype: relative, and for results in the subnormal range absolute.
ROUNDING = {torch.float32: (2**-24, 2**-149), torch.bfloat16: (2**-8, 2**-133), torch.float16: (2**-11, 2**-25)}
# Float32 sums over K terms, relative to the sum of their magnitudes.
ACCUMULATION = 2e-6


@dataclass
class Layer:
    """The tensors of a random layer, under the names of the operation's arguments."""

    codes: Tensor
    scales: Tensor
    smooth: Tensor | None
    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    weight: str
    group_size: int | None
    layout: KLayout = field(repr=False)

    def kwargs(self) -> dict[str, Any]:
        """What the operation takes, without inputs, path and shift."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}

    def args(self) -> list[Any]:
        """The same in order."""
        return list(self.kwargs().values())


def random_layer(
    seed: int,
    n: int,
    segments: tuple[int, ...],
    weight: str = "int4",
    group_size: int | None = 64,
    rank: int = 0,
    smooth: bool = False,
    bias: bool = True,
    stored: torch.dtype = torch.bfloat16,
    zero_rows: bool = False,
) -> Layer:
    g = torch.Generator().manual_seed(seed)
    fmt, layout = formats.get(weight), KLayout(segments, group_size)
    codes = torch.randint(fmt.code_min, fmt.code_max + 1, (n, layout.padded_k), dtype=torch.int8, generator=g)
    if weight == "nvfp4":
        codes = formats.nvfp4.on_grid(codes.float()).to(torch.int8)
    # Padding carries codes, too: whatever is there must be ignored.
    scales = torch.rand(n, layout.num_groups, generator=g) * 0.02 + 0.001
    scales = scales * torch.where(torch.rand(scales.shape, generator=g) < 0.2, -1.0, 1.0)
    if zero_rows:
        scales[::2] = 0
    k = layout.k
    return Layer(
        codes=fmt.pack(codes),
        scales=scales.to(stored),
        smooth=(torch.rand(k, generator=g) + 0.25).to(stored) if smooth else None,
        down=(torch.randn(rank, k, generator=g) / k**0.5).to(stored) if rank else None,
        up=torch.randn(n, rank, generator=g).to(stored) if rank else None,
        bias=torch.randn(n, generator=g) if bias else None,
        weight=weight,
        group_size=group_size,
        layout=layout,
    )


def random_inputs(seed: int, kind: str, m: int, segments: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, sum(segments), generator=g)
    if kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "zero rows":
        x[::2] = 0
    elif kind == "outlier":
        x[:, 0] *= 1000
    elif kind == "late outlier":
        # Beyond what the first inputs of a token foretell; of others those say nothing.
        x[::2, -1] *= 1000
        x[1::3, :256] = 0
    elif kind == "denormal":
        x *= 2.0**-140 if dtype != torch.float16 else 2.0**-22
    elif kind == "positive":
        x = x.abs()
    elif kind == "equal":
        x = torch.full_like(x, 1.7)
    return [part.to(dtype) for part in x.split(segments, dim=-1)]


def gelu(y: Any, size: Any, gelu_from: int) -> tuple[Any, Any]:
    """Outputs, and magnitudes that bound their errors, after a GELU from one output on."""
    y, size = y.copy(), size.copy()
    part = y[:, gelu_from:]
    y[:, gelu_from:] = part / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (part + 0.044715 * part**3)))
    # Nowhere steeper than 1.13.
    size[:, gelu_from:] = 1.13 * size[:, gelu_from:] + abs(part)
    return y, size


def expect(
    inputs: list[Tensor], layer: Layer, path: str, shift: tuple[float, ...] = (), folded: bool = False
) -> tuple[Any, Any]:
    """The outputs in float64, and the sum of magnitudes that went into each; on a8-fp8 also with a folded branch."""
    codes = formats.get(layer.weight).unpack(layer.codes, layer.layout.padded_k).numpy().astype(F32)
    total: Any = 0.0
    size: Any = 0.0
    low: Any = 0.0
    low_size: Any = 0.0
    offsets = shift if shift and path == "a4" else (0.0,) * len(inputs)
    for x, segment, h in zip(inputs, layer.layout, offsets, strict=True):
        raw = x.reshape(-1, x.shape[-1]).float().numpy()
        s = np.ones(raw.shape[1], F32) if layer.smooth is None else f32(layer.smooth[segment.logical])
        u = (raw + F32(h)) * (F32(1) / s)
        scales = f32(layer.scales[:, segment.groups])
        what = codes[:, segment.padded].reshape(*scales.shape, segment.size) * scales[..., None]
        what = what.reshape(len(what), -1)[:, : raw.shape[1]]
        if path == "a16":
            part, magnitude = dot(u, what), dot(abs(u), abs(what))
        elif path == "a4":
            rounded = four_bits(u, h > 0)
            part = dot(rounded, what) - h * dot(np.ones((1, len(s))) / s, what)
            magnitude = dot(abs(rounded), abs(what)) + h * dot(np.ones((1, len(s))) / s, abs(what))
        else:
            limit = 127 if path == "a8-int8" else 448
            a = maximum_over(u, limit)
            if limit == 448:
                a = foretold(u, a)
            qa = eight_bits(u * (F32(1) / a), path)
            if folded:
                c, qw = with_branch(what, scales, s, segment, layer)
            elif scales.shape[1] == 1:
                c, qw = scales, codes[:, segment.padded][:, : raw.shape[1]]
            else:
                fmt = formats.get(layer.weight)
                c = maximum_over(scales * F32(max(-fmt.code_min, fmt.code_max)), limit)
                ratios = np.repeat(scales * (F32(1) / c), segment.size, axis=1)
                qw = eight_bits((codes[:, segment.padded] * ratios)[:, : raw.shape[1]], path)
            part = dot(qa, qw) * a.astype(np.float64) * c.T.astype(np.float64)
            magnitude = dot(abs(qa), abs(qw)) * a.astype(np.float64) * abs(c.T.astype(np.float64))
        total, size = total + part, size + magnitude
        if layer.down is not None and not folded:
            d = f32(layer.down[:, segment.logical])
            low, low_size = low + dot(raw, d), low_size + dot(abs(raw), abs(d))
    if layer.up is not None and not folded:
        total, size = total + dot(low, f32(layer.up)), size + dot(low_size, abs(f32(layer.up)))
    if layer.bias is not None:
        total, size = total + layer.bias.double().numpy(), size + abs(layer.bias.double().numpy())
    return total, size


def with_branch(what: Any, scales: Any, s: Any, segment: Any, layer: Layer) -> tuple[Any, Any]:
    """c, and the e4m3 codes of a segment's weight with its branch."""
    assert layer.down is not None and layer.up is not None
    d, u = f32((layer.down[:, segment.logical].float() * torch.from_numpy(s)).bfloat16()), f32(layer.up)
    together = np.array([abs(u[i - i % 64 : i - i % 64 + 64]).max(0) for i in range(len(u))])
    bound = 8 * abs(scales).max(-1) + together @ abs(d).max(-1)
    c = np.maximum(2.0 ** np.floor(np.log2(np.maximum(bound, 1e-300))) / 128, 2.0**-64).astype(F32)[:, None]
    whole = what.astype(np.float64) + dot(u, d.T)
    return c, eight_bits((whole / c).astype(F32), "a8-fp8")


def assert_close(got: Tensor, want: Any, size: Any, what: str = "") -> None:
    """Within one rounding to the dtype and the error of float32 sums."""
    relative, absolute = ROUNDING[got.dtype]
    allowed = ACCUMULATION * size + relative * abs(want) + absolute + 2**-126
    error = abs(got.reshape(want.shape).double().numpy() - want)
    assert np.isfinite(error).all(), what
    assert (error <= allowed).all(), f"{what}: {np.max(error / allowed):.2f} times the tolerance"


def f32(tensor: Tensor) -> Any:
    return tensor.float().numpy()


def dot(a: Any, b: Any) -> Any:
    return a.astype(np.float64) @ b.astype(np.float64).T


def maximum_over(values: Any, limit: int) -> Any:
    return np.maximum(abs(values).max(-1, keepdims=True) * (F32(1) / F32(limit)), TINY)


def foretold(values: Any, scale: Any) -> Any:
    """The scale in fp8: that of 16 times the first 256 inputs where it is large enough."""
    with np.errstate(over="ignore"):
        first = abs(values[:, :256]).max(-1, keepdims=True) * F32(16)
    covers = (abs(values).max(-1, keepdims=True) <= first) & np.isfinite(first)
    return np.where(covers, np.maximum(first * (F32(1) / F32(448)), TINY), scale)


def eight_bits(values: Any, path: str) -> Any:
    if path == "a8-int8":
        return np.rint(values)
    return torch.from_numpy(np.clip(values, -448, 448)).to(torch.float8_e4m3fn).float().numpy()


def four_bits(u: Any, unsigned: bool) -> Any:
    m, k = u.shape
    groups = np.pad(u, ((0, 0), (0, -k % 64))).reshape(m, -(-k // 64), 64)
    if unsigned:
        scale = np.maximum(groups.max(-1, keepdims=True) * (F32(1) / F32(15)), TINY)
        with np.errstate(over="ignore"):
            codes = np.clip(np.rint(groups * (F32(1) / scale)), 0, 15)
    else:
        scale = maximum_over(groups, 8.25)
        scale = np.where(groups.max(-1, keepdims=True) > -groups.min(-1, keepdims=True), -scale, scale)
        codes = np.clip(np.rint(groups * (F32(1) / scale)), -8, 7)
    return (codes * scale).reshape(m, groups.shape[1] * 64)[:, :k]
