"""Stable Diffusion 3 and 3.5: joint blocks of an image and a text stream; 3.5-medium has a second attention."""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, Architecture, Block

SD3 = Architecture(
    name="sd3",
    class_names=("SD3Transformer2DModel",),
    forward="bittern.architectures.grouped_attention",
    outside={"pos_embed.*": FIRST, "*embed*": EMBEDDER, "norm_out.*": LAST, "proj_out": LAST},
    blocks=(
        Block(
            prefix="transformer_blocks.*",
            modulation=("norm1.linear", "norm1_context.linear"),
            groups=(
                ("attn.to_q", "attn.to_k", "attn.to_v"),
                ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            ),
            after_gelu={"ff.net.2": (0,), "ff_context.net.2": (0,)},
        ),
    ),
)
