"""Drawing a picture again from what its file says.

A picture's low bits may depend on how many denoised together and on its place among them. So the batch is made up
again, of copies of the one picture, and the copy in its place is taken. The same model, versions and kind of device
then give the same bytes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from bittern.errors import UserError
from bittern.evaluation.drawing import DTYPE_NAMES, Drawing, Settings, artist, check_models
from bittern.evaluation.fidelity import psnr
from bittern.evaluation.generate import check_request, read_metadata
from bittern.ops import PATHS
from bittern.pipelines import Lora
from bittern.quantization import Progress

_NEEDED = ("model", "prompt", "seed", "steps", "size")


@dataclass(frozen=True)
class Replay:
    """A picture drawn again.

    Attributes:
        drawing: the new picture, as the only one.
        metadata: what the file said.
        identical: whether every pixel is the file's.
        psnr: dB to the file's picture; 100 at most.
        changed: what differs now from what the file said: versions, device, path and the like.
    """

    drawing: Drawing
    metadata: dict[str, str]
    identical: bool
    psnr: float
    changed: dict[str, tuple[str, str]]


def replay(
    file: Path, *, model: str | None = None, settings: Settings | None = None, progress: Progress | None = None
) -> Replay:
    """Draw a picture again.

    Args:
        file: a PNG that bittern wrote.
        model: another model to draw it with; by default the one that is named in the file.
        settings: the device; and what is to be other than in the file: steps, path, dtype, attention, LoRAs. The seed
            is always the file's.
        progress: called as the picture advances.

    Raises:
        UserError: if the file is no such PNG, or the model draws another size.
    """
    told = _read(file)
    given = settings or Settings()
    number, batch = _batch(told.get("batch", "1 of 1"), file)
    forced = told.get("forced", "auto")
    chosen = replace(
        given,
        seed=int(told["seed"]),
        steps=given.steps or int(told["steps"]),
        path=given.path or (forced if forced in PATHS else None),
        dtype=given.dtype or {name: dtype for dtype, name in DTYPE_NAMES.items()}.get(told.get("dtype", "")),
        attention=given.attention or _backend(told.get("attention", "torch")),
        batch_size=None,
        loras=given.loras or _loras(told.get("loras", "[]"), file),
        fuse=given.fuse or "fused" in told,
    )
    name = model or told["model"]
    check_request([told["prompt"]], chosen.seed, chosen.steps, None)
    check_models(name)
    with artist(name, chosen) as one:
        drawing = one.draw_one(told["prompt"], place=number - 1, batch=batch, progress=progress)
    if drawing.metadata(0)["size"] != told["size"]:
        raise UserError(
            f"{name} draws {drawing.metadata(0)['size']} pictures and {file} is {told['size']}: give the model it names"
        )
    before = _pixels(file)
    # A picture without LoRAs says nothing of them.
    was = {"loras": "[]", "fused": "no"} | told
    now = {"loras": "[]", "fused": "no"} | {key: str(value) for key, value in drawing.metadata(0).items()}
    changed = {key: (was[key], now[key]) for key in now if key in was and key != "batch" and was[key] != now[key]}
    return Replay(
        drawing=drawing,
        metadata=told,
        identical=torch.equal(before, drawing.images[0]),
        psnr=float(psnr(drawing.images, before[None])),
        changed=changed,
    )


def _read(file: Path) -> dict[str, str]:
    try:
        told = read_metadata(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"--replay {file} cannot be read ({error}): expected a PNG that bittern wrote") from error
    lacking = [key for key in _NEEDED if key not in told]
    if lacking:
        raise UserError(
            f"--replay {file} does not say its {lacking[0]}: expected a PNG as bittern wrote it, not converted"
        )
    for key in ("seed", "steps"):
        if not told[key].isdigit():
            raise UserError(f"--replay {file} says {key} {told[key]!r}: expected a whole number; draw it anew")
    return told


def _batch(text: str, file: Path) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4}) of (\d{1,4})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--replay {file} says batch {text!r}: expected one such as '3 of 16'; draw it anew")
    return int(match[1]), int(match[2])


def _loras(text: str, file: Path) -> tuple[Lora, ...]:
    try:
        return tuple(Lora(str(name), float(strength)) for name, strength in json.loads(text))
    except (ValueError, TypeError):
        raise UserError(f"--replay {file} says LoRAs {text!r}: expected files and strengths; draw it anew") from None


def _backend(name: str) -> str | None:
    """What to ask for: a model that asks torch directly, or its own default, needs nothing set."""
    return None if name in ("torch", "native") else name


def _pixels(file: Path) -> UInt8[Tensor, "3 h w"]:
    with Image.open(file) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
