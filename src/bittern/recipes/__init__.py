"""Recipes: which layers get which scheme, and how they are solved. A name, a YAML file, or Python."""

from __future__ import annotations

from bittern.recipes.distillation import Distillation
from bittern.recipes.library import load, names
from bittern.recipes.model import LayerSpec, Recipe, needs_data, resolve_rank, solves_with_data
from bittern.recipes.validation import validated

__all__ = [
    "Distillation",
    "LayerSpec",
    "Recipe",
    "load",
    "names",
    "needs_data",
    "resolve_rank",
    "solves_with_data",
    "validated",
]
