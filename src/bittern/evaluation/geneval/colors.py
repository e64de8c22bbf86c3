"""Colours by CLIP [Radford et al. 2021, arXiv:2103.00020], without training, as GenEval asks for them.

An object is cut out by its mask, laid on the grey #999, cropped to its box and held against ten colours; a colour's
vector is the mean of three sentences about an object of that class in that colour.
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
from bittern.evaluation.geneval.metadata import COLORS
from bittern.evaluation.geneval.rules import Detection
from bittern.precision import exact_products
from bittern.threads import is_small, one_thread

if TYPE_CHECKING:
    from PIL import Image

DEFAULT = "openai/clip-vit-large-patch14"
GROUND = (0x99, 0x99, 0x99)
_OPTION = "--clip"
_SENTENCES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_SPREAD = (0.26862954, 0.26130258, 0.27577711)


class ColorNamer:
    """Names the colours of objects in a picture."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._directions: dict[str, Tensor] = {}

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> ColorNamer:
        """A CLIP from its folder.

        Raises:
            UserError: for a damaged or another model, or one without its tokenizer.
        """
        from transformers import AutoTokenizer, CLIPModel

        network = hosted.load_model(CLIPModel, folder, _OPTION, device)
        return cls(network, hosted.load(AutoTokenizer, folder, _OPTION))

    @torch.inference_mode()
    def __call__(self, image: Image.Image, name: str, found: Sequence[Detection]) -> list[str]:
        """The colour of each object of a class in an RGB picture."""
        with exact_products(), one_thread(is_small(self.network) and self.network.device.type == "cpu"):
            pixels = torch.stack([self._prepare(cut_out(image, one)) for one in found])
            seen = _vectors(self.network.get_image_features(pixel_values=pixels.to(self.network.device)))
            return [COLORS[index] for index in (seen @ self.directions(name).T).argmax(1).tolist()]

    def directions(self, name: str) -> Float[Tensor, "colors d"]:
        """One unit vector a colour, for objects of a class."""
        if name not in self._directions:
            texts = [sentence.format(color=color, name=name) for color in COLORS for sentence in _SENTENCES]
            tokens = self.tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=self.network.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.network.device)
            said = _vectors(
                self.network.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            )
            self._directions[name] = F.normalize(said.unflatten(0, (len(COLORS), -1)).mean(1), dim=-1)
        return self._directions[name]

    def _prepare(self, image: Image.Image) -> Float[Tensor, "3 side side"]:
        """The picture with its shorter side at the network's size, and the middle of it."""
        from PIL import Image as Pil

        side = self.network.config.vision_config.image_size
        shorter = min(image.size)
        width, height = (int(side * each / shorter) for each in image.size)
        resized = image.resize((width, height), Pil.Resampling.BICUBIC)
        left, top = round((width - side) / 2), round((height - side) / 2)
        pixels = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32)
        mean, spread = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _SPREAD))
        return (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / spread


def cut_out(image: Image.Image, found: Detection) -> Image.Image:
    """An object on a plain ground, cropped to its box; without a mask the box as it is."""
    from PIL import Image as Pil

    if found.mask is not None:
        image = Pil.composite(image, Pil.new("RGB", image.size, GROUND), Pil.fromarray(found.mask))
    return image.crop(tuple(round(edge) for edge in found.box))


def _vectors(found: Any) -> Float[Tensor, "b d"]:
    """Unit vectors, from what this version of transformers returns."""
    return F.normalize(getattr(found, "pooler_output", found).float(), dim=-1)
