"""FLUX.2: double blocks, then single blocks whose q, k, v and gated mlp are one linear in diffusers already.

The three modulation linears are the model's, not a block's, and are kept: 0.6 of 32 B weights.
"""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, REST, SHARED, Architecture, Block

FLUX2 = Architecture(
    name="flux2",
    class_names=("Flux2Transformer2DModel",),
    forward="bittern.architectures.grouped_attention",
    outside={
        "x_embedder": FIRST,
        "*embed*": EMBEDDER,
        "*modulation*": SHARED,
        "norm_out.*": LAST,
        "proj_out": LAST,
    },
    blocks=(
        Block(
            prefix="transformer_blocks.*",
            groups=(
                ("attn.to_q", "attn.to_k", "attn.to_v"),
                ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            ),
        ),
        # The attention's half of the concatenation is as wide as the block's output.
        Block(prefix="single_transformer_blocks.*", segments={"attn.to_out": ("attn.to_out", REST)}),
    ),
)
