"""Solvers: a weight, with its input's statistics or without, and a scheme -> the tensors of a few-bit layer."""

from __future__ import annotations

from bittern.solvers.bias import mean_error
from bittern.solvers.calibrated import solve_calibrated
from bittern.solvers.foresight import foresee
from bittern.solvers.lowrank import recompress
from bittern.solvers.options import SolverOptions
from bittern.solvers.solution import Solution, Stages, relative_error
from bittern.solvers.solve import solve
from bittern.solvers.ternary import solve_ternary

__all__ = [
    "Solution",
    "SolverOptions",
    "Stages",
    "foresee",
    "mean_error",
    "recompress",
    "relative_error",
    "solve",
    "solve_calibrated",
    "solve_ternary",
]
