"""What is trained, and the record of its training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from training.parts import TEXT_TOKENS

Say = Callable[[str], object]


@dataclass
class Progress:
    """What has been done so far, over all pieces."""

    samples: int = 0
    steps: int = 0
    seconds: float = 0.0
    vae_seconds: float = 0.0
    curve: list[dict] = field(default_factory=list)
    pieces: list[dict] = field(default_factory=list)


class Student(nn.Module, ABC):
    """What a script trains: a pipeline's denoiser and text encoders, as one module.

    Attributes:
        setting: the name of one number that is chosen when training ends, by the score on training prompts.
        choices: its candidates.
        chosen: its value.
        shifts: whether the pipeline knows a shift of its VAE's latents, beside their scale.
    """

    shifts = True
    setting: str
    choices: tuple[float, ...]
    chosen: float

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__()
        self.pipe = pipe
        # The encoders' own mask, ready made: building it copies from the host, which a CUDA graph cannot hold.
        masked = torch.full((1, 1, TEXT_TOKENS, TEXT_TOKENS), torch.finfo(torch.float32).min, device=pipe.device)
        self.register_buffer("causal_mask", masked.triu(1), persistent=False)

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The part that is stored in bf16."""

    @abstractmethod
    def read(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Captions as token tables [captions, tokens], one a tokenizer."""

    @abstractmethod
    def loss(self, clean: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """The training loss of clean latents [B, ...] and their captions' tokens."""

    @abstractmethod
    def compile_step(self) -> None:
        """Compiles what a step runs."""

    @abstractmethod
    def choose(self, value: float) -> None:
        """Sets `chosen`, in the pipeline too if it stores the setting."""

    def call_options(self) -> dict[str, Any]:
        """What the pipeline's call wants beside prompts, size, steps and noise."""
        return {}

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> the layout that the denoiser reads."""
        return latents


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    encoded = tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids
