"""LTX-Video: self-attention, cross-attention to the text, and one modulation for all blocks."""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, SHARED, Architecture, Block

LTX = Architecture(
    name="ltx",
    class_names=("LTXVideoTransformer3DModel",),
    forward="bittern.architectures.grouped_attention",
    outside={
        "proj_in": FIRST,
        "time_embed.linear": SHARED,
        "time_embed.*": EMBEDDER,
        "caption_projection.*": EMBEDDER,
        "proj_out": LAST,
    },
    blocks=(
        Block(
            prefix="transformer_blocks.*",
            groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
            after_gelu={"ff.net.2": (0,)},
        ),
    ),
)
