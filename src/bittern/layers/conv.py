"""QuantConv2d: the tensors of one few-bit convolution, behind the face of an `nn.Conv2d`.

A kernel is flattened to [N, kh, kw, C]: the channels of one tap lie side by side, every tap is a K-segment of its
own, and so no group of weights spans taps. Smoothing is per channel C, the same for all taps.

A 1 x 1 convolution is a linear layer over channels and runs as one, on any path. A larger kernel has 16-bit
activations: its weight is dequantized, a block of output channels at a time, to the dtype of the input, and convolved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bittern import ops
from bittern.errors import UserError, did_you_mean
from bittern.layers.facade import Parts
from bittern.layers.few_bit import FewBitLayer, Solved
from bittern.scheme import Scheme

BLOCK = {"cpu": 2**20}
"""Weights that are dequantized at a time; in 16 bits `LARGE_BLOCK` are 64 MiB."""
LARGE_BLOCK = 2**25

_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")


def flat_weight(module: nn.Linear | nn.Conv2d) -> Float[Tensor, "n k"]:
    """The weight of a layer as a matrix; a kernel as [N, kh, kw, C]."""
    weight = module.weight
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1) if isinstance(module, nn.Conv2d) else weight


def patches(conv: nn.Conv2d, x: Float[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch ho wo k"]:
    """What each output pixel reads, in the order of the columns of `flat_weight`: their product is the convolution.

    Of a 1 x 1 kernel without padding a view; of others a copy, kh · kw times as large as the input.
    """
    (high, wide), (down, right) = conv.kernel_size, conv.stride
    if high == wide == 1 and not any(conv._reversed_padding_repeated_twice):
        return x[..., ::down, ::right].movedim(-3, -1)
    batch = x.shape[:-3]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = nn.functional.pad(x.reshape(-1, *x.shape[-3:]), conv._reversed_padding_repeated_twice, mode)
    columns = nn.functional.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    # [b, c kh kw, ho wo], and the height follows from how often the kernel fits.
    ho = (padded.shape[-2] - conv.dilation[0] * (high - 1) - 1) // down + 1
    columns = columns.unflatten(1, (-1, high * wide)).unflatten(-1, (ho, -1))
    rows = columns.permute(0, 3, 4, 2, 1).flatten(-2)
    return rows.reshape(*batch, *rows.shape[1:])


class QuantConv2d(FewBitLayer, nn.Conv2d):
    """A convolution whose kernel is few-bit codes, scales, smoothing and a low-rank branch.

    Isinstance of `nn.Conv2d`, so that peft and diffusers take it for one. Peft makes the two layers of an adapter
    by calling the type of the layer they are for as `nn.Conv2d` is called; such a call makes an `nn.Conv2d`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain convolution for positional arguments, which are those of `nn.Conv2d`."""
        return nn.Conv2d(*args, **kwargs) if args else super().__new__(cls)

    def __init__(
        self, *, like: nn.Conv2d, scheme: Scheme, bias: bool, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        # Not nn.Conv2d's: it would allocate the full weight.
        nn.Module.__init__(self)
        if like.groups != 1 or like.transposed:
            raise UserError("grouped and transposed convolutions have no few-bit form: keep them")
        for name in _GEOMETRY:
            setattr(self, name, getattr(like, name))
        self.groups, self.transposed, self.output_padding = 1, False, (0, 0)
        self._reversed_padding_repeated_twice = like._reversed_padding_repeated_twice
        self.scheme, self.segments = scheme, (self.in_channels,) * prod(self.kernel_size)
        self.compute_dtype = dtype
        shapes = scheme.tensor_shapes(self.out_channels, self.segments, taps=len(self.segments))
        self._hold(shapes, (self.out_channels,) if bias else None, device)

    @classmethod
    def like(cls, conv: nn.Conv2d, scheme: Scheme, segments: Sequence[int], *, bias: bool | None = None) -> Self:
        """An empty layer on meta of a convolution's shape and dtype; with a bias if it is told to, or has one."""
        bias = conv.bias is not None if bias is None else bias
        layer = cls(like=conv, scheme=scheme, bias=bias, device="meta", dtype=conv.weight.dtype)
        if tuple(segments) != layer.segments:
            raise UserError(f"segments {tuple(segments)}: expected {layer.segments}, the channels of each tap")
        return layer

    @classmethod
    def from_solution(cls, conv: nn.Conv2d, scheme: Scheme, segments: Sequence[int], solution: Solved) -> Self:
        """A layer that takes the place of `conv`, on its device, with its bias."""
        return cls.like(conv, scheme, segments, bias=False)._take(conv, solution)

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1 x 1 and reads no padding."""
        return len(self.segments) == 1 and not any(self._reversed_padding_repeated_twice)

    def parts(self) -> Parts:
        """All tensors that make up the weight."""
        return replace(super().parts(), kernel=self.kernel_size)

    # ---- computing

    def forward(self, x: Float[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch n ho wo"]:
        """The layer's output."""
        return self._as_linear(x) if self.is_pointwise else self._as_convolution(x)

    def _as_linear(self, x: Tensor) -> Tensor:
        x = patches(self, x)
        tensors, scheme = self.parts().operands, self.scheme
        y = ops.few_bit_linear(
            [x], *tensors, self.bias, scheme.weight, scheme.group_size, self.choice(x.device).path, scheme.shift
        )
        return y.movedim(-1, -3)

    def _as_convolution(self, x: Tensor) -> Tensor:
        rows = max(1, BLOCK.get(x.device.type, LARGE_BLOCK) // sum(self.segments))
        block = self._convolve
        if torch.is_grad_enabled() and x.requires_grad:
            # Autograd would keep the dequantized weight of every layer until the backward pass.
            block = partial(checkpoint, self._convolve, use_reentrant=False, preserve_rng_state=False)
        blocks = [block(x, start, start + rows) for start in range(0, self.out_channels, rows)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-3)

    def _convolve(self, x: Tensor, start: int, stop: int) -> Tensor:
        """These output channels."""
        bias = None if self.bias is None else self.bias[start:stop].to(x.dtype)
        return self._conv_forward(x, self.parts().rows(start, stop).dequantize(x.dtype), bias)

    @property
    def path(self) -> str:
        """The arithmetic: "auto", or one of `ops.PATHS` that was forced; kernels beyond 1 x 1 know a16 only."""
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        if path not in ("auto", *ops.PATHS):
            raise UserError(f"unknown path {path!r}: {did_you_mean(path, (*ops.PATHS, 'auto'))}")
        self._path, self._choice = path, None
        self._choose()

    def choice(self, device: torch.device | None = None) -> ops.Choice:
        """The arithmetic that runs on a device, the layer's own unless one is given, and why."""
        if self.is_pointwise:
            return super().choice(device)
        return ops.Choice("a16", "torch", f"a {' x '.join(map(str, self.kernel_size))} convolution has no other")

    def extra_repr(self) -> str:
        """The shape, the numbers and the path."""
        return f"{super().extra_repr()}, {self.numbers()}"
