"""Wan 2.1 and 2.2, video from text or an image: self-attention, and cross-attention to text and, for I2V, an image."""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, SHARED, Architecture, Block

WAN = Architecture(
    name="wan",
    class_names=("WanTransformer3DModel",),
    forward="bittern.architectures.grouped_attention",
    outside={
        "patch_embedding": FIRST,
        "condition_embedder.time_proj": SHARED,
        "condition_embedder.*": EMBEDDER,
        "proj_out": LAST,
    },
    blocks=(
        Block(
            prefix="blocks.*",
            groups=(
                ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                ("attn2.to_k", "attn2.to_v"),
                ("attn2.add_k_proj", "attn2.add_v_proj"),
            ),
            after_gelu={"ffn.net.2": (0,)},
        ),
    ),
)
