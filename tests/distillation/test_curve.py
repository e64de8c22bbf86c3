"""The picture of a training says where it began and where it ended."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from bittern.distillation import training_report

LOG = [
    {"step": 0, "relative_error": 0.8, "psnr": 18.2},
    {"step": 100, "relative_error": 0.2, "psnr": 21.0},
    {"step": 200, "relative_error": 0.1, "psnr": 20.5},
]


def test_every_validation_is_a_point_and_the_ends_are_told() -> None:
    files = training_report(LOG)
    assert [json.loads(line) for line in files["distillation.jsonl"].splitlines()] == LOG
    picture = ElementTree.fromstring(files["distillation.svg"])
    lines = [line.attrib["points"] for line in picture if line.tag.endswith("polyline")]
    errors, psnrs = ([tuple(map(float, re.split(",", point))) for point in line.split()] for line in lines)
    assert len(errors) == len(psnrs) == 3
    # To the right, errors downwards (y grows downwards) and by equal factors equally far, PSNR up and a little down.
    assert errors[0][0] < errors[1][0] < errors[2][0]
    assert (errors[1][1] - errors[0][1]) / (errors[2][1] - errors[1][1]) == pytest.approx(2, rel=0.01)
    assert psnrs[1][1] < psnrs[2][1] < psnrs[0][1]
    told = [text.text for text in picture if text.tag.endswith("text")]
    assert {"0.8", "0.1", "18.2", "21.0", "0", "200"} <= set(told)


def test_a_training_of_one_validation_has_a_picture() -> None:
    assert "<polyline" in training_report(LOG[:1])["distillation.svg"]
