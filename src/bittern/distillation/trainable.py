"""Few-bit layers that learn: what the deployed layer computes, with gradients to all that it is made of.

A deployed weight is What / s + U D with What = codes · scales. Here the codes are the nearest ones to float numbers in
units of a code (*latents*), and the gradient passes the rounding as if it were not there (straight-through, Bengio et
al. 2013, arXiv:1308.3432). A scale is the start's times e^gain, rounded to its stored type: its steps are relative, and
it keeps its sign. Codes do not depend on scales, so that a scale's gradient is exact. Rounding is the format's own:
`export` gives codes and scales that make the same weight to the last bit.

Codes that are not to learn stay packed, as the deployed layer has them, and are unpacked in each pass.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bittern.formats import dtype_of
from bittern.layers import FewBitLayer, QuantConv2d, flat_weight

# A latent this near to the border between two codes would cross it by rounding alone.
_MARGIN = 1e-3


class TrainableLayer(nn.Module):
    """The numbers of one few-bit layer as parameters.

    Attributes:
        latent: [N, K] float32, in units of a code; None for codes that stay.
        packed: [N, bytes] uint8, the codes that stay; None for codes that learn.
        gain: [N, groups] float32, logarithms of what the scales have grown by.
        up: [N, R] or None; the second factor of the low-rank branch.
        bias: [N] or None.
    """

    latent: nn.Parameter | None
    packed: Tensor | None
    base: Tensor
    smooth: Tensor | None
    down: Tensor | None

    def _hold(self, module: nn.Linear | nn.Conv2d, few_bit: FewBitLayer, reach: float | None) -> Self:
        """Takes the start from a solved layer, and where between the codes its numbers lie from the dense weight.

        Without a reach the codes stay.
        """
        scheme = few_bit.scheme
        self.scheme, self.segments, self.layout = scheme, few_bit.segments, scheme.layout(few_bit.segments)
        # Plain numbers, which a compiler takes for constants.
        self.lowest, self.highest = scheme.format.code_min, scheme.format.code_max
        self.scale_dtype = dtype_of(scheme.scale_dtype)
        self.groups = [(s.groups.start, s.groups.stop, s.size, s.padding) for s in self.layout]
        parts = few_bit.parts()
        scales = parts.scales.float()
        taps = len(self.segments) if isinstance(module, nn.Conv2d) else 1
        smooth = None if parts.smooth is None else parts.smooth.float().repeat(taps)
        down, up = (None if t is None else t.float() for t in (parts.down, parts.up))
        latent = None
        if reach is not None:
            target = flat_weight(module).detach().float()
            if down is not None and up is not None:
                target = target - up @ down
            if smooth is not None:
                target = target * smooth
            spread = self._spread(scales)
            ratio = target / torch.where(spread == 0, torch.inf, spread)
            chosen = self._unpacked(parts.codes)
            latent = ratio.clamp(self.lowest - reach, self.highest + reach)
            # A solver that knows more than the weight may have chosen other codes than the nearest.
            near = latent.clamp(chosen - 0.5 + _MARGIN, chosen + 0.5 - _MARGIN)
            latent = torch.where(latent.round().clamp(self.lowest, self.highest) == chosen, latent, near)
        self.register_parameter("latent", None if latent is None else nn.Parameter(latent))
        self.register_buffer("packed", parts.codes.clone() if latent is None else None)
        self.gain = nn.Parameter(torch.zeros_like(scales))
        self.register_buffer("base", scales)
        self.register_buffer("smooth", smooth)
        self.register_buffer("down", down)
        self.register_parameter("up", None if up is None else nn.Parameter(up))
        bias = few_bit.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().float().clone()))
        return self

    def _spread(self, scales: Float[Tensor, "n groups"]) -> Float[Tensor, "n k"]:
        """Each scale over the inputs of its group, or broadcastable to that."""
        if scales.shape[1] == 1:
            return scales
        parts: list[Tensor] = []
        for start, stop, size, padding in self.groups:
            part = scales[:, start:stop, None].expand(-1, -1, size).flatten(1)
            parts.append(part[:, : part.shape[1] - padding])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def scales(self) -> Float[Tensor, "n groups"]:
        """The scales as they are stored, with gradients to `gain`."""
        scales = self.base * self.gain.exp()
        stored = scales.detach().to(self.scale_dtype).float()
        # Exactly the stored number: what is added is exactly zero.
        return stored + (scales - scales.detach())

    def _unpacked(self, packed: Tensor) -> Float[Tensor, "n k"]:
        return self.layout.unpad(self.scheme.format.unpack(packed, self.layout.padded_k)).float()

    def _codes(self) -> Float[Tensor, "n k"]:
        """The codes, with gradients to the latents if they learn."""
        if self.latent is None:
            assert self.packed is not None
            return self._unpacked(self.packed)
        codes = self.latent.detach().round().clamp(self.lowest, self.highest)
        return codes + (self.latent - self.latent.detach())

    def flat(self) -> Float[Tensor, "n k"]:
        """The weight that the layer applies, a kernel as [N, kh, kw, C], with gradients to the parameters."""
        weight = self._codes() * self._spread(self.scales())
        if self.smooth is not None:
            weight = weight / self.smooth
        if self.up is not None and self.down is not None:
            weight = weight + self.up @ self.down
        return weight

    @torch.no_grad()
    def export(self, few_bit: FewBitLayer) -> None:
        """Writes codes, scales, second factor and bias into the deployed layer."""
        if self.latent is not None:
            codes = self.latent.round().clamp(self.lowest, self.highest).to(torch.int8)
            few_bit.load("codes", self.scheme.format.pack(self.layout.pad(codes)))
        few_bit.load("scales", self.scales().to(self.scale_dtype))
        if self.up is not None:
            few_bit.load("up", self.up.detach().to(dtype_of(self.scheme.branch_dtype)))
        if self.bias is not None:
            few_bit.load("bias", self.bias.detach())


class TrainableLinear(TrainableLayer):
    """A linear layer."""

    def forward(self, x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch n"]:
        """The layer's output, its activations in full precision."""
        return nn.functional.linear(x, self.flat(), self.bias)


class TrainableConv2d(TrainableLayer):
    """A convolution."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n ho wo"]:
        """The layer's output, its activations in full precision."""
        weight = self.flat().unflatten(1, (*self.kernel_size, -1)).permute(0, 3, 1, 2)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


def trainable(module: nn.Linear | nn.Conv2d, few_bit: FewBitLayer, reach: float | None) -> TrainableLayer:
    """A layer that learns, from the dense one and the one that a solver made of it; its codes stay without a reach."""
    layer: Any
    if isinstance(few_bit, QuantConv2d):
        layer = TrainableConv2d()
        for name in ("kernel_size", "stride", "padding", "dilation"):
            setattr(layer, name, getattr(few_bit, name))
    else:
        layer = TrainableLinear()
    return cast(TrainableLayer, layer._hold(module, few_bit, reach))
