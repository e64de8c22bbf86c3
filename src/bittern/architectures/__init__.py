"""What we know of model families, and the plan that a recipe makes of one model."""

from __future__ import annotations

from bittern.architectures.base import Architecture, Block, Modulated, Parameters, Site
from bittern.architectures.known import ARCHITECTURES, of, of_class
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
    "modulated_magnitudes",
    "of",
    "of_class",
    "plan",
]
