"""What every few-bit layer is, linear or convolution: buffers of few bits behind the face of a dense weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from bittern import formats, ops
from bittern.errors import UserError, did_you_mean
from bittern.layers.facade import FewBitWeight, Parts, refuse_writing
from bittern.scheme import Scheme

LEAVES = ("codes", "scales", "smooth", "down", "up", "row_scales")
SHARED_LEAVES = ("smooth", "down")
"""What the members of a group have in common."""


class Solved(Protocol):
    """What a layer needs of a solver's solution; `None` where the scheme has no such tensor.

    `bias` is what to add to the layer's own, or its bias if it has none.
    """

    @property
    def codes(self) -> Tensor: ...  # noqa: D102
    @property
    def scales(self) -> Tensor: ...  # noqa: D102
    @property
    def smooth(self) -> Tensor | None: ...  # noqa: D102
    @property
    def down(self) -> Tensor | None: ...  # noqa: D102
    @property
    def up(self) -> Tensor | None: ...  # noqa: D102
    @property
    def bias(self) -> Tensor | None: ...  # noqa: D102


class FewBitLayer(nn.Module):
    """The tensors of a few-bit layer, and what `nn.Module` and other libraries may do with them.

    The tensors are buffers `codes`, `scales`, `smooth`, `down`, `up`, `row_scales` (None where the scheme has none).
    `.to(dtype)` never casts them: it sets `compute_dtype`, and casts the bias. `weight` is a `FewBitWeight`; a state
    dict holds it, too, and loading one ignores it.

    Attributes:
        scheme: The numbers of the layer.
        segments: Lengths of the K-segments.
        compute_dtype: Dtype that `weight` shows.
    """

    scheme: Scheme
    segments: tuple[int, ...]
    compute_dtype: torch.dtype
    bias: nn.Parameter | None

    def _hold(
        self,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        bias: tuple[int, ...] | None,
        device: torch.device | str | None,
    ) -> None:
        """Registers empty buffers of these shapes and a bias, and chooses no arithmetic yet."""
        for leaf in LEAVES:
            shape, stored = shapes.get(leaf, (None, None))
            self.register_buffer(leaf, None if shape is None else torch.empty(shape, dtype=stored, device=device))
        empty = None if bias is None else torch.empty(bias, device=device, dtype=self.compute_dtype)
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        self._path = "auto"
        self._choice: tuple[torch.device, ops.Choice] | None = None

    def _take(self, module: nn.Linear | nn.Conv2d, solution: Solved) -> Self:
        """Fills a layer on meta from a solution; the mode and, but for what is added, the bias are the module's."""
        tensors = {leaf: getattr(solution, leaf) for leaf in LEAVES if leaf != "row_scales"}
        if self.scheme.format.has_row_scales:
            layout = self.scheme.layout(self.segments)
            tensors["scales"], tensors["row_scales"] = formats.nvfp4.split(solution.scales, layout)
        for leaf in self.tensors():
            tensor = tensors[leaf]
            self.load(leaf, (self.scheme.format.pack(tensor) if leaf == "codes" else tensor).to(module.weight.device))
        self.bias = module.bias
        if solution.bias is not None:
            whole = solution.bias if module.bias is None else module.bias.detach().float() + solution.bias
            dtype = self.compute_dtype if module.bias is None else module.bias.dtype
            self.bias = nn.Parameter(whole.to(dtype), requires_grad=module.weight.requires_grad)
        return self.train(module.training)

    def load(self, leaf: str, tensor: Tensor) -> None:
        """Fills one tensor.

        Args:
            leaf: "codes" (in the memory packing), "scales", "smooth", "down", "up", "row_scales" or "bias".
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
        if leaf == "codes":
            self._choose()

    def _load_bias(self, tensor: Tensor) -> None:
        if tensor.shape != self.bias.shape:
            raise UserError(f"bias has shape {list(tensor.shape)}: expected {list(self.bias.shape)}")
        if self.bias.is_meta:
            self.bias = nn.Parameter(tensor.to(self.bias.dtype), requires_grad=self.bias.requires_grad)
        else:
            self.bias.data.copy_(tensor)

    # ---- tensors

    @property
    def holder(self) -> FewBitLayer:
        """The layer whose buffers hold this one's rows: itself, unless it is one of a group."""
        return self

    def _buffer(self, leaf: str) -> str:
        """The name of the holder's buffer."""
        return leaf

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
        return Parts(self.scheme, self.segments, *map(self._held, LEAVES))

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

    def numbers(self) -> str:
        """The scheme and the path, for people."""
        scheme = self.scheme
        group = "per row" if scheme.group_size is None else f"g{scheme.group_size}"
        branch = f", rank={scheme.rank}" if scheme.rank else ""
        return f"{scheme.weight} {group}{branch}, activations={scheme.activations}, path={self._path}"
