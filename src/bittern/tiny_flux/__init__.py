"""tiny-flux, the embedded model: a complete FluxPipeline trained on the scenes world, in 32 MB.

`pipeline/README.md` is its model card; `tools/train_tiny_flux.py` trained it.
"""

from __future__ import annotations

from pathlib import Path

NAME = "tiny-flux"


def path() -> Path:
    """The pipeline's folder, for `DiffusionPipeline.from_pretrained`."""
    return Path(__file__).parent / "pipeline"
