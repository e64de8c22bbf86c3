"""The list of families, and the look-up by model class."""

from __future__ import annotations

from torch import nn

from bittern.architectures.base import Architecture
from bittern.architectures.flux import FLUX
from bittern.architectures.flux2 import FLUX2
from bittern.architectures.generic import FORWARD, discover
from bittern.architectures.ltx import LTX
from bittern.architectures.pixart import PIXART
from bittern.architectures.qwen_image import QWEN_IMAGE
from bittern.architectures.sana import SANA
from bittern.architectures.sd3 import SD3
from bittern.architectures.unet import UNET
from bittern.architectures.wan import WAN
from bittern.architectures.z_image import Z_IMAGE

ARCHITECTURES: tuple[Architecture, ...] = (FLUX, FLUX2, SD3, PIXART, SANA, QWEN_IMAGE, Z_IMAGE, UNET, WAN, LTX)


def known(class_name: str) -> Architecture | None:
    """The family that lists a diffusers class, such as a `config.json` names it; None if none does."""
    return next((family for family in ARCHITECTURES if class_name in family.class_names), None)


def of(model: nn.Module) -> Architecture:
    """The family of a model; of a class that no family lists, what its modules show by themselves.

    Raises:
        UserError: if it has no blocks that repeat.
    """
    return known(type(model).__name__) or discover(model)


def install(model: nn.Module) -> None:
    """Makes a model run layers that share an input as one, where its family knows how. Changes no tensor.

    Unlike `of` it asks nothing of the model, which may be on meta and few-bit already.
    """
    name = type(model).__name__
    (known(name) or Architecture(name, (name,), (), forward=FORWARD)).install(model)
