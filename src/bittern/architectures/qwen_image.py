"""Qwen-Image: double blocks of an image and a text stream."""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, Architecture, Block

QWEN_IMAGE = Architecture(
    name="qwen_image",
    class_names=("QwenImageTransformer2DModel",),
    forward="bittern.architectures.grouped_attention",
    outside={"img_in": FIRST, "txt_in": EMBEDDER, "*embed*": EMBEDDER, "norm_out.*": LAST, "proj_out": LAST},
    blocks=(
        Block(
            prefix="transformer_blocks.*",
            modulation=("img_mod.1", "txt_mod.1"),
            groups=(
                ("attn.to_q", "attn.to_k", "attn.to_v"),
                ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            ),
            after_gelu={"img_mlp.net.2": (0,), "txt_mlp.net.2": (0,)},
        ),
    ),
)
