"""tiny-flux, the embedded model: a complete FluxPipeline trained on the scenes world, in 32 MB; and its LoRAs.

`pipeline/README.md` is its model card; `tools/train_tiny_flux.py` trained it. `loras/README.md` is that of the LoRAs,
which `tools/train_tiny_lora.py` trained.
"""

from __future__ import annotations

from pathlib import Path

NAME = "tiny-flux"


def path() -> Path:
    """The pipeline's folder, for `DiffusionPipeline.from_pretrained`."""
    return Path(__file__).parent / "pipeline"


def loras() -> dict[str, Path]:
    """The LoRAs that were trained for it, for `load_lora_weights`: the file of each name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "loras").glob("*.safetensors"))}
