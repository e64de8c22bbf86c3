"""QuantLinear: the tensors of one few-bit linear layer, behind the face of an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bittern import ops
from bittern.errors import UserError, did_you_mean
from bittern.layers.facade import FewBitWeight, Parts, refuse_writing
from bittern.scheme import Scheme

if TYPE_CHECKING:
    from bittern.layers.group import Group

LEAVES = ("codes", "scales", "smooth", "down", "up")
SHARED_LEAVES = ("smooth", "down")
"""What the members of a group have in common."""


class Solved(Protocol):
    """What a layer needs of a solver's solution; `None` where the scheme has no such tensor."""

    codes: Tensor
    scales: Tensor
    smooth: Tensor | None
    down: Tensor | None
    up: Tensor | None


class QuantLinear(nn.Linear):
    """A linear layer whose weight is few-bit codes, scales, smoothing and a low-rank branch.

    Isinstance of `nn.Linear`, so that peft and diffusers take it for one. The tensors are buffers `codes`,
    `scales`, `smooth`, `down`, `up` (None where the scheme has none). `.to(dtype)` never casts them: it sets
    `compute_dtype`, and casts the bias. `weight` is a `FewBitWeight`; a state dict holds it, too, and loading
    one ignores it.

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
        for leaf in LEAVES:
            shape, stored = shapes.get(leaf, (None, None))
            self.register_buffer(leaf, None if shape is None else torch.empty(shape, dtype=stored, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=self.compute_dtype)) if bias else None
        )
        self._path = "auto"
        self._choice: tuple[torch.device, ops.Choice] | None = None

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
    def from_solution(cls, linear: nn.Linear, scheme: Scheme, segments: Sequence[int], solution: Solved) -> Self:
        """A layer that takes the place of `linear`, on its device, with its bias."""
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, scheme, segments, False, "meta", weight.dtype)
        for leaf in layer.tensors():
            tensor = getattr(solution, leaf)
            layer.load(leaf, (scheme.format.pack(tensor) if leaf == "codes" else tensor).to(weight.device))
        layer.bias = linear.bias
        return layer.train(linear.training)

    def load(self, leaf: str, tensor: Tensor) -> None:
        """Fills one tensor.

        Args:
            leaf: "codes" (in the memory packing), "scales", "smooth", "down", "up" or "bias".
            tensor: Of the shape and dtype that the scheme says; a bias of any float dtype. On meta the layer
                takes it over, with its device, otherwise it copies it.

        Raises:
            UserError: naming what does not fit. A group's smooth and down are its first member's.
        """
        if leaf == "bias" and self.bias is not None:
            self._load_bias(tensor)
            return
        own = self.tensors()
        if leaf not in own:
            known = [*own, "bias"] if self.bias is not None else [*own]
            raise UserError(f"this layer has no tensor {leaf!r}: {did_you_mean(leaf, known)}")
        expected = own[leaf]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise UserError(
                f"{leaf} is {tensor.dtype} {list(tensor.shape)}: expected {expected.dtype} {list(expected.shape)}"
            )
        if not expected.is_meta:
            expected.copy_(tensor)
            return
        name, shape = self._buffer(leaf), self._held(leaf).shape
        if shape == tensor.shape:
            self.holder._buffers[name] = tensor.contiguous()
        else:
            self.holder._buffers[name] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            self.tensors()[leaf].copy_(tensor)

    def _load_bias(self, tensor: Tensor) -> None:
        if tensor.shape != self.bias.shape:
            raise UserError(f"bias has shape {list(tensor.shape)}: expected {list(self.bias.shape)}")
        if self.bias.is_meta:
            self.bias = nn.Parameter(tensor.to(self.bias.dtype), requires_grad=self.bias.requires_grad)
        else:
            self.bias.data.copy_(tensor)

    # ---- tensors

    @property
    def holder(self) -> QuantLinear:
        """The layer whose buffers hold this one's rows: itself, or the first of its group."""
        return self if self.group is None else self.group.members[0]

    def _buffer(self, leaf: str) -> str:
        """The name of the holder's buffer."""
        # Accelerate restores buffers from the state dict by name: those of other shapes need other names.
        return leaf if self.group is None else f"group_{leaf}"

    def _held(self, leaf: str) -> Any:
        """The holder's tensor, of all rows."""
        return self.holder._buffers[self._buffer(leaf)]

    def tensors(self) -> dict[str, Tensor]:
        """The layer's own tensors by leaf; a group's smooth and down are its first member's."""
        parts = vars(self.parts())
        hidden = SHARED_LEAVES if self.holder is not self else ()
        return {leaf: parts[leaf] for leaf in LEAVES if parts[leaf] is not None and leaf not in hidden}

    def parts(self) -> Parts:
        """All tensors that make up the weight, a group's shared ones included."""
        return Parts(self.scheme, self.segments, *self._stacked(*self.rows))

    @property
    def weight(self) -> Tensor:
        """The weight's shape, dtype and device, and its numbers on demand."""
        if torch.compiler.is_compiling():
            # A compiler cannot trace the facade; it drops an operation whose numbers nobody uses.
            return self.parts().dequantize(self.compute_dtype)
        return FewBitWeight(self.parts(), self.compute_dtype)

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_writing()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for every module, but that the weight is refused."""
        if name == "weight":
            refuse_writing()
        super().register_parameter(name, param)

    def _stacked(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The holder's tensors, of these rows."""
        codes, scales, smooth, down, up = map(self._held, LEAVES)
        if stop - start < codes.shape[0]:
            codes, scales, up = codes[start:stop], scales[start:stop], None if up is None else up[start:stop]
        return codes, scales, smooth, down, up

    # ---- computing

    def forward(self, x: Float[Tensor, "*batch k"] | Sequence[Tensor]) -> Float[Tensor, "*batch n"]:
        """The layer's output for an input, or for one input per K-segment."""
        return self.linear_rows(x, *self.rows, self.bias)

    def linear_rows(
        self, x: Float[Tensor, "*batch k"] | Sequence[Tensor], start: int, stop: int, bias: Tensor | None
    ) -> Float[Tensor, "*batch rows"]:
        """The outputs of these rows of the group's stacked weight; `forward` asks for the layer's own."""
        if not isinstance(x, Tensor):
            inputs = list(x)
        else:
            inputs = [x] if len(self.segments) == 1 else list(x.split(self.segments, dim=-1))
        return ops.few_bit_linear(
            inputs,
            *self._stacked(start, stop),
            bias,
            self.scheme.weight,
            self.scheme.group_size,
            self.choice(inputs[0].device).path,
            self.scheme.shift,
        )

    @property
    def path(self) -> str:
        """The arithmetic: "auto", or one of `ops.PATHS` that was forced."""
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        ops.choose_path(self.scheme, "cpu", path=path)
        self._path, self._choice = path, None
        self._choose()

    def choice(self, device: torch.device | None = None) -> ops.Choice:
        """The arithmetic that runs on a device, the layer's own unless one is given, and why."""
        device = device or self._held("codes").device
        if self._choice is None or self._choice[0] != device:
            self._choice = (device, ops.choose_path(self.scheme, device, path=self._path))
        return self._choice[1]

    def _choose(self) -> None:
        """Chooses now, so that a compiler meets a constant."""
        if not self._held("codes").is_meta:
            self.choice()

    # ---- what nn.Module would do with buffers and parameters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        held, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = held
        for name, buffer in held.items():
            if buffer is not None:
                # As bytes: a change of dtype is for floats and passes them by.
                moved = fn(buffer.view(torch.uint8))
                held[name] = moved.view(buffer.dtype) if moved.dtype == torch.uint8 else buffer.to(moved.device)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        self._choose()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for leaf, tensor in self.tensors().items():
            destination[prefix + leaf] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        # Diffusers' LoRA loader looks for this key.
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = [*self.tensors()] + ["bias"] * (self.bias is not None)
        for leaf in known:
            if prefix + leaf not in state_dict:
                missing_keys.append(prefix + leaf)
                continue
            try:
                self.load(leaf, state_dict[prefix + leaf])
            except UserError as error:
                error_msgs.append(f"{prefix}{leaf}: {error}")
        if strict:
            given = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
            unexpected_keys += [prefix + leaf for leaf in given if leaf not in known and leaf != "weight"]

    def extra_repr(self) -> str:
        """The shape, the numbers and the path."""
        scheme = self.scheme
        group = "per row" if scheme.group_size is None else f"g{scheme.group_size}"
        branch = f", rank={scheme.rank}" if scheme.rank else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{scheme.weight} {group}{branch}, activations={scheme.activations}, path={self._path}"
        )
