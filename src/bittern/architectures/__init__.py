"""What we know of model families, and the plan that a recipe makes of one model."""

from __future__ import annotations

from bittern.architectures.base import Architecture, Block, Modulated, Parameters, Site
from bittern.architectures.known import ARCHITECTURES, install, known, of
from bittern.architectures.modulation import modulated_magnitudes
from bittern.architectures.plan import Job, Plan, plan

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Block",
    "Job",
    "Modulated",
    "Parameters",
    "Plan",
    "Site",
    "install",
    "known",
    "modulated_magnitudes",
    "of",
    "plan",
]
