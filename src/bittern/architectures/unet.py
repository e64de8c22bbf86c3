"""The U-Nets of Stable Diffusion 1 and 2 and of SDXL: transformers and residual blocks on every level.

`time_emb_proj` sees one row per image, as a modulation does. `conv_shortcut` and the resamplers read the residual
stream without a norm before them.
"""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, Architecture, Block

UNET = Architecture(
    name="unet",
    class_names=("UNet2DConditionModel",),
    forward="bittern.architectures.grouped_attention",
    outside={"conv_in": FIRST, "*embed*": EMBEDDER, "encoder_hid_proj*": EMBEDDER, "conv_out": LAST},
    blocks=tuple(
        block
        for level in ("down_blocks.*", "mid_block", "up_blocks.*")
        for block in (
            Block(
                prefix=f"{level}.attentions.*.transformer_blocks.*",
                groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
            ),
            # What is left of an attention: the linears or 1 x 1 convolutions around its transformer blocks.
            Block(prefix=f"{level}.attentions.*"),
            Block(prefix=f"{level}.resnets.*", modulation=("time_emb_proj",), stream=("conv_shortcut",)),
            Block(prefix=f"{level}.downsamplers.*", stream=("conv",)),
            Block(prefix=f"{level}.upsamplers.*", stream=("conv",)),
        )
    ),
)
