"""The checkpoint's description of itself: round trip, and everything that contradicts itself refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from bittern.checkpoints import CheckpointConfig
from bittern.errors import UserError
from bittern.scheme import Scheme

INT4 = Scheme(weight="int4", rank=8, smooth=True, activations=4).to_dict()
TERNARY = Scheme(weight="ternary", packing="trits", activations=8).to_dict()

VALID: dict[str, Any] = {
    "quant_method": "bittern",
    "format_version": 1,
    "recipe": {"name": "mine"},
    "seed": 3,
    "schemes": [INT4, TERNARY],
    "targets": {
        "a.q": {"scheme": 0, "shape": [48, 128]},
        "a.k": {"scheme": 0, "shape": [32, 128]},
        "out": {"scheme": 1, "shape": [16, 100]},
    },
    "groups": [["a.q", "a.k"]],
    "segments": {"out": [36, 64]},
    "errors": {"a.q": 0.1, "a.k": 0.11, "out": 0.0},
    "stages": {"a.q": {"nearest": 0.2, "gptq": 0.1}},
}


CONVOLUTION = {"scheme": 0, "shape": [24, 9 * 20], "kernel": [3, 3]}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    data = copy.deepcopy(VALID)
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return data


def test_round_trip_through_json() -> None:
    config = CheckpointConfig.parse(VALID)
    assert config.dump() == VALID
    again = CheckpointConfig.parse(json.loads(json.dumps(config.dump(), sort_keys=True)))
    assert again == config


def test_what_each_target_stores() -> None:
    config = CheckpointConfig.parse(VALID)
    assert config.leaves("a.q") == {
        "codes": ((48, 64), torch.uint8),
        "scales": ((48, 2), torch.bfloat16),
        "smooth": ((128,), torch.bfloat16),
        "down": ((8, 128), torch.bfloat16),
        "up": ((48, 8), torch.bfloat16),
    }
    # The shared leaves of a group are its first member's.
    assert set(config.leaves("a.k")) == {"codes", "scales", "up"}
    conv = CheckpointConfig.parse(changed("targets", "conv", to=CONVOLUTION))
    assert conv.dump()["targets"] == VALID["targets"] | {"conv": CONVOLUTION}
    assert conv.k_segments("conv") == (20,) * 9
    # Each tap's 20 channels are padded to a group of 64; smoothing is one number a channel.
    assert conv.leaves("conv") == {
        "codes": ((24, 9 * 32), torch.uint8),
        "scales": ((24, 9), torch.bfloat16),
        "smooth": ((20,), torch.bfloat16),
        "down": ((8, 180), torch.bfloat16),
        "up": ((24, 8), torch.bfloat16),
    }
    # 36 and 64 inputs are padded to 64 each; five trits a byte.
    assert config.leaves("out") == {"codes": ((16, 26), torch.uint8), "scales": ((16, 2), torch.bfloat16)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed("format_version", to=2), "format_version 2 is newer than 1, .*: upgrade bittern"),
        (changed("format_version", to="1"), "format_version '1'"),
        (changed("format_version", to=0), "format_version 0: expected 1"),
        (changed("targts", to={}), r"unknown key 'targts': did you mean 'targets'\?"),
        (changed("targets", to={}), "targets is empty"),
        (changed("targets", "a.q", "scheme", to=2), "target 'a.q' has scheme 2: expected 0 to 1"),
        (changed("targets", "a.q", "scheme", to=-1), "target 'a.q' has scheme -1"),
        (changed("targets", "a.q", "shape", to=[48]), r"targets\.a\.q\.shape"),
        (changed("targets", "a.q", "shape", to=[48, 128.5]), r"targets\.a\.q\.shape"),
        (changed("targets", "a.q", "shape", to=[0, 128]), "expected positive numbers"),
        (changed("schemes", 0, "rnk", to=1), r"unknown key 'rnk' in a scheme: did you mean 'rank'\?"),
        (changed("schemes", 0, "weight", to="int3"), "int3"),
        (changed("schemes", 0, "activations", to=5), "activations 5: expected 4, 8 or 16"),
        (changed("schemes", to=[]), "has scheme 0"),
        (changed("schemes", to="int4"), "schemes 'int4'"),
        (changed("groups", to=[["a.q"]]), "fewer than two members"),
        (changed("groups", to=[["a.q", "a.k"], ["a.k", "a.q"]]), "target 'a.q' is in two groups|is in two groups"),
        (changed("groups", to=[["a.q", "a.v"]]), "groups names 'a.v', which is no target"),
        (changed("groups", to=[["a.q", "out"]]), "group member 'out' differs from 'a.q'"),
        (changed("segments", to={"out": [36, 63]}), r"segments of 'out' are \[36, 63\]: expected a sum of 100"),
        (changed("segments", to={"out": [100, 0]}), "segments"),
        (changed("segments", to={"in": [1]}), "segments names 'in', which is no target"),
        (changed("errors", to={"out": float("nan")}), "error of 'out' is nan"),
        (changed("errors", to={"out": -1.0}), "error of 'out' is -1.0"),
        (changed("targets", "conv", to={**CONVOLUTION, "kernel": [3]}), r"targets\.conv\.kernel"),
        (changed("targets", "conv", to={**CONVOLUTION, "kernel": [3, 0]}), "expected positive numbers"),
        (changed("targets", "conv", to={**CONVOLUTION, "kernel": [7, 3]}), "180 inputs: expected as many for each tap"),
        (changed("targets", "out", "kernel", to=[2, 2]), "'out' is a convolution: expected no segments of its own"),
        (changed("targets", "a.k", "kernel", to=[1, 1]), "group member 'a.k' is a convolution: expected linears"),
        ([], "expected a mapping"),
    ],
)
def test_contradictions_are_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CheckpointConfig.parse(data, "config.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
