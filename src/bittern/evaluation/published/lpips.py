"""LPIPS [Zhang et al. 2018, arXiv:1801.03924], version 0.1 on AlexNet: how differently two pictures look.

Pictures go through AlexNet's convolutions. After each of its five ReLUs every pixel's vector is brought to length one,
the squared differences are weighted channel by channel as people's judgements taught, and averaged over the picture;
the five averages are added. Zero for equal pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from bittern.evaluation.published import weights
from bittern.evaluation.published.weights import Absent
from bittern.precision import exact_products

BACKBONE = "alexnet-owt-7be5be79.pth"
_ADDRESS = f"https://download.pytorch.org/models/{BACKBONE}"
HEADS = {"torchmetrics": "functional/image/lpips_models/alex.pth", "lpips": "weights/v0.1/alex.pth"}
SMALLEST = 31
"""Pixels; of a smaller picture nothing is left after AlexNet's pooling."""
# Of pictures between -1 and 1.
_MEAN = (-0.030, -0.088, -0.188)
_SPREAD = (0.458, 0.448, 0.450)
# Of each convolution: its number in torchvision's AlexNet, stride, padding, whether pooling comes before it.
_LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
_KERNELS = ((64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3))
SHAPES = {f"features.{layer[0]}.weight": shape for layer, shape in zip(_LAYERS, _KERNELS, strict=True)}
SHAPES |= {f"features.{layer[0]}.bias": shape[:1] for layer, shape in zip(_LAYERS, _KERNELS, strict=True)}
HEAD_SHAPES = {f"lin{index}.model.1.weight": (1, shape[0], 1, 1) for index, shape in enumerate(_KERNELS)}
_EPS = 1e-10


class Lpips:
    """Compares pictures.

    Args:
        backbone: torchvision's AlexNet.
        heads: the published weights of its channels.
    """

    def __init__(self, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        self._convolutions = [
            (backbone[f"features.{layer[0]}.weight"], backbone[f"features.{layer[0]}.bias"], *layer[1:])
            for layer in _LAYERS
        ]
        self._heads = [heads[f"lin{index}.model.1.weight"] for index in range(len(_LAYERS))]
        self._device = self._heads[0].device
        self._mean, self._spread = (torch.tensor(v, device=self._device).view(3, 1, 1) for v in (_MEAN, _SPREAD))

    @classmethod
    def load(cls, place: Path, device: str = "cpu") -> Lpips:
        """The published weights, from a folder and from an installed package that has the channels' weights.

        Raises:
            Absent: if they are not here.
            UserError: if they are damaged.
        """
        heads = place / "alex.pth" if (place / "alex.pth").is_file() else weights.beside_package(HEADS)
        if heads is None:
            raise Absent('its channel weights are not here: pip install "bittern[metrics]" brings them')
        backbone = weights.find(place, BACKBONE, _ADDRESS)
        parts = ((backbone, SHAPES), (heads, HEAD_SHAPES))
        found = [weights.take(weights.read(file), shapes, file) for file, shapes in parts]
        one, other = ({name: tensor.to(device) for name, tensor in each.items()} for each in found)
        return cls(one, other)

    @torch.inference_mode()
    def __call__(
        self, images: UInt8[Tensor, "b 3 h w"], reference: UInt8[Tensor, "b 3 h w"], *, chunk: int = 16
    ) -> list[float]:
        """The distance of each picture to its reference."""
        found: list[float] = []
        for pair in zip(images.split(chunk), reference.split(chunk), strict=True):
            with exact_products():
                ours, theirs = (self._features(batch.to(self._device)) for batch in pair)
                total = torch.zeros(len(pair[0]), device=self._device)
                for one, other, head in zip(ours, theirs, self._heads, strict=True):
                    total += F.conv2d((_unit(one) - _unit(other)).square(), head).mean((1, 2, 3))
                found += total.tolist()
        return found

    def _features(self, images: UInt8[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c h2 w2"]]:
        x = (images.float() / 127.5 - 1 - self._mean) / self._spread
        found: list[Tensor] = []
        for weight, bias, stride, padding, pooled in self._convolutions:
            x = F.max_pool2d(x, 3, 2) if pooled else x
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            found.append(x)
        return found


def _unit(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    return x / (x.square().sum(1, keepdim=True).sqrt() + _EPS)
