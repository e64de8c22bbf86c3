"""Pipelines by name: find them, load them, and call them as they were made to be called."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError
from torch import nn

from bittern import tiny_flux
from bittern.checkpoints import CheckpointConfig, is_few_bit
from bittern.checkpoints.nunchaku import is_lite
from bittern.errors import UserError, did_you_mean
from bittern.integrations.lora_files import Lora, load_files
from bittern.outputs import INDEX
from bittern.precision import multiplies
from bittern.quantization import inspect
from bittern.quantization.on_meta import model_on_meta
from bittern.quantization.preview import stored_dtype
from bittern.quantization.report import COMPONENTS
from bittern.trajectories import CallDefaults, defaults, steps_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "CallDefaults",
    "Lora",
    "check_device",
    "defaults",
    "load",
    "load_lora",
    "load_loras",
    "quick_dtype",
    "resolve",
    "resolve_lora",
]

BUILT_IN = {
    "tiny-flux": "bittern.tiny_flux",
    "tiny-unet": "bittern.tiny_unet",
    "tiny-flux-ternary": "bittern.tiny_flux_ternary",
}
"""The embedded models, and the modules that know where they lie."""


def resolve(model: str | Path) -> Path:
    """The local folder of a pipeline: a folder, an embedded model's name, or a hub id, which is downloaded.

    Raises:
        UserError: if there is no such folder, if it is no pipeline, or the hub does not give it.
    """
    name = str(model)
    path = Path(name).expanduser()
    if name in BUILT_IN:
        path = import_module(BUILT_IN[name]).path()
    if not path.exists():
        path = _download(name)
    if not path.is_dir():
        raise UserError(f"model {name!r} is a file: expected a pipeline folder, a hub id or {' or '.join(BUILT_IN)}")
    if not (path / INDEX).is_file():
        raise UserError(f"folder {name!r} is not a pipeline: expected {INDEX} in it")
    return path


def resolve_lora(lora: str | Path) -> Path:
    """The file or folder of a LoRA, for `load_lora_weights`: one that is there, or that of an embedded LoRA's name.

    Raises:
        UserError: if there is none.
    """
    path = Path(lora).expanduser()
    if path.exists():
        return path
    embedded = tiny_flux.loras()
    name = str(lora)
    if name in embedded:
        return embedded[name]
    if path.suffix or path.name != name:
        raise UserError(f"no LoRA {name!r} here: expected a .safetensors file, its folder, or {' or '.join(embedded)}")
    raise UserError(f"unknown LoRA {name!r}: {did_you_mean(name, embedded)}, or give a .safetensors file")


def load_loras(pipe: DiffusionPipeline, loras: Sequence[str | Path | Lora]) -> list[str]:
    """Loads LoRAs into a pipeline, few-bit or not, and makes them the active adapters.

    `pipe.load_lora_weights` does the same, and warns where this refuses.

    Args:
        pipe: The pipeline.
        loras: Files, embedded LoRAs' names, either with a strength behind it as in "ink.safetensors:0.8", or `Lora`
            objects.

    Returns:
        The adapters' names, made of the files'.

    Raises:
        UserError: if there is no such LoRA, a file is damaged, or it does not fit the pipeline as a whole; nothing is
            loaded then.
    """
    chosen = [lora if isinstance(lora, Lora) else Lora.parse(str(lora)) for lora in loras]
    return load_files(pipe, [(resolve_lora(lora.file), lora.strength) for lora in chosen])


def load_lora(pipe: DiffusionPipeline, lora: str | Path, strength: float = 1.0) -> None:
    """Loads one LoRA as `load_loras` does.

    Raises:
        UserError: as `load_loras` does.
    """
    load_loras(pipe, [Lora(str(lora), strength)])


def load(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> DiffusionPipeline:
    """Loads a pipeline.

    Args:
        model: A folder, a hub id, or an embedded model's name.
        dtype: What all layers but the few-bit ones compute in; None takes what the denoiser is stored in.
        device: Where to put it.

    Raises:
        UserError: for an unknown model, a folder that is no pipeline or is damaged, a device that is not there.
    """
    check_device(device)
    return load_with(model, {}, dtype).to(device)


def load_with(model: str | Path, parts: Mapping[str, Any], dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """A pipeline on the CPU with some components given, or left out as None."""
    folder = resolve(model)
    index = read_json(folder / INDEX)
    import diffusers

    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or not hasattr(diffusers, class_name):
        raise UserError(f"{folder / INDEX} names the pipeline class {class_name!r}, which diffusers does not have")
    stored = folder_dtype(folder / denoiser_name(folder))
    with one_line(f"model {str(model)!r}"):
        return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype or stored, **parts)


def check_device(device: str | torch.device) -> None:
    """Refuses a device that torch does not know or this machine does not have.

    Raises:
        UserError: naming the device.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is unknown: expected cpu, cuda or cuda:N") from None
    if wanted.type not in ("cpu", "cuda"):
        raise UserError(f"device {str(device)!r}: bittern runs on cpu, cuda or cuda:N")
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"device {str(device)!r}: torch finds no CUDA GPU here; use --device cpu")
        if (wanted.index or 0) >= count:
            raise UserError(f"device {str(device)!r}: expected cuda:0 to cuda:{count - 1}")


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UserError(f"no folder {name!r}: expected a pipeline folder, a hub id or {' or '.join(BUILT_IN)}")
    if "/" not in name:
        raise UserError(f"unknown model {name!r}: {did_you_mean(name, BUILT_IN)}, or give a folder or a hub id")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name))
    # The hub's client raises its own kinds, httpx's, requests' and OSError.
    except Exception as error:
        raise UserError(
            f"no folder {name!r} here, and the hub does not give a model of that name: {_first_line(error)}"
        ) from error


def denoiser_name(folder: Path) -> str:
    """The name of the component that denoises."""
    index = read_json(folder / INDEX)
    name = next((name for name in COMPONENTS if name in index), None)
    if name is None or not (folder / name / "config.json").is_file():
        raise UserError(f"{folder} has no {' or '.join(COMPONENTS)}: expected a whole pipeline; fetch it again")
    return name


def denoiser_folder(model: str | Path) -> Path:
    """Where the component that denoises lies, of a model as `resolve` takes it."""
    folder = resolve(model)
    return folder / denoiser_name(folder)


def steps_made_for(folder: Path, denoiser: nn.Module) -> int | None:
    """Denoising steps that a pipeline was made for, from its configs; None where they do not say.

    Args:
        folder: The pipeline's.
        denoiser: Its own, which may be on meta.
    """
    import diffusers

    kind = getattr(diffusers, str(read_json(folder / INDEX).get("_class_name")), None)
    file = folder / "vae" / "config.json"
    try:
        config = read_json(file) if file.is_file() else None
        vae = config and model_on_meta(str(config.get("_class_name")), config, torch.float32, str(file))
        return None if kind is None else steps_of(kind, vae, denoiser)
    except (UserError, KeyError):  # what cannot be loaded is told when it is
        return None


def other_components(folder: Path, denoiser: str) -> list[Path]:
    """The folders of the components that stay as they are, and the licence, which must travel with them."""
    index = read_json(folder / INDEX)
    # A component is [library, class]; [null, null] is one that the pipeline does without.
    listed = [name for name, value in index.items() if isinstance(value, list) and any(value) and name != denoiser]
    for name in listed:
        if not name.isidentifier():
            raise UserError(f"{folder / INDEX} lists {name!r}, which is no name of a component: fetch the model again")
        if not (folder / name).is_dir():
            raise UserError(f"{folder / INDEX} lists {name!r}, which is not there: fetch the model again")
    names = [name for name in listed if not name.startswith("_")]
    return [*(folder / name for name in names), *(file for file in folder.glob("LICENSE*") if file.is_file())]


def load_denoiser(model: str | Path, folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that denoises, by itself, on the CPU.

    Args:
        model: What a message calls the pipeline.
        folder: The model's own.
        dtype: What all layers but the few-bit ones compute in; None takes what they are stored in.

    Raises:
        UserError: for a class that diffusers has not, or a damaged folder.
    """
    import diffusers

    class_name = str(read_json(folder / "config.json").get("_class_name"))
    if not hasattr(diffusers, class_name):
        raise UserError(f"{folder / 'config.json'} names the class {class_name!r}, which diffusers does not have")
    stored = folder_dtype(folder)
    with one_line(f"model {str(model)!r}"):
        return getattr(diffusers, class_name).from_pretrained(folder, dtype=dtype or stored)


def folder_dtype(folder: Path) -> torch.dtype:
    """The float type of most bytes of a model's files, few-bit layers aside."""
    file = folder / "config.json"
    config = read_json(file)
    targets: Collection[str] = ()
    if is_few_bit(config):
        targets = CheckpointConfig.parse(config["quantization_config"], str(file)).targets
    return stored_dtype(folder, targets)


def quick_dtype(model: str | Path, device: str | torch.device) -> torch.dtype:
    """What a model that only draws had best compute in: what it is stored in, if the device has arithmetic for that.

    On a CPU with none for 16 bits it is float32, where the whole model in it takes at most half of the memory. A
    few-bit model counts as the one that it was made of, so that both are drawn with alike; one packed for Nunchaku
    Lite, whose headers do not tell that, is left as it is.

    Raises:
        UserError: for an unknown model, a folder that is no pipeline or is damaged.
    """
    place = denoiser_folder(model)
    stored = folder_dtype(place)
    if multiplies(device, stored) or is_lite(read_json(place / "config.json")):
        return stored
    room = psutil.virtual_memory().total // 2
    return torch.float32 if torch.float32.itemsize * inspect(place).parameters <= room else stored


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns what diffusers, transformers and peft say about damaged files into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(f"{what} cannot be loaded: {_first_line(error)}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a model.

    Raises:
        UserError: for a file that cannot be read, or holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({_first_line(error)}): fetch or write it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no mapping: fetch or write it again")
    return content


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
