"""tiny-unet, the embedded U-Net: a complete StableDiffusionPipeline trained on the scenes world, in 12 MB.

`pipeline/README.md` is its model card; `tools/train_tiny_unet.py` trained it.
"""

from __future__ import annotations

from pathlib import Path

NAME = "tiny-unet"


def path() -> Path:
    """The pipeline's folder, for `DiffusionPipeline.from_pretrained`."""
    return Path(__file__).parent / "pipeline"
