"""FLUX blocks that run what shares an input as one layer, and write neither the concatenated input of `proj_out` nor
what goes into a GELU.

The attention processor and the single block of diffusers call q, k, v (and `proj_mlp`) one by one: each would
smooth, quantize and project the same tensor down again. Ours ask `group_linear` for all at once. Wherever
something else has been put in place (another processor, adapters, hooks), diffusers' own code runs, which gives
the same numbers in more steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models import activations
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from jaxtyping import Float
from torch import Tensor, nn

from bittern.architectures.stand_ins import enlist, replace_class
from bittern.layers import QuantLinear, group_linear, is_unhooked
from bittern.ops import rotary_heads


class Stream(NamedTuple):
    """Queries, keys and values of one stream of tokens by head, with what normalizes the first two."""

    q: Float[Tensor, "b l h d"]
    k: Float[Tensor, "b l h d"]
    v: Float[Tensor, "b l h d"]
    norm_q: nn.RMSNorm
    norm_k: nn.RMSNorm

    @classmethod
    def of(cls, attn: FluxAttention, qkv: Sequence[Tensor], norm_q: str, norm_k: str) -> Stream:
        """From the outputs of the three projections, and the names of the attention's norms."""
        q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv)
        return cls(q, k, v, getattr(attn, norm_q), getattr(attn, norm_k))

    @property
    def is_plain(self) -> bool:
        """Whether the norms are what they are in every FLUX that diffusers makes: nobody else's, and not hooked."""
        norms: tuple[Any, ...] = self.norm_q, self.norm_k
        return all(
            type(norm) is nn.RMSNorm
            and norm.weight is not None
            and norm.eps is not None
            and norm.eps == self.norm_q.eps
            # Accelerate brings weights from elsewhere by a `forward` of its own.
            and is_unhooked(norm)
            for norm in norms
        )


def install(model: nn.Module) -> None:
    """Puts our processor, single block and GELU in the place of diffusers' own, which are kept if they are others."""
    for module in model.modules():
        if isinstance(module, FluxAttention) and type(module.processor) is FluxAttnProcessor:
            module.set_processor(GroupedAttention())
        elif type(module) is transformer_flux.FluxSingleTransformerBlock:
            replace_class(module, FluxSingleTransformerBlock)
        elif type(module) is activations.GELU and module.approximate == "tanh":
            replace_class(module, GELU)


class GELU(activations.GELU):
    """A feed-forward's first half, the layer and the GELU in one."""

    def forward(self, hidden_states: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch n"]:
        """The activated outputs."""
        if isinstance(self.proj, QuantLinear):
            return self.proj.with_gelu(hidden_states)
        return super().forward(hidden_states)


class GroupedAttention(FluxAttnProcessor):
    """Joint attention whose projections of one tensor run together."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Float[Tensor, "b l k"],
        encoder_hidden_states: Float[Tensor, "b t k"] | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The update of the image stream, or of the image and the text stream."""
        image = Stream.of(attn, group_linear((attn.to_q, attn.to_k, attn.to_v), hidden_states), "norm_q", "norm_k")
        if encoder_hidden_states is None:
            return self.attend([image], image_rotary_emb, attention_mask)
        added = group_linear((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), encoder_hidden_states)
        text = Stream.of(attn, added, "norm_added_q", "norm_added_k")
        both = self.attend([text, image], image_rotary_emb, attention_mask)
        tokens = encoder_hidden_states.shape[1]
        to_out, dropout = attn.to_out
        return dropout(to_out(both[:, tokens:])), attn.to_add_out(both[:, :tokens])

    def attend(
        self, streams: Sequence[Stream], rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None = None
    ) -> Float[Tensor, "b l n"]:
        """Attention of streams, one after the other, by whatever backend diffusers was told to use."""
        alike = all(stream.is_plain and stream.norm_q.eps == streams[0].norm_q.eps for stream in streams)
        if rotary is not None and alike:
            q, k = rotary_heads(
                [stream.q for stream in streams],
                [stream.k for stream in streams],
                [stream.norm_q.weight for stream in streams],
                [stream.norm_k.weight for stream in streams],
                streams[0].norm_q.eps,
                *rotary,
            )
        else:
            q = torch.cat([stream.norm_q(stream.q) for stream in streams], dim=1)
            k = torch.cat([stream.norm_k(stream.k) for stream in streams], dim=1)
            if rotary is not None:
                q, k = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (q, k))
        v = streams[0].v if len(streams) == 1 else torch.cat([stream.v for stream in streams], dim=1)
        out = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out.flatten(2, 3).to(q.dtype)


# Diffusers finds repeated blocks, and blocks not to split between devices, by the name of their class.
class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """A single block with one layer for q, k, v and mlp, and an output layer that reads two tensors."""

    def forward(
        self,
        hidden_states: Float[Tensor, "b l k"],
        encoder_hidden_states: Float[Tensor, "b t k"],
        temb: Float[Tensor, "b k"],
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The text and the image stream after the block."""
        if joint_attention_kwargs or not self._is_ours():
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        attn, tokens = self.attn, encoder_hidden_states.shape[1]
        stream = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x, gate = self.norm(stream, emb=temb)
        *qkv, mlp = group_linear((attn.to_q, attn.to_k, attn.to_v, self.proj_mlp), x, gelus=1)
        attended = attn.processor.attend([Stream.of(attn, qkv, "norm_q", "norm_k")], image_rotary_emb)
        # What peft puts around a layer reads one tensor.
        both = [attended, mlp] if isinstance(self.proj_out, QuantLinear) else torch.cat([attended, mlp], dim=-1)
        stream = stream + gate.unsqueeze(1) * self.proj_out(both)
        if stream.dtype == torch.float16:
            stream = stream.clip(-65504, 65504)
        text, image = stream[:, :tokens], stream[:, tokens:]
        if not torch.compiler.is_compiling():
            return text, image
        # The first block's inputs are no slices. To a compiler strides are part of a graph: it would make one more.
        # It writes copies in place of the sum. For one image `contiguous` would keep the slice and its stride.
        whole = torch.contiguous_format
        return text.clone(memory_format=whole), image.clone(memory_format=whole)

    def _is_ours(self) -> bool:
        attn, act = self.attn, self.act_mlp
        layer = getattr(self.proj_out, "base_layer", self.proj_out)
        ours = type(attn.processor) is GroupedAttention and isinstance(layer, QuantLinear)
        tanh = getattr(act, "approximate", None) == "tanh"
        return ours and tanh and is_unhooked(attn) and is_unhooked(act)


enlist(FluxSingleTransformerBlock, transformer_flux.FluxSingleTransformerBlock)
enlist(GroupedAttention, FluxAttnProcessor)
