"""Trajectories: the states that a full-precision model passes through from noise, the only calibration data."""

from __future__ import annotations

from bittern.trajectories.calling import CallDefaults, defaults
from bittern.trajectories.prompts import check_prompts, default_prompts, read_prompts
from bittern.trajectories.sampler import State, choose, sample
from bittern.trajectories.sensitivity import sensitivities
from bittern.trajectories.statistics import Statistics, record, record_bytes

__all__ = [
    "CallDefaults",
    "State",
    "Statistics",
    "check_prompts",
    "choose",
    "default_prompts",
    "defaults",
    "read_prompts",
    "record",
    "record_bytes",
    "sample",
    "sensitivities",
]
