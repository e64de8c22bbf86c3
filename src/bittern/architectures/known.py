"""The list of families, and the look-up by model class."""

from __future__ import annotations

from torch import nn

from bittern.architectures.base import Architecture
from bittern.architectures.flux import FLUX
from bittern.errors import UserError, did_you_mean

ARCHITECTURES: tuple[Architecture, ...] = (FLUX,)


def of(model: nn.Module) -> Architecture:
    """The family of a model.

    Raises:
        UserError: for a class that no family lists.
    """
    return of_class(type(model).__name__)


def of_class(class_name: str) -> Architecture:
    """The family of a diffusers class name, such as a `config.json` gives it.

    Raises:
        UserError: for a class that no family lists.
    """
    by_class = {name: family for family in ARCHITECTURES for name in family.class_names}
    if class_name not in by_class:
        raise UserError(f"model class {class_name!r} is not known: {did_you_mean(class_name, by_class)}")
    return by_class[class_name]
