"""Objects by name with OWLv2 [Minderer et al. 2023, arXiv:2306.09683], from transformers.

The published scorer takes UniDet, which no longer builds and knows some 700 names; detectors that know COCO's 80 lack
half of what the benchmark asks for. OWLv2 looks for any name, so none is out of reach; its certainties are others
than UniDet's, and so scores that come from them are not comparable to published ones.

A picture is padded to a square with grey, below and to the right, and resized by Pillow. Every patch proposes a box
for the name that fits it best; of boxes of a name that overlap by more than a half the most certain is kept, as
UniDet itself does and OWLv2 does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bittern.evaluation import hosted
from bittern.evaluation.clip import to_pixels
from bittern.evaluation.compbench.rules import overlap
from bittern.evaluation.geneval.rules import Detection
from bittern.precision import exact_products
from bittern.threads import is_small, one_thread

if TYPE_CHECKING:
    from PIL import Image

DEFAULT = "google/owlv2-base-patch16-ensemble"
OPTION = "--detector"
THRESHOLD = 0.2
_DUPLICATE = 0.5
_GREY = (128, 128, 128)


class NamedDetector:
    """An OWLv2 and its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self._small = is_small(network) and torch.device(network.device).type == "cpu"

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> NamedDetector:
        """An OWLv2 from its folder.

        Raises:
            UserError: for a damaged or another model, or one without its tokenizer.
        """
        from transformers import AutoTokenizer, Owlv2ForObjectDetection

        network = hosted.load_model(Owlv2ForObjectDetection, folder, OPTION, device)
        return cls(network, hosted.load(AutoTokenizer, folder, OPTION))

    @torch.inference_mode()
    def __call__(self, image: Image.Image, names: Sequence[str]) -> list[Detection]:
        """The objects of some names in an RGB picture, the most certain first."""
        from PIL import Image as Pil

        names, longer = list(dict.fromkeys(names)), max(image.size)
        square = Pil.new("RGB", (longer, longer), _GREY)
        square.paste(image)
        side = self.network.config.vision_config.image_size
        pixels = to_pixels(square.resize((side, side), Pil.Resampling.BILINEAR))
        asked = self.tokenizer(
            [f"a photo of a {name}" for name in names],
            padding="max_length",
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.network.device)
        with exact_products(), one_thread(self._small):
            seen = self.network(
                input_ids=asked.input_ids,
                attention_mask=asked.attention_mask,
                pixel_values=pixels[None].to(self.network.device),
            )
        scores, labels = seen.logits[0].float().sigmoid().max(-1)
        middle, extent = seen.pred_boxes[0].float().split(2, -1)
        limits = torch.tensor(image.size * 2, device=scores.device)
        boxes = (torch.cat([middle - extent / 2, middle + extent / 2], -1) * longer).clamp(min=0).minimum(limits)
        order = scores.argsort(descending=True, stable=True)
        sure = order[scores[order] > THRESHOLD].tolist()
        return distinct([Detection(names[labels[i]], tuple(boxes[i].tolist()), float(scores[i])) for i in sure])


def distinct(found: Sequence[Detection]) -> list[Detection]:
    """Detections, the most certain first, without those that overlap a more certain one of their name."""
    kept: list[Detection] = []
    for one in found:
        if not any(one.name == other.name and overlap(one, other) > _DUPLICATE for other in kept):
            kept.append(one)
    return kept
