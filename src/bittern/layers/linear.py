"""QuantLinear: the tensors of one few-bit linear layer, behind the face of an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bittern import formats, ops
from bittern.errors import UserError
from bittern.layers.facade import Parts
from bittern.layers.few_bit import LEAVES, FewBitLayer, Solved
from bittern.layers.hooks import is_unhooked
from bittern.ops.contract import check_axis
from bittern.scheme import Scheme

if TYPE_CHECKING:
    from bittern.layers.group import Group


class QuantLinear(FewBitLayer, nn.Linear):
    """A linear layer whose weight is few-bit codes, scales, smoothing and a low-rank branch.

    Isinstance of `nn.Linear`, so that peft and diffusers take it for one.

    The members of a group (see `join_group`) leave their buffers to the first one, which holds all their rows
    as `group_codes` and so on; `tensors()` gives a layer's own, in a group or not.

    Attributes:
        scheme: The numbers of the layer.
        segments: Lengths of the K-segments.
        compute_dtype: Dtype that `weight` shows.
        group: The layers that read the same input, if this is one of several.
        rows: This layer's first row in the buffers, and the one after its last.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        segments: Sequence[int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not nn.Linear's: it would allocate the full weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.segments = scheme, tuple(segments or (in_features,))
        if sum(self.segments) != in_features:
            raise UserError(f"segments {self.segments} add up to {sum(self.segments)}: expected {in_features}")
        self.compute_dtype = dtype or torch.get_default_dtype()
        self.group: Group | None = None
        self.rows = (0, out_features)
        shapes = scheme.tensor_shapes(out_features, self.segments)
        self._hold(shapes, (out_features,) if bias else None, device)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        segments: Sequence[int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer to be filled by `load`; on the meta device it takes the loaded tensors as they are."""
        return cls(in_features, out_features, scheme, segments, bias, device, dtype)

    @classmethod
    def like(cls, linear: nn.Linear, scheme: Scheme, segments: Sequence[int], *, bias: bool | None = None) -> Self:
        """An empty layer on meta of a linear's shape and dtype; with a bias if it is told to, or has one."""
        bias = linear.bias is not None if bias is None else bias
        return cls(linear.in_features, linear.out_features, scheme, segments, bias, "meta", linear.weight.dtype)

    @classmethod
    def from_solution(cls, linear: nn.Linear, scheme: Scheme, segments: Sequence[int], solution: Solved) -> Self:
        """A layer that takes the place of `linear`, on its device, with its bias."""
        return cls.like(linear, scheme, segments, bias=False)._take(linear, solution)

    # ---- tensors

    @property
    def holder(self) -> QuantLinear:
        """The layer whose buffers hold this one's rows: itself, or the first of its group."""
        return self if self.group is None else self.group.members[0]

    def _buffer(self, leaf: str) -> str:
        """The name of the holder's buffer."""
        # Accelerate restores buffers from the state dict by name: those of other shapes need other names.
        return leaf if self.group is None else f"group_{leaf}"

    def parts(self) -> Parts:
        """All tensors that make up the weight, a group's shared ones included."""
        return Parts(self.scheme, self.segments, *self._stacked(*self.rows))

    def _stacked(self, start: int, stop: int) -> tuple[Any, ...]:
        """The holder's tensors, of these rows, in the order of `LEAVES`."""
        codes, scales, smooth, down, up, row_scales = map(self._held, LEAVES)
        if stop - start < codes.shape[0]:
            codes, scales, up = codes[start:stop], scales[start:stop], None if up is None else up[start:stop]
            row_scales = None if row_scales is None else row_scales[start:stop]
        return codes, scales, smooth, down, up, row_scales

    # ---- computing

    def forward(self, x: Float[Tensor, "*batch k"] | Sequence[Tensor]) -> Float[Tensor, "*batch n"]:
        """The layer's output for an input, or for one input per K-segment."""
        return self.linear_rows(x, *self.rows, self.bias)

    def with_gelu(self, x: Float[Tensor, "*batch k"] | Sequence[Tensor]) -> Float[Tensor, "*batch n"]:
        """The output after a GELU in its tanh form."""
        if not self.is_plain:
            return nn.functional.gelu(self(x), approximate="tanh")
        return self.linear_rows(x, *self.rows, self.bias, 0)

    @property
    def is_plain(self) -> bool:
        """Whether a call is `forward` and nothing else, so that it may run in other ways."""
        return is_unhooked(self)

    def linear_rows(
        self,
        x: Float[Tensor, "*batch k"] | Sequence[Tensor],
        start: int,
        stop: int,
        bias: Tensor | None,
        gelu_from: int | None = None,
    ) -> Float[Tensor, "*batch rows"]:
        """The outputs of these rows of the group's stacked weight; `forward` asks for the layer's own.

        Args:
            x: The input, or one input per K-segment.
            start: First row.
            stop: The one after the last.
            bias: Of these rows.
            gelu_from: The first of these rows whose outputs pass through a GELU; None for none.
        """
        inputs = self._by_segment(x)
        codes, scales, smooth, down, up, row_scales = self._stacked(start, stop)
        if row_scales is not None:
            scales = formats.nvfp4.combine(scales, row_scales, self.scheme.layout(self.segments))
        return ops.few_bit_linear(
            inputs,
            codes,
            scales,
            smooth,
            down,
            up,
            bias,
            self.scheme.weight,
            self.scheme.group_size,
            self.choice(inputs[0].device).path,
            self.scheme.shift,
            gelu_from,
        )

    def _by_segment(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """One input per K-segment. Operations see no difference between layers of 64 + 72 and of 72 + 64 inputs."""
        given = [x] if isinstance(x, Tensor) else list(x)
        sizes = tuple(part.shape[-1] if part.ndim else 0 for part in given)
        if sizes == self.segments:
            return given
        if isinstance(x, Tensor) and sizes == (self.in_features,):
            return list(x.split(self.segments, dim=-1))
        raise UserError(_not_for(given, self.segments))

    def extra_repr(self) -> str:
        """The shape, the numbers and the path."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.numbers()}"
        )


def _not_for(given: Sequence[Tensor], segments: tuple[int, ...]) -> str:
    check_axis(given)
    sizes = " and ".join(str(part.shape[-1]) for part in given) or "none"
    if len(segments) == 1:
        return f"inputs of {sizes} columns: expected one tensor of {segments[0]}"
    parts = " and ".join(map(str, segments))
    return f"inputs of {sizes} columns: expected tensors of {parts}, in this order, or one of {sum(segments)}"
