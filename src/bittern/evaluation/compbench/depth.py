"""How near everything in a picture is, by a depth model from transformers.

The published scorer takes MiDaS' DPT. Models that tell *nearness* without a unit, as it does, can stand in for it;
those that tell metres, where more is further off, are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from bittern.errors import UserError
from bittern.evaluation import hosted
from bittern.evaluation.clip import to_pixels
from bittern.precision import exact_products
from bittern.threads import is_small, one_thread

if TYPE_CHECKING:
    from PIL import Image

DEFAULT = "depth-anything/Depth-Anything-V2-Small-hf"
OPTION = "--depth"
_KINDS = ("depth_anything", "dpt")
# DPT's own; a folder's preprocessor_config.json may say otherwise.
_SIDE = 384
_MEAN = _SPREAD = (0.5, 0.5, 0.5)


class Depth:
    """A depth model.

    Args:
        network: transformers' DPT or Depth Anything.
        prepare: how its pictures are prepared: "size", "image_mean" and "image_std".
    """

    def __init__(self, network: Any, prepare: dict[str, Any]) -> None:
        self.network = network
        size = prepare.get("size") or _SIDE
        self._side = int(size.get("height", _SIDE) if isinstance(size, dict) else size)
        self._mean, self._spread = prepare.get("image_mean") or _MEAN, prepare.get("image_std") or _SPREAD
        self._small = is_small(network) and torch.device(network.device).type == "cpu"

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Depth:
        """A depth model from its folder.

        Raises:
            UserError: for a damaged model, another kind, or one that tells metres.
        """
        from transformers import AutoModelForDepthEstimation

        check_kind(folder)
        network = hosted.load_model(AutoModelForDepthEstimation, folder, OPTION, device)
        return cls(network, hosted.read_json(folder / "preprocessor_config.json"))

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> np.ndarray:
        """Nearness of an RGB picture's pixels, [height, width], larger where nearer, without a unit."""
        from PIL import Image as Pil

        square = image.resize((self._side, self._side), Pil.Resampling.BICUBIC)
        pixels = to_pixels(square, self._mean, self._spread)[None].to(self.network.device)
        with exact_products(), one_thread(self._small):
            near = self.network(pixel_values=pixels).predicted_depth.float()
        return F.interpolate(near[None], (image.height, image.width), mode="bilinear")[0, 0].cpu().numpy()


def check_kind(folder: Path) -> None:
    """Refuses a model that does not tell nearness.

    Raises:
        UserError: naming what it is.
    """
    hosted.check_kind(folder, OPTION, _KINDS, DEFAULT)
    told = hosted.read_json(folder / "config.json").get("depth_estimation_type", "relative")
    if told != "relative":
        raise UserError(
            f"{OPTION} {folder} tells {told} depth: expected nearness without a unit, as {DEFAULT} tells it"
        )
