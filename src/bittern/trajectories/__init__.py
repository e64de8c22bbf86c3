"""Trajectories: the states that a full-precision model passes through from noise, the only calibration data."""

from __future__ import annotations

from bittern.trajectories.calling import CallDefaults, defaults, steps_of
from bittern.trajectories.placement import place
from bittern.trajectories.prompts import check_prompts, default_prompts, read_prompts
from bittern.trajectories.sampler import choose, sample
from bittern.trajectories.sensitivity import enough, sensitivities
from bittern.trajectories.skipping import Skipping, call_order, dependence, most_bytes
from bittern.trajectories.states import State, device_of, most_tokens, pack, states_bytes, unpack
from bittern.trajectories.statistics import Statistics, record
from bittern.trajectories.texts import Texts, encode_texts, run_on

__all__ = [
    "CallDefaults",
    "Skipping",
    "State",
    "Statistics",
    "Texts",
    "call_order",
    "check_prompts",
    "choose",
    "default_prompts",
    "defaults",
    "dependence",
    "device_of",
    "encode_texts",
    "enough",
    "most_bytes",
    "most_tokens",
    "pack",
    "place",
    "read_prompts",
    "record",
    "run_on",
    "sample",
    "sensitivities",
    "states_bytes",
    "steps_of",
    "unpack",
]
