"""FLUX.1 and its fine-tunes: double blocks (image and text streams), then single blocks.

The embedders, `norm_out` and the final `proj_out` lie outside the blocks and keep 16 bits, as in SVDQuant.
"""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, Architecture, Block, Modulated

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

FLUX = Architecture(
    name="flux",
    class_names=("FluxTransformer2DModel",),
    forward="bittern.architectures.flux_forward",
    conditioning="bittern.architectures.flux_conditioning",
    outside={"x_embedder": FIRST, "*embed*": EMBEDDER, "norm_out.*": LAST, "proj_out": LAST},
    blocks=(
        Block(
            prefix="transformer_blocks.*",
            modulation=("norm1.linear", "norm1_context.linear"),
            groups=(_QKV, _ADDED_QKV),
            after_gelu={"ff.net.2": (0,), "ff_context.net.2": (0,)},
            modulated={
                **dict.fromkeys(_QKV, Modulated("norm1.linear", shift=0, scale=1, chunks=6)),
                **dict.fromkeys(_ADDED_QKV, Modulated("norm1_context.linear", shift=0, scale=1, chunks=6)),
                "ff.net.0.proj": Modulated("norm1.linear", shift=3, scale=4, chunks=6),
                "ff_context.net.0.proj": Modulated("norm1_context.linear", shift=3, scale=4, chunks=6),
            },
        ),
        Block(
            prefix="single_transformer_blocks.*",
            modulation=("norm.linear",),
            groups=((*_QKV, "proj_mlp"),),
            segments={"proj_out": ("attn.to_v", "proj_mlp")},
            after_gelu={"proj_out": (1,)},
            modulated=dict.fromkeys((*_QKV, "proj_mlp"), Modulated("norm.linear", shift=0, scale=1, chunks=3)),
        ),
    ),
)
