"""The models that judge pictures: from a folder, or from the hub where there is a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.errors import UserError
from bittern.quantization.workspace import fingerprint

if TYPE_CHECKING:
    from PIL import Image

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_PATIENCE = 10.0  # seconds for the hub to say that it is there; its client's own retries take minutes


def locate(model: str, option: str) -> Path:
    """The local folder of a model.

    Args:
        model: a folder, or a hub id, which is taken from the hub's cache or downloaded.
        option: the option it was given with, for the message.

    Raises:
        UserError: if it is neither here nor to be had, with the way to bring it.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"{option} {model}: expected a folder with config.json in it, as save_pretrained writes it")
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f"{option} {model}: there is no such folder; expected a model's folder or a hub id")
    from huggingface_hub import HfApi, snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True, allow_patterns=_FILES))
    # The hub's client raises its own kinds, httpx's and OSError.
    except Exception:
        pass
    try:
        HfApi().model_info(model, timeout=_PATIENCE)
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"the weights of {model} are not here and the hub does not give them ({reason[:200]}): where there is a "
            f"network run `hf download {model} --local-dir FOLDER`, bring the folder and add {option} FOLDER"
        ) from error


def identity(folder: Path) -> str:
    """A hash that changes with a model's files."""
    return fingerprint(sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".txt")))


def load(kind: type, folder: Path, option: str, **options: Any) -> Any:
    """What `from_pretrained` makes of a local folder.

    Raises:
        UserError: if the folder is damaged or holds something else.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)  # type: ignore[attr-defined]
    # transformers raises what it meets: OSError, ValueError, KeyError, safetensors' own.
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{option} {folder} cannot be loaded as {kind.__name__}: {reason[:300]}") from error


def read_json(file: Path) -> dict[str, Any]:
    """An object in a model's folder; empty if the file is not there or holds something else.

    Raises:
        UserError: if it cannot be read.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): fetch the model again") from error
    return value if isinstance(value, dict) else {}


def check_kind(folder: Path, option: str, kinds: Sequence[str], example: str) -> None:
    """Refuses a model of another architecture, by its config alone.

    Raises:
        UserError: naming what it is, and a model that would do.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise UserError(f"{option} {folder} is a {kind!r}: expected a {' or '.join(kinds)} such as {example}")


def load_model(kind: type, folder: Path, option: str, device: str) -> Any:
    """A model in float32 for inference; only safetensors are opened.

    Raises:
        UserError: as `load`, for weights in another format, and for weights that do not fit the config, which
            transformers would draw at random.
    """
    import torch

    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{option} {folder} cannot be loaded: it has no .safetensors, the only weights that are opened; load it "
            "with transformers where it was fetched, and write it again with save_pretrained"
        )
    model, told = load(kind, folder, option, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    missing = sorted(told["missing_keys"])
    if missing:
        raise UserError(f"{option} {folder} lacks {len(missing)} tensors such as {missing[0]}: fetch it again")
    return model.eval().requires_grad_(False).to(device)


def open_rgb(file: Path) -> Image.Image:
    """A picture as RGB.

    Raises:
        UserError: if it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"picture {file} cannot be read ({error}): draw or fetch it again") from error
