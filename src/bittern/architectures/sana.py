"""SANA: linear self-attention, cross-attention to the text, and an mlp of convolutions.

The mlp is a 1 x 1 convolution, a depthwise 3 x 3 one, which is kept, and another 1 x 1 one.
"""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, SHARED, Architecture, Block

SANA = Architecture(
    name="sana",
    class_names=("SanaTransformer2DModel",),
    forward="bittern.architectures.grouped_attention",
    outside={
        "patch_embed.*": FIRST,
        "time_embed.linear": SHARED,
        "time_embed.*": EMBEDDER,
        "caption_projection.*": EMBEDDER,
        "proj_out": LAST,
    },
    blocks=(
        Block(
            prefix="transformer_blocks.*",
            groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
        ),
    ),
)
