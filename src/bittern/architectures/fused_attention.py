"""Groups that run as one through diffusers' own door for fused projections, with no code of the attention changed.

Some attention classes of diffusers ask `to_qkv`, `to_kv`, `to_added_qkv` or `to_added_kv` for several projections at
once when `fused_projections` is set. There we put a module without tensors that calls the members of the group
together. Members that are not few-bit, wear adapters or have hooks are called one by one, with the same numbers.
"""

from __future__ import annotations

from diffusers.models.transformers.transformer_flux2 import Flux2Attention
from diffusers.models.transformers.transformer_wan import WanAttention
from jaxtyping import Float
from torch import Tensor, nn

from bittern.layers import stacked_linear

FLUX2 = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
WAN_SELF = {"to_qkv": ("to_q", "to_k", "to_v")}
WAN_CROSS = {"to_kv": ("to_k", "to_v"), "to_added_kv": ("add_k_proj", "add_v_proj")}


def install(model: nn.Module) -> None:
    """Lets every attention of a FLUX.2 or Wan model ask for its projections together."""
    for module in model.modules():
        if isinstance(module, Flux2Attention):
            _fuse(module, FLUX2)
        elif isinstance(module, WanAttention):
            _fuse(module, WAN_CROSS if module.is_cross_attention else WAN_SELF)


def _fuse(attn: Flux2Attention | WanAttention, doors: dict[str, tuple[str, ...]]) -> None:
    if attn.fused_projections:
        return
    for door, names in doors.items():
        if all(getattr(attn, name, None) is not None for name in names):
            setattr(attn, door, Together(attn, names))
    attn.fused_projections = True


class Together(nn.Module):
    """Linears of one attention that read one tensor, called as the single linear that diffusers would make of them."""

    def __init__(self, attn: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        # In a tuple, for the attention is no child of its child.
        self._attn, self.names = (attn,), names

    def forward(self, x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch n"]:
        """The outputs behind one another."""
        # Looked up at each call: an adapter takes a member's place.
        return stacked_linear([getattr(self._attn[0], name) for name in self.names], x)

    def extra_repr(self) -> str:
        """The members."""
        return ", ".join(self.names)
