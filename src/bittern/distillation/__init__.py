"""Self-distillation: a few-bit model learns to answer as the model it was made of, on that model's own trajectories."""

from __future__ import annotations

from bittern.distillation.curve import card_section, training_report
from bittern.distillation.run import Distilled, distill, latents

__all__ = ["Distilled", "card_section", "distill", "latents", "training_report"]
