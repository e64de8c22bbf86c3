"""Z-Image: single-stream blocks over image and text, and refiner blocks of the same kind before them."""

from __future__ import annotations

from bittern.architectures.base import EMBEDDER, FIRST, LAST, Architecture, Block

Z_IMAGE = Architecture(
    name="z_image",
    class_names=("ZImageTransformer2DModel",),
    forward="bittern.architectures.grouped_attention",
    outside={"all_x_embedder.*": FIRST, "*embedder*": EMBEDDER, "all_final_layer.*": LAST},
    blocks=tuple(
        Block(
            prefix=f"{place}.*",
            modulation=("adaLN_modulation.0",),
            groups=(
                ("attention.to_q", "attention.to_k", "attention.to_v"),
                ("feed_forward.w1", "feed_forward.w3"),
            ),
        )
        for place in ("layers", "noise_refiner", "context_refiner", "siglip_refiner")
    ),
)
