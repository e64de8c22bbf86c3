"""What a few-bit layer shows where an `nn.Linear` or `nn.Conv2d` has its weight.

Libraries ask a linear layer for `weight` to learn its shape, dtype and device: peft to place adapters, diffusers'
LoRA loader to compare shapes, others for its numbers. A `FewBitWeight` answers the first kind of question from a
few fields and the second by dequantizing there and then; writing to it is refused.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bittern import formats, ops
from bittern.errors import UserError
from bittern.scheme import Scheme

_aten = torch.ops.aten


@dataclass(frozen=True)
class Parts:
    """The tensors that one layer's weight is made of; in a group, views of the leader's.

    `kernel` is a convolution's; its K is [kh, kw, C], with one segment a tap, and its `smooth` is per channel.
    """

    scheme: Scheme
    segments: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    smooth: Tensor | None
    down: Tensor | None
    up: Tensor | None
    row_scales: Tensor | None = None
    kernel: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: [N, K], or [N, C, kh, kw] of a convolution."""
        n = self.codes.shape[0]
        return (n, sum(self.segments)) if self.kernel is None else (n, self.segments[0], *self.kernel)

    def rows(self, start: int, stop: int) -> Parts:
        """The same for these rows alone."""
        own = {
            leaf: tensor[start:stop]
            for leaf in ("codes", "scales", "up", "row_scales")
            if (tensor := getattr(self, leaf)) is not None
        }
        return replace(self, **own)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What the operations take: codes, scales, smooth, down, up."""
        scales = self.scales
        if self.row_scales is not None:
            scales = formats.nvfp4.combine(scales, self.row_scales, self.scheme.layout(self.segments))
        return self.codes, scales, self.smooth, self.down, self.up

    def to(self, device: torch.device) -> Parts:
        """The same on another device."""
        return replace(self, **{leaf: t.to(device) for leaf, t in vars(self).items() if isinstance(t, Tensor)})

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "n *_"]:
        """The weight that the layer applies: What / s + U · D."""
        codes, scales, smooth, down, up = self.operands
        kernel = self.kernel
        if smooth is not None and kernel is not None:
            # Smoothing is per channel, and every tap reads all channels.
            smooth = smooth.repeat(len(self.segments))
        weight = ops.dequantize(
            codes,
            scales,
            smooth,
            down,
            up,
            self.scheme.weight,
            self.scheme.group_size,
            self.segments,
            dtype,
        )
        return weight if kernel is None else weight.unflatten(1, (*kernel, -1)).movedim(-1, 1)


def refuse_writing() -> NoReturn:
    """Raises the error of everything that would write a few-bit weight.

    Raises:
        UserError: always.
    """
    raise UserError(
        "the weight of a few-bit layer is read-only: its codes cannot take a change of single numbers; "
        "keep LoRAs loaded, fuse them with bittern.fuse_loras(pipe), or fuse them before quantizing"
    )


class FewBitWeight(Tensor):
    """A read-only tensor of a dense weight's shape that is dequantized when it is used.

    Moving it, changing its float dtype and detaching it stay lazy. It pickles as an empty tensor on the meta
    device, since the codes beside it in a state dict carry the numbers.
    """

    parts: Parts

    # Everything goes through __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, parts: Parts, dtype: torch.dtype) -> FewBitWeight:
        """A facade of `parts`, in what their layer computes in."""
        weight = Tensor._make_wrapper_subclass(cls, parts.shape, dtype=dtype, device=parts.codes.device)
        weight.parts = parts
        return weight

    def dequantize(self) -> Float[Tensor, "n *_"]:
        """An ordinary tensor of the same numbers."""
        return self.parts.dequantize(self.dtype)

    @property
    def data(self) -> Tensor:
        """The weight itself."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        refuse_writing()

    def __setitem__(self, key: Any, value: Any) -> None:
        # Indexing gives a copy, so that the write would be lost in silence.
        refuse_writing()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Stays lazy where no number is needed, refuses to be written, and is an ordinary tensor otherwise."""
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return FewBitWeight(args[0].parts, args[0].dtype)
        if func is _aten._to_copy.default and (kwargs.get("dtype") or args[0].dtype).is_floating_point:
            device = kwargs.get("device") or args[0].device
            return FewBitWeight(args[0].parts.to(device), kwargs.get("dtype") or args[0].dtype)
        for position, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if written and isinstance(value, FewBitWeight):
                refuse_writing()
        args, kwargs = tree_map_only(FewBitWeight, FewBitWeight.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> FewBitWeight:
        return FewBitWeight(copy.deepcopy(self.parts, memo), self.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.empty(self.shape, dtype=self.dtype, device="meta").__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        kind, shape = self.parts.scheme.weight, tuple(self.shape)
        return f"FewBitWeight({kind}, shape={shape}, dtype={self.dtype}, device='{self.device}')"
