"""Where published weights lie, and how they are opened: as tensors only, and whole.

torch's own downloads go to `torch.hub`'s folder under names that end in the first digits of the file's SHA-256. Files
with such a name are opened only if the digits are right; no file is opened in a way that could run code from it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bittern.errors import UserError

OPTION = "--weights"
_DIGITS = re.compile(r"-([0-9a-f]{8})\.pth$")


class Absent(Exception):
    """Something that a measure needs is not here; the text says what, and how to bring it."""


def folder(given: Path | None) -> Path:
    """Where weights are looked for: the given folder, or torch's own for downloads.

    Raises:
        UserError: if a given folder is not there.
    """
    if given is None:
        return Path(torch.hub.get_dir()) / "checkpoints"
    if not given.expanduser().is_dir():
        raise UserError(f"{OPTION} {given}: there is no such folder; expected one with published weights in it")
    return given.expanduser()


def find(place: Path, name: str, address: str) -> Path:
    """A file of weights.

    Raises:
        Absent: if it is not there, with its address.
    """
    if not (place / name).is_file():
        raise Absent(f"{name} is not here: fetch {address} into {place}, or give its folder by {OPTION}")
    return place / name


def beside_package(names: Mapping[str, str]) -> Path | None:
    """The first file that an installed package has; packages are not imported.

    Args:
        names: a path in the package, by the package's name.
    """
    for package, name in names.items():
        spec = importlib.util.find_spec(package)
        file = Path(spec.origin).parent / name if spec and spec.origin else None
        if file is not None and file.is_file():
            return file
    return None


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, on the CPU, float32.

    Raises:
        UserError: if the file is damaged, not the published one, or holds anything but tensors.
    """
    digits = _DIGITS.search(file.name)
    if digits and not _sha256(file).startswith(digits[1]):
        raise UserError(f"{file} is not the file that was published: its SHA-256 does not begin with {digits[1]}")
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    # torch raises what it meets: pickle's errors, RuntimeError, OSError.
    except Exception as error:
        raise UserError(
            f"{file} cannot be read as weights ({str(error).splitlines()[0][:200]}): fetch it again"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise UserError(f"{file} holds something else than named tensors: fetch it again")
    return {str(name): value.float() if value.is_floating_point() else value for name, value in held.items()}


def take(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, Tensor]:
    """The tensors that a network needs.

    Raises:
        UserError: if one is missing or has another shape.
    """
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise UserError(f"{file}: expected {name} of shape {shape}, found {found}; fetch the published file")
    return {name: tensors[name] for name in shapes}


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
