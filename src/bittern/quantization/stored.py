"""A pipeline on disk that draws, its parts in memory one after another.

First the text encoders make of the prompts what the denoiser is to be told, and go. Then the denoiser comes, as far as
it fits the device (`trajectories.place`), and goes when a pass is recorded: layers are solved without it beside them,
unless the next ones are to be recorded behind them.
The host holds the weights that are being loaded, and then those that do not fit the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bittern.architectures import Plan
from bittern.errors import memory_size
from bittern.quantization.calibration import Progress, named
from bittern.quantization.memory import Limits
from bittern.quantization.workspace import SAMPLES, Workspace
from bittern.trajectories import State, Texts, choose, defaults, encode_texts, pack, place, run_on, sample, unpack
from bittern.trajectories.placement import weight_bytes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Stored:
    """Where a recorder gets a model that lies on disk.

    Args:
        pipeline: Loads a pipeline to the CPU with some components given, or left out as None.
        denoiser: Loads the denoiser to the CPU.
        blank: The denoiser on meta.
        name: Of the component that denoises.
        encoders: Names of the text encoders.
        plan: Tells the denoiser's blocks.
        prompts: To draw.
        samples: (prompt, step) pairs.
        seed: Of pairs and noise.
        device: Where to compute.
        limits: Of memory.
        beside: Bytes of the device that are needed while the denoiser is there.
        progress: Called as the work goes on.
    """

    def __init__(
        self,
        pipeline: Callable[[Mapping[str, Any]], DiffusionPipeline],
        denoiser: Callable[[], nn.Module],
        blank: nn.Module,
        name: str,
        encoders: Sequence[str],
        plan: Plan,
        *,
        prompts: Sequence[str],
        samples: int,
        seed: int,
        device: str | torch.device,
        limits: Limits,
        beside: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.load_pipeline, self.load_denoiser = pipeline, denoiser
        self.blank, self.name, self.encoders = blank, name, encoders
        self.plan, self.prompts, self.samples, self.seed = plan, prompts, samples, seed
        self.device, self.progress, self.room = torch.device(device), progress, limits.weights(plan.jobs, beside)
        self.texts: Texts = {}

    def prepare(self) -> None:
        """Encodes the prompts that will be drawn."""
        pipe = self.load_pipeline({self.name: self.blank})
        run_on(pipe, self.device)
        chosen = choose(len(self.prompts), defaults(pipe).steps, self.samples, self.seed)
        if self.progress:
            self.progress(f"encoding {len(chosen)} prompts", 0, len(chosen))
        for name in self.encoders:
            self._bring(getattr(pipe, name))
        self.texts = encode_texts(pipe, self.blank, {index: self.prompts[index] for index in chosen})
        del pipe
        self._tidy()

    def _bring(self, encoder: nn.Module) -> None:
        """An encoder to the device, or, of one that does not fit, its layers when they are called."""
        from accelerate import cpu_offload

        if self.room is not None and weight_bytes(encoder) > self.room:
            cpu_offload(encoder, execution_device=self.device)
        else:
            encoder.to(self.device)

    @contextmanager
    def denoiser(self) -> Generator[nn.Module]:
        """The model on its device, for as long as the context lasts."""
        from accelerate.hooks import remove_hook_from_submodules

        if self.progress:
            self.progress("loading the denoiser", 0, 1)
        model = self.load_denoiser()
        waiting = place(model, blocks_of(model, self.plan), self.device, self.room)
        if waiting and self.progress:
            self.progress(f"loading the denoiser, {memory_size(waiting)} of which wait on the host", 1, 1)
        try:
            yield model
        finally:
            # Whoever still holds the model holds no weights.
            remove_hook_from_submodules(model)
            nn.Module.to(model, "meta")
            self._tidy()

    def draw(self, model: nn.Module) -> list[State]:
        """Samples of trajectories, from texts that are encoded."""
        pipe = self.load_pipeline({self.name: model, **dict.fromkeys(self.encoders)})
        run_on(pipe, self.device)
        said = named(self.progress, "drawing trajectories")
        states = sample(pipe, model, self.prompts, self.samples, seed=self.seed, texts=self.texts, progress=said)
        self.texts = {}
        return states

    def _tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def keep_samples(workspace: Workspace, states: list[State]) -> None:
    """Keeps what was drawn beside the blocks, where JSON knows all that the denoiser was called with."""
    with suppress(TypeError):
        tensors, tree = pack(states)
        # A file has no tensors that overlap.
        workspace.save(SAMPLES, {name: tensor.clone() for name, tensor in tensors.items()}, {"states": tree})


def kept_samples(workspace: Workspace) -> list[State] | None:
    """What an earlier run has drawn."""
    if not workspace.has(SAMPLES):
        return None
    tensors, notes = workspace.load(SAMPLES)
    return unpack(tensors, notes["states"])


def blocks_of(model: nn.Module, plan: Plan) -> list[str]:
    """Paths of a model's blocks, none within another."""
    sites = (plan.architecture.site(path) for path, _ in model.named_modules())
    parents = dict.fromkeys(site.parent for site in sites if site is not None)
    return [path for path in parents if not any(path.startswith(f"{other}.") for other in parents)]
