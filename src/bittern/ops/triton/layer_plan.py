"""What a layer launches, found by the first call of a signature and repeated by the next ones (see `launch`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from bittern.formats import KLayout
from bittern.ops import reference
from bittern.ops.triton.launch import Launches, Recorder, contiguous_rows, on_device_of
from bittern.ops.triton.vendor import is_apart, with_branch


class Call(NamedTuple):
    """The tensors of one call, matrices all, and what its signature says; parts are known to the recorder."""

    inputs: list[Tensor]
    codes: Tensor
    scales: Tensor
    smooth: list[Tensor | None]
    """By segment, as `down`."""
    down: list[Tensor | None]
    up: Tensor | None
    bias: Tensor | None
    low: Tensor | None
    out: Tensor
    weight: str
    layout: KLayout
    path: str
    shift: Sequence[float]
    gelu_from: int | None


class LayerPlan:
    """A layer's launches for calls of one signature, found by the first of them.

    Attributes:
        launches: What later calls repeat; None before the first, and where launches cannot be repeated.
    """

    _record: Callable[[Recorder, Call], None]

    def __init__(self) -> None:
        self.launches: Launches | None = None
        self._turns: bool | None = None

    def __call__(
        self,
        inputs: Sequence[Tensor],
        codes: Tensor,
        scales: Tensor,
        smooth: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        bias: Tensor | None,
        weight: str,
        group_size: int | None,
        path: str,
        shift: Sequence[float],
        gelu_from: int | None = None,
    ) -> Tensor:
        """The layer's output. Arguments as in `bittern.ops.few_bit_linear`."""
        if down is not None and up is not None and self._is_apart(down):
            y = self(inputs, codes, scales, smooth, None, None, bias, weight, group_size, path, shift)
            return reference.activated(with_branch(y, inputs, down, up), gelu_from)
        first = inputs[0]
        if self._turns is not False:
            given = (codes, scales, smooth, down, up, bias)
            codes, scales = contiguous_rows(codes), contiguous_rows(scales)
            smooth, down, up, bias = (None if t is None else contiguous_rows(t) for t in (smooth, down, up, bias))
            # Calls of one signature have strides in common: all of them want copies, which are recorded, or none does.
            self._turns = any(a is not b for a, b in zip(given, (codes, scales, smooth, down, up, bias), strict=True))
        out = first.new_empty((*first.shape[:-1], codes.shape[0]))
        low = self._low(inputs, down, up, weight, group_size, path)
        tensors = (*inputs, codes, scales, smooth, down, up, bias, low, out)
        if self.launches is not None:
            with on_device_of(first):
                if self.launches.repeat(tensors, first.device):
                    return out
        recorder = Recorder(tensors)
        layout = reference.layout_of(tuple(x.shape[-1] for x in inputs), group_size)
        columns = [segment.logical for segment in layout]
        call = Call(
            [recorder.part(x, x.reshape(-1, x.shape[-1])) for x in inputs],
            codes,
            scales,
            [None if smooth is None else recorder.part(smooth, smooth[part]) for part in columns],
            [None if down is None else recorder.part(down, down[:, part]) for part in columns],
            up,
            bias,
            tensors[-2],
            recorder.part(out, out.view(-1, codes.shape[0])),
            weight,
            layout,
            path,
            shift,
            gelu_from,
        )
        self._record(recorder, call)
        self.launches = recorder.launches() or self.launches
        return out

    def _is_apart(self, down: Tensor) -> bool:
        """Whether the branch is computed beside the kernels."""
        return is_apart(down)

    def _low(
        self,
        inputs: Sequence[Tensor],
        down: Tensor | None,
        up: Tensor | None,
        weight: str,
        group_size: int | None,
        path: str,
    ) -> Tensor | None:
        """The down-projected inputs [M, R] in float32, where no kernel projects them."""
        return None
