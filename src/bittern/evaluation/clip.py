"""CLIP [Radford et al. 2021, arXiv:2103.00020]: pictures and sentences as unit vectors, from transformers.

Resizing is done here, by Pillow, so that the same picture gives the same vector whatever else is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bittern.evaluation import hosted
from bittern.precision import exact_products
from bittern.threads import is_small, one_thread

if TYPE_CHECKING:
    from PIL import Image

DEFAULT = "openai/clip-vit-large-patch14"
OPTION = "--clip"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_SPREAD = (0.26862954, 0.26130258, 0.27577711)


def locate(model: str) -> Path:
    """The local folder of a CLIP.

    Args:
        model: a folder or a hub id.

    Raises:
        UserError: if it is neither here nor to be had, or a model of another kind.
    """
    folder = hosted.locate(model, OPTION)
    hosted.check_kind(folder, OPTION, ("clip",), DEFAULT)
    return folder


class Clip:
    """A CLIP and its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._small = is_small(network) and torch.device(network.device).type == "cpu"

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Clip:
        """A CLIP from its folder.

        Raises:
            UserError: for a damaged or another model, or one without its tokenizer.
        """
        from transformers import AutoTokenizer, CLIPModel

        network = hosted.load_model(CLIPModel, folder, OPTION, device)
        return cls(network, hosted.load(AutoTokenizer, folder, OPTION))

    @torch.inference_mode()
    def see(self, images: Sequence[Image.Image]) -> Float[Tensor, "b d"]:
        """A unit vector for each RGB picture."""
        with exact_products(), one_thread(self._small):
            pixels = torch.stack([self.prepare(image) for image in images]).to(self.network.device)
            return _vectors(self.network.get_image_features(pixel_values=pixels))

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """A unit vector for each text; what is too long for CLIP is cut off."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.network.device)
        with exact_products(), one_thread(self._small):
            found = self.network.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            return _vectors(found)

    def prepare(self, image: Image.Image) -> Float[Tensor, "3 side side"]:
        """A picture as the network takes it."""
        return prepare(image, self.network.config.vision_config.image_size)


def prepare(image: Image.Image, side: int) -> Float[Tensor, "3 side side"]:
    """The middle of a picture whose shorter side is brought to `side` pixels, in CLIP's scale of colours."""
    from PIL import Image as Pil

    shorter = min(image.size)
    width, height = (int(side * each / shorter) for each in image.size)
    resized = image.resize((width, height), Pil.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return to_pixels(resized.crop((left, top, left + side, top + side)))


def to_pixels(
    image: Image.Image, mean: Sequence[float] = _MEAN, spread: Sequence[float] = _SPREAD
) -> Float[Tensor, "3 h w"]:
    """An RGB picture less the mean, over the spread, of what a network was trained on; by default CLIP's."""
    pixels = torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(spread).view(3, 1, 1)


def scores(clip: Clip, images: Sequence[Image.Image], prompts: Sequence[str], *, chunk: int = 16) -> list[float]:
    """CLIPScore [Hessel et al. 2021, arXiv:2104.08718] of each picture: 100 cos, at least 0, as in torchmetrics."""
    found: list[float] = []
    for start in range(0, len(prompts), chunk):
        seen, said = clip.see(images[start : start + chunk]), clip.read(prompts[start : start + chunk])
        found += (100 * (seen * said).sum(1)).clamp(min=0).tolist()
    return found


def _vectors(found: Any) -> Float[Tensor, "b d"]:
    """Unit vectors, from what this version of transformers returns."""
    return F.normalize(getattr(found, "pooler_output", found).float(), dim=-1)
