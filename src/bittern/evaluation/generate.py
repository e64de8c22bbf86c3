"""Drawing pictures so that two models can be compared: the same noise for the same prompt, always.

Prompt i gets its own generator on the CPU, seeded with `seed + i`. So the noise depends neither on the batch size nor
on the device nor on which model draws, and one picture of a set can be drawn again by itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from bittern import pipelines
from bittern.errors import BitternError, UserError
from bittern.quantization import Progress, component
from bittern.threads import is_small, one_thread

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Pictures that denoise together: a budget of pixels keeps small pictures quick and large ones in memory.
_PIXELS_PER_BATCH = {"cpu": 16 * 128 * 128, "cuda": 4 * 1024 * 1024}
_LARGEST_BATCH = 128
_LARGEST_SEED = 2**63 - 1


def check_request(prompts: Sequence[str], seed: int, steps: int | None, batch_size: int | None) -> None:
    """Refuse what cannot be drawn, before a model is loaded for it.

    Raises:
        UserError: without prompts, for a blank one, and for a number out of range.
    """
    if not prompts:
        raise UserError("no prompts: expected at least one; give a prompt or a file of prompts")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"prompt {index + 1} is empty: expected a text to draw; fill it in or leave it out")
    if not 0 <= seed <= _LARGEST_SEED - len(prompts):
        raise UserError(f"seed is {seed}: expected a whole number from 0 to {_LARGEST_SEED - len(prompts)}")
    for name, value in (("steps", steps), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: expected a whole number from 1 up; leave it out for the default")


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> UInt8[Tensor, "b 3 h w"]:
    """Draw one picture a prompt.

    Args:
        pipe: a diffusers pipeline; size, guidance and text length are its own (`pipelines.defaults`).
        prompts: what to draw, none of them blank.
        seed: prompt i starts from the noise of seed + i.
        seeds: the noise of every prompt, in place of seed, seed + 1 and so on.
        steps: denoising steps; the pipeline's own number by default.
        batch_size: pictures drawn together; by default as many as a budget of pixels allows.
        progress: called as pictures advance, in units of pictures.

    Returns:
        RGB pictures on the CPU, values 0 to 255.

    Raises:
        UserError: if a prompt is blank or a number is not positive.
        BitternError: if the pipeline draws a picture that is not a number.
    """
    seeds = range(seed, seed + len(prompts)) if seeds is None else seeds
    check_request(prompts, min(seeds, default=seed), steps, batch_size)
    call = pipelines.defaults(pipe)
    steps = steps or call.steps
    batch_size = batch_size or default_batch_size(pipe, call.height * call.width)
    options = call.options(steps) | {"output_type": "pt"}
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    drawn: list[Tensor] = []
    try:
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            generators = [torch.Generator("cpu").manual_seed(each) for each in seeds[start : start + len(batch)]]
            report = _step_reporter(progress, start, len(batch), steps, len(prompts))
            with one_thread(_is_small(pipe)):
                images = pipe(prompt=batch, generator=generators, callback_on_step_end=report, **options).images
            drawn.append(_to_uint8(images, batch))
    finally:
        pipe.set_progress_bar_config(**({"disable": False} | bar))
    return torch.cat(drawn)


def _is_small(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline runs on a CPU in steps so short that threads would mostly wait for each other."""
    return pipe.device.type == "cpu" and is_small(component(pipe))


def _step_reporter(
    progress: Progress | None, start: int, size: int, steps: int, total: int
) -> Callable[..., dict[str, Tensor]]:
    def report(_pipe: object, step: int, _time: object, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if progress:
            progress("drawing", start + size * (step + 1) / steps, total)
        return state

    return report


def default_batch_size(pipe: DiffusionPipeline, pixels: int) -> int:
    """Pictures of `pixels` pixels that denoise together on the pipeline's device."""
    device = "cpu" if pipe.device.type == "cpu" else "cuda"
    return max(1, min(_LARGEST_BATCH, _PIXELS_PER_BATCH[device] // pixels))


def _to_uint8(images: Tensor, prompts: Sequence[str]) -> UInt8[Tensor, "b 3 h w"]:
    images = images.float().cpu()
    for image, prompt in zip(images, prompts, strict=True):
        if not torch.isfinite(image).all():
            raise BitternError(f"the picture of '{prompt}' is not finite: the model overflows; try --dtype fp32")
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: UInt8[Tensor, "3 h w"]) -> Image.Image:
    """One picture as PIL knows it."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def png_info(metadata: Mapping[str, object]) -> PngInfo:
    """How a picture was made, as a PNG's text chunks, one a key."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value))
    return info


def save_png(image: UInt8[Tensor, "3 h w"], path: Path, metadata: Mapping[str, object]) -> None:
    """Write a PNG that carries how it was made as text chunks, one a key; atomic, as a whole or not at all.

    Raises:
        UserError: if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil(image).save(temporary, format="PNG", pnginfo=png_info(metadata))
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot write {path}: {reason}; choose a writable place for the picture") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG, as `save_png` wrote them."""
    with Image.open(path) as image:
        image.load()
        return {key: str(value) for key, value in getattr(image, "text", {}).items()}
