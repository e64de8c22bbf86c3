"""All measures with published weights, of a model's pictures beside the reference's: what was found, what is absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bittern.evaluation.drawing import Drawing
from bittern.evaluation.generate import to_pil
from bittern.evaluation.published.image_reward import ImageReward
from bittern.evaluation.published.inception import Inception, frechet_distance
from bittern.evaluation.published.lpips import SMALLEST, Lpips
from bittern.evaluation.published.weights import Absent
from bittern.evaluation.stats import Estimate, mean_estimate


@dataclass
class Published:
    """What was measured, and what could not be.

    Attributes:
        estimates: by JSON key, means over the pictures.
        fid: of the model's pictures to the reference's; None where it is absent.
        absent: by a measure's name, what it lacks and how to bring it.
    """

    estimates: dict[str, Estimate] = field(default_factory=dict[str, Estimate])
    fid: float | None = None
    absent: dict[str, str] = field(default_factory=dict[str, str])

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is absent is None."""
        keys = ("lpips", "image_reward", "reference_image_reward")
        found = {key: self.estimates.get(key) for key in keys}
        values = {key: each and each.mean for key, each in found.items()}
        errors = {f"{key}_stderr": each and each.stderr for key, each in found.items()}
        return {**values, **errors, "fid": self.fid, "absent": self.absent}


def measure(drawing: Drawing, reference: Drawing, device: str, place: Path) -> Published:
    """LPIPS, FID and ImageReward, as far as their weights are here; one network in memory at a time.

    Raises:
        UserError: if weights are damaged.
    """
    found = Published()

    def lpips() -> None:
        if min(drawing.images.shape[-2:]) < SMALLEST:
            raise Absent(f"it needs pictures of at least {SMALLEST} pixels")
        found.estimates["lpips"] = mean_estimate(Lpips.load(place, device)(drawing.images, reference.images))

    def fid() -> None:
        if len(drawing.prompts) < 2:
            raise Absent("it needs at least two pictures")
        eye = Inception.load(place, device)
        found.fid = frechet_distance(eye(drawing.images), eye(reference.images))

    def image_reward() -> None:
        judge = ImageReward.load(place, device)
        for key, each in (("image_reward", drawing), ("reference_image_reward", reference)):
            found.estimates[key] = mean_estimate(judge([to_pil(image) for image in each.images], each.prompts))

    measures: dict[str, Callable[[], None]] = {"LPIPS": lpips, "FID": fid, "ImageReward": image_reward}
    for name, one in measures.items():
        try:
            one()
        except Absent as lack:
            found.absent[name] = str(lack)
    return found
