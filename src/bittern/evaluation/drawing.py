"""A model's pictures together with everything one must know to draw them again."""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import UInt8
from torch import Tensor

import bittern
from bittern import layers, pipelines, quantization
from bittern.checkpoints.nunchaku import is_lite
from bittern.errors import UserError
from bittern.evaluation.generate import check_request, default_batch_size, generate
from bittern.integrations import attention, cuda_graphs
from bittern.quantization import Progress, component

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; None means the pipeline's own choice.

    Attributes:
        seed: prompt i starts from the noise of seed + i.
        steps: denoising steps.
        batch_size: pictures drawn together.
        path: arithmetic forced on every few-bit layer, such as "a4".
        device: where a model that is loaded by name runs.
        dtype: what a model that is loaded by name computes in; None for `pipelines.quick_dtype`.
        attention: one of diffusers' attention backends; None leaves every model its own.
        loras: for a model that is loaded by name.
        fuse: whether they are moved into the branches of its few-bit layers.
        cuda_graphs: whether the denoiser replays CUDA graphs; pixels are the same.
    """

    seed: int = 0
    steps: int | None = None
    batch_size: int | None = None
    path: str | None = None
    device: str = "cpu"
    dtype: torch.dtype | None = None
    attention: str | None = None
    loras: tuple[pipelines.Lora, ...] = ()
    fuse: bool = False
    cuda_graphs: bool = False


@dataclass(frozen=True)
class Drawing:
    """Pictures, one a prompt, and their provenance.

    Attributes:
        model: the name or folder that was asked for.
        prompts: what was asked for.
        images: RGB on the CPU.
        seed: of the first prompt's noise; the next prompt has the next seed.
        steps: denoising steps.
        paths: how many few-bit layers ran each arithmetic; empty for a 16-bit model.
        dtype: what the other layers compute in.
        device: the processor's name.
        seconds: spent drawing, loading excluded.
        inspection: sizes, and the few-bit layers with bits and errors.
        attention: the attention backend; "torch" for a model that asks torch directly.
        forced: the arithmetic that every few-bit layer was told to take, or "auto".
        batch_size: how many pictures denoised together, in the order of the prompts.
        loras: what was loaded for them.
        fused: whether that was in the branches of few-bit layers.
    """

    model: str
    prompts: list[str]
    images: UInt8[Tensor, "b 3 h w"]
    seed: int
    steps: int
    paths: dict[str, int]
    dtype: str
    device: str
    seconds: float
    inspection: quantization.Report
    attention: str
    forced: str = "auto"
    batch_size: int = 1
    loras: tuple[pipelines.Lora, ...] = ()
    fused: bool = False

    @property
    def path(self) -> str:
        """The arithmetic that ran, most layers first: "a8-int8+a16", or "bf16" for a model in 16 bits."""
        return path_name(self.paths, self.dtype)

    def metadata(self, index: int) -> dict[str, object]:
        """What a picture's file says about its making, all that it takes to draw it again."""
        height, width = self.images.shape[-2:]
        first = index - index % self.batch_size
        loras = {"loras": json.dumps([[lora.file, lora.strength] for lora in self.loras])} if self.loras else {}
        return {
            "model": self.model,
            **loras,
            **({"fused": "yes"} if self.fused else {}),
            "prompt": self.prompts[index],
            "seed": self.seed + index,
            "steps": self.steps,
            "size": f"{width}x{height}",
            "path": self.path,
            "forced": self.forced,
            "dtype": self.dtype,
            "device": self.device,
            "attention": self.attention,
            "batch": f"{index - first + 1} of {min(self.batch_size, len(self.prompts) - first)}",
            "bittern": bittern.__version__,
        }


class Artist:
    """A model that is loaded and set up, and draws as often as it is asked."""

    def __init__(self, pipe: DiffusionPipeline, settings: Settings, name: str, inspection: quantization.Report) -> None:
        self.pipe = pipe
        self._settings = settings
        self.name = name
        call = pipelines.defaults(pipe)
        self.size = (call.width, call.height)
        self.batch_size = settings.batch_size or default_batch_size(pipe, call.height * call.width)
        self._inspection = inspection

    def release(self) -> None:
        """Let go of the model; the artist draws no more."""
        del self.pipe

    def draw(self, prompts: Sequence[str], *, seed: int | None = None, progress: Progress | None = None) -> Drawing:
        """Draw every prompt; the first from the noise of `seed`, by default the settings'."""
        first = self._settings.seed if seed is None else seed
        return self._draw(prompts, range(first, first + len(prompts)), self.batch_size, progress)

    def draw_one(self, prompt: str, *, place: int, batch: int, progress: Progress | None = None) -> Drawing:
        """Draw the settings' seed once, as the picture at a place of a batch, which its copies fill.

        Args:
            prompt: what to draw.
            place: the picture's, from zero.
            batch: pictures in the batch.
            progress: called as the picture advances.
        """
        drawing = self._draw([prompt] * batch, [self._settings.seed] * batch, batch, progress)
        return replace(drawing, prompts=[prompt], images=drawing.images[place : place + 1], batch_size=1)

    def _draw(
        self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int, progress: Progress | None
    ) -> Drawing:
        pipe, settings = self.pipe, self._settings
        denoiser = component(pipe)
        began = time.perf_counter()
        images = generate(
            pipe,
            prompts,
            seeds=seeds,
            steps=settings.steps,
            batch_size=batch_size,
            progress=progress and (lambda what, done, total: progress(f"{what} with {self.name}", done, total)),
        )
        return Drawing(
            model=self.name,
            prompts=list(prompts),
            images=images,
            seed=seeds[0],
            steps=settings.steps or pipelines.defaults(pipe).steps,
            paths=layers.paths(denoiser),
            dtype=dtype_name(denoiser.dtype),
            device=device_name(pipe.device),
            seconds=time.perf_counter() - began,
            inspection=self._inspection,
            attention=attention.chosen(denoiser),
            forced=settings.path or "auto",
            batch_size=batch_size,
            loras=settings.loras,
            fused=settings.fuse,
        )


@contextmanager
def artist(
    model: str | DiffusionPipeline, settings: Settings | None = None, *, name: str | None = None
) -> Iterator[Artist]:
    """Load a model to draw with, and let it go again: one model in memory at a time.

    Args:
        model: a folder, a hub id, "tiny-flux", or a pipeline that is already loaded.
        settings: seed, steps and the rest.
        name: what to call the model; its folder or id by default.

    Raises:
        UserError: if the model or a LoRA cannot be loaded, the path does not exist there, or the attention does not run
            there.
    """
    settings = settings or Settings()
    name = name or (model if isinstance(model, str) else type(model).__name__)
    if settings.loras and not isinstance(model, str):
        raise UserError(f"LoRA {str(settings.loras[0])!r}: {name} is loaded already; use bittern.load_loras on it")
    for lora in settings.loras:
        pipelines.resolve_lora(lora.file)  # before a model is loaded for it
    if isinstance(model, str):
        folder = pipelines.resolve(model)
        pipe = _loaded(model, folder, settings)
        inspection = _inspected(folder, pipe)
    else:
        pipe, inspection = model, quantization.inspect(model)
    denoiser = component(pipe)
    try:
        with (
            _forced_path(denoiser, settings.path),
            attention.using(denoiser, settings.attention),
            cuda_graphs.using(denoiser, settings.cuda_graphs),
        ):
            one = Artist(pipe, settings, name, inspection)
            try:
                yield one
            finally:
                one.release()
    finally:
        del pipe, denoiser
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def draw(
    model: str | DiffusionPipeline,
    prompts: Sequence[str],
    settings: Settings | None = None,
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> Drawing:
    """Draw every prompt with a model that is loaded for it.

    Args:
        model: a folder, a hub id, "tiny-flux", or a pipeline that is already loaded.
        prompts: what to draw.
        settings: seed, steps and the rest.
        name: what to call the model; its folder or id by default.
        progress: called as the pictures advance.

    Raises:
        UserError: as `artist` does, and if a prompt is blank.
    """
    settings = settings or Settings()
    check_request(prompts, settings.seed, settings.steps, settings.batch_size)
    with artist(model, settings, name=name) as one:
        return one.draw(prompts, progress=progress)


def _inspected(folder: Path, pipe: DiffusionPipeline) -> quantization.Report:
    """What is drawn with: its files, if it computes in another dtype than theirs; else what it would be saved as."""
    place = pipelines.denoiser_folder(folder)
    cast = component(pipe).dtype != pipelines.folder_dtype(place)
    if cast and not is_lite(pipelines.read_json(place / "config.json")):
        return quantization.inspect(place)
    return quantization.inspect(pipe)


def _loaded(model: str, folder: Path, settings: Settings) -> DiffusionPipeline:
    dtype = settings.dtype or pipelines.quick_dtype(folder, settings.device)
    pipe = pipelines.load(model, dtype=dtype, device=settings.device)
    if settings.loras:
        pipelines.load_loras(pipe, settings.loras)
    if settings.fuse:
        bittern.fuse_loras(pipe)
    return pipe


@contextmanager
def _forced_path(model: torch.nn.Module, path: str | None) -> Iterator[None]:
    """Force an arithmetic for the time of the block; None leaves every layer its own."""
    before = {layer: layer.path for layer in layers.quant_layers(model).values()}
    if path is not None:
        layers.set_path(model, path)
    try:
        yield
    finally:
        for layer, own in before.items():
            layer.path = own


def check_models(*models: str | DiffusionPipeline | None) -> None:
    """Find every model that is given by name, before minutes are spent on drawing with the first.

    Raises:
        UserError: for a model that is not there.
    """
    for model in models:
        if isinstance(model, str):
            pipelines.resolve(model)


def path_name(paths: dict[str, int], dtype: str) -> str:
    """One word for the arithmetic that ran: the paths joined, most layers first; the dtype if there are none."""
    return "+".join(sorted(paths, key=lambda p: (-paths[p], p))) or dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype, such as "bf16"."""
    return DTYPE_NAMES.get(dtype, str(dtype))


def versions() -> dict[str, str]:
    """Versions of everything that can move a pixel."""
    import diffusers
    import transformers

    return {
        "bittern": bittern.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device | str) -> str:
    """The processor as a human knows it, such as "NVIDIA H100 80GB HBM3" or "CPU (Intel(R) Xeon(R) ...)"."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"CPU ({model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
