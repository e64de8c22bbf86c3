"""FLUX.1 and its fine-tunes: double blocks (image and text streams), then single blocks.

The embedders, `norm_out` and the final `proj_out` lie outside the blocks and keep 16 bits, as in SVDQuant.
"""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, Architecture, Block

FLUX = Architecture(
    name="flux",
    class_names=("FluxTransformer2DModel",),
    forward="bittern.architectures.flux_forward",
    outside={"x_embedder": FIRST, "*embed*": EMBEDDER, "norm_out.*": LAST, "proj_out": LAST},
    blocks=(
        Block(
            prefix="transformer_blocks.*",
            modulation=("norm1.linear", "norm1_context.linear"),
            groups=(
                ("attn.to_q", "attn.to_k", "attn.to_v"),
                ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            ),
            after_gelu={"ff.net.2": (0,), "ff_context.net.2": (0,)},
        ),
        Block(
            prefix="single_transformer_blocks.*",
            modulation=("norm.linear",),
            groups=(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),),
            segments={"proj_out": ("attn.to_v", "proj_mlp")},
            after_gelu={"proj_out": (1,)},
        ),
    ),
)
