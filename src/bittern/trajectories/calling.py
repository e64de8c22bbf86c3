"""How a pipeline wants to be called."""

from __future__ import annotations

import inspect as python_inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SIDES = ("height", "width")
SMALL_GUIDANCE = 5.0  # the best of 1, 2, 3 and 5 for tiny-unet, on training prompts: its training.json


@dataclass(frozen=True)
class CallDefaults:
    """How a pipeline wants to be called.

    Attributes:
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        steps: Denoising steps.
        max_sequence_length: Text tokens; None if the pipeline does not ask.
        guidance: Guidance scale; 0 for a model that was not trained with one.
        negative: What to guide away from, for a pipeline that guides by two calls only if it is told.
    """

    height: int
    width: int
    steps: int
    max_sequence_length: int | None
    guidance: float
    negative: str | None = None

    def options(self, steps: int | None = None) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call; `steps` in place of its own number."""
        options: dict[str, Any] = {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": steps or self.steps,
            "guidance_scale": self.guidance,
        }
        if self.max_sequence_length is not None:
            options["max_sequence_length"] = self.max_sequence_length
        if self.negative is not None:
            options["negative_prompt"] = self.negative
        return options


def defaults(pipe: DiffusionPipeline) -> CallDefaults:
    """Size, steps, text length and guidance that a pipeline was made for, from its components' configs."""
    call = python_inspect.signature(pipe.__call__).parameters
    size = _size(getattr(pipe, "vae", None))
    # The VAEs of videos and of the latest models know no size, and their pipelines' calls may.
    height, width = (size, size) if isinstance(size, int) else (call[side].default or 1024 for side in _SIDES)
    steps, guidance = _course(call, size, getattr(pipe, "transformer", None) or pipe.unet)
    length = None
    if "max_sequence_length" in call:
        tokenizer = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
        length = min(int(call["max_sequence_length"].default), int(tokenizer.model_max_length))
    # FLUX has the parameter, too, and by default does without.
    guides = "true_cfg_scale" in call and call["true_cfg_scale"].default > 1
    return CallDefaults(height, width, steps, length, guidance, " " if guides else None)


def steps_of(kind: type[DiffusionPipeline], vae: Any, denoiser: Any) -> int:
    """The denoising steps of `defaults`, of a pipeline that is not loaded.

    Args:
        kind: Its class.
        vae: A model with the VAE's config; None if there is none.
        denoiser: A model with the denoiser's.
    """
    return _course(python_inspect.signature(kind.__call__).parameters, _size(vae), denoiser)[0]


def _size(vae: Any) -> object:
    return 1024 if vae is None else vae.config.get("sample_size")


def _course(call: Mapping[str, python_inspect.Parameter], size: object, denoiser: Any) -> tuple[int, float]:
    """Steps and guidance."""
    steps, guidance = int(call["num_inference_steps"].default), float(call["guidance_scale"].default or 0.0)
    # A model that is shared among processes is of a class of its own.
    is_flux = any(kind.__name__.startswith("Flux") for kind in type(denoiser).__mro__)
    if is_flux and denoiser.config.get("guidance_embeds") is False:
        # FLUX.1-schnell was distilled to 4 steps.
        steps, guidance = 4, 0.0
    if isinstance(size, int) and size < 512:
        # A small model was not distilled. One that guides itself by leaving captions out is tiny-unet or like it.
        steps, guidance = 24, min(guidance, SMALL_GUIDANCE)
    return steps, guidance
