"""Objects by Mask2Former [Cheng et al. 2022, arXiv:2112.01527], as its authors turn queries into instances.

Every (query, class) pair of high probability is an instance; its pixels are those with a positive mask logit, and its
score is the class's probability times the mean mask probability over these pixels. The box is the mask's. The 100
best pairs of a picture are looked at. The network is that of transformers; resizing is done here, by Pillow, so that
the same picture gives the same detections whatever else is installed. Pictures of one prepared size go through the
network together; low bits may depend on what goes with what, so who needs the same bits again gives the same batch.
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

from bittern.errors import UserError
from bittern.evaluation import hosted
from bittern.evaluation.geneval.metadata import OBJECTS
from bittern.evaluation.geneval.rules import THRESHOLD, Detection
from bittern.precision import exact_products
from bittern.threads import is_small, one_thread

if TYPE_CHECKING:
    from PIL import Image

DEFAULT = "facebook/mask2former-swin-small-coco-instance"
MOST = 100
_OPTION = "--detector"
# What GenEval's configuration uses; a folder's preprocessor_config.json may say otherwise.
_SIDES = (800, 1333)
_DIVISOR = 32
_MEAN = (0.485, 0.456, 0.406)
_SPREAD = (0.229, 0.224, 0.225)
# COCO's own words where GenEval's differ, for detectors that know more than COCO's things.
_ALIASES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


class Detector:
    """Finds objects.

    Args:
        network: transformers' Mask2Former.
        names: GenEval's names of its labels.
        prepare: how its pictures are prepared: "size" with the sides, "size_divisor", "image_mean" and "image_std".
    """

    def __init__(self, network: Any, names: dict[int, str], prepare: dict[str, Any]) -> None:
        self.network = network
        self.names = names
        size = prepare.get("size") or {}
        self._sides = (size.get("shortest_edge", _SIDES[0]), size.get("longest_edge", _SIDES[1]))
        self._divisor = prepare.get("size_divisor") or _DIVISOR
        self._mean = torch.tensor(prepare.get("image_mean") or _MEAN).view(3, 1, 1)
        self._spread = torch.tensor(prepare.get("image_std") or _SPREAD).view(3, 1, 1)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Detector:
        """A Mask2Former from its folder.

        Raises:
            UserError: for another kind of model, a damaged one, or one for other objects.
        """
        from transformers import Mask2FormerForUniversalSegmentation

        names = known_labels(folder)
        network = hosted.load_model(Mask2FormerForUniversalSegmentation, folder, _OPTION, device)
        prepare = hosted.read_json(folder / "preprocessor_config.json")
        return cls(network, names, prepare)

    def __call__(self, image: Image.Image) -> list[Detection]:
        """The objects in an RGB picture whose score is above the lowest threshold, in no order."""
        return self.find([image])[0]

    @torch.inference_mode()
    def find(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """The objects in each of several RGB pictures; those of one prepared size go through the network together."""
        prepared = [self._prepare(image) for image in images]
        found: dict[int, list[Detection]] = {}
        for shape in dict.fromkeys(pixels.shape for pixels, _ in prepared):
            alike = [index for index, (pixels, _) in enumerate(prepared) if pixels.shape == shape]
            batch = torch.stack([prepared[index][0] for index in alike])
            with exact_products(), one_thread(is_small(self.network) and self.network.device.type == "cpu"):
                seen = self.network(pixel_values=batch.to(self.network.device))
                for index, classes, masks in zip(
                    alike, seen.class_queries_logits.float(), seen.masks_queries_logits.float(), strict=True
                ):
                    found[index] = instances(
                        classes,
                        masks,
                        self.names,
                        padded=(shape[1], shape[2]),
                        inside=prepared[index][1],
                        size=(images[index].height, images[index].width),
                    )
        return [found[index] for index in range(len(images))]

    def _prepare(self, image: Image.Image) -> tuple[Float[Tensor, "3 h w"], tuple[int, int]]:
        """The picture at the detector's size, padded below and to the right; and its height and width without."""
        from PIL import Image as Pil

        sides = (image.width, image.height)
        scale = min(self._sides[0] / min(sides), self._sides[1] / max(sides))
        width, height = (max(1, int(side * scale + 0.5)) for side in sides)
        resized = np.asarray(image.resize((width, height), Pil.Resampling.BILINEAR), np.float32)
        pixels = (torch.from_numpy(resized).permute(2, 0, 1) / 255 - self._mean) / self._spread
        return F.pad(pixels, (0, -width % self._divisor, 0, -height % self._divisor)), (height, width)


def instances(
    classes: Float[Tensor, "q classes"],
    masks: Float[Tensor, "q h w"],
    names: dict[int, str],
    *,
    padded: tuple[int, int],
    inside: tuple[int, int],
    size: tuple[int, int],
) -> list[Detection]:
    """Detections from a network's logits.

    Args:
        classes: logits of every query, "no object" last.
        masks: logits of every query's mask.
        names: the classes that may be found, by label.
        padded: height and width of what the network saw.
        inside: height and width of the picture in it.
        size: height and width of the picture itself.
    """
    shares = classes.softmax(-1)[:, :-1].flatten()
    best, place = shares.topk(min(MOST, shares.numel()))
    found: list[Detection] = []
    for share, index in zip(best, place.tolist(), strict=True):
        query, label = divmod(index, classes.shape[-1] - 1)
        # The mask's mean probability is 1 at most: what falls short here falls short with it.
        if share < THRESHOLD - 1e-3 or label not in names:
            continue
        mask = F.interpolate(masks[None, query, None], padded, mode="bilinear")[..., : inside[0], : inside[1]]
        mask = F.interpolate(mask, size, mode="bilinear")[0, 0]
        on = mask > 0
        score = float(share * (mask.sigmoid() * on).sum() / (on.sum() + 1e-6))
        rows, columns = on.any(1).nonzero().flatten().tolist(), on.any(0).nonzero().flatten().tolist()
        if np.float32(score) > np.float32(THRESHOLD):
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            found.append(Detection(names[label], box, score, on.cpu().numpy()))
    return found


def known_labels(folder: Path) -> dict[int, str]:
    """GenEval's names of the labels of a detector in a folder, from its config.

    Raises:
        UserError: for another kind of model, or a detector of other things.
    """
    from transformers import AutoConfig

    hosted.check_kind(folder, _OPTION, ("mask2former",), DEFAULT)
    config = hosted.load(AutoConfig, folder, _OPTION)
    return label_names(config.id2label, str(folder))


def label_names(labels: dict[int, str], model: str) -> dict[int, str]:
    """GenEval's names of a detector's labels: by place for COCO's 80 and where labels have no names, else by name.

    Raises:
        UserError: if the detector has names for its labels and lacks some of COCO's things.
    """
    nameless = all(name.upper() == f"LABEL_{index}" for index, name in labels.items())
    ends = (labels.get(0, "").lower(), labels.get(len(OBJECTS) - 1, "").lower())
    if nameless or (len(labels) == len(OBJECTS) and ends == (OBJECTS[0], OBJECTS[-1])):
        return {index: OBJECTS[index] for index in labels if index < len(OBJECTS)}
    named = {index: _ALIASES.get(name.lower(), name.lower()) for index, name in labels.items()}
    named = {index: name for index, name in named.items() if name in OBJECTS}
    missing = [name for name in OBJECTS if name not in named.values()]
    if missing:
        raise UserError(
            f"{_OPTION} {model} does not know {len(missing)} of COCO's 80 things, such as {missing[0]!r}: "
            f"expected a detector trained on COCO, such as {DEFAULT}"
        )
    return named
