"""Solvers: a weight (later with its input's statistics) and a scheme -> the tensors of a few-bit layer."""

from __future__ import annotations

from bittern.solvers.options import SolverOptions
from bittern.solvers.solution import Solution, relative_error
from bittern.solvers.solve import solve

__all__ = ["Solution", "SolverOptions", "relative_error", "solve"]
