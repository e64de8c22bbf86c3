"""tiny-flux-ternary: tiny-flux with the transformer that was distilled to ternary weights.

The package holds the transformer alone; everything else is tiny-flux's.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from bittern import tiny_flux
from bittern.errors import UserError

NAME = "tiny-flux-ternary"
TRANSFORMER = "transformer"


def path() -> Path:
    """A folder for `DiffusionPipeline.from_pretrained`, put together of links for the time of this process.

    Raises:
        UserError: if this copy of bittern has no trained transformer.
    """
    return assembled(Path(__file__).parent / TRANSFORMER, tiny_flux.path())


@cache
def assembled(transformer: Path, pipeline: Path) -> Path:
    """A pipeline's folder with another transformer.

    Raises:
        UserError: if there is none.
    """
    if not (transformer / "config.json").is_file():
        raise UserError(
            f"{NAME} is not in this copy of bittern: make it with "
            "`bittern quantize tiny-flux --recipe ternary-distilled --out FOLDER`"
        )
    folder = Path(tempfile.mkdtemp(prefix="bittern-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    parts = {part.name: part for part in pipeline.iterdir() if part.name not in (TRANSFORMER, "README.md")}
    for name, part in {**parts, TRANSFORMER: transformer}.items():
        try:
            (folder / name).symlink_to(part.resolve(), target_is_directory=part.is_dir())
        except OSError:  # a system that allows no links
            copy = shutil.copytree if part.is_dir() else shutil.copyfile
            copy(part, folder / name)
    return folder
