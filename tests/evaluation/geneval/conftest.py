"""A random Mask2Former that finds plenty, and metadata in the official form."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest

from bittern.evaluation.drawing import Settings
from bittern.evaluation.geneval.metadata import COLORS, OBJECTS, RELATIONS
from bittern.evaluation.geneval.suite import evaluate

QUICK = Settings(seed=3, steps=1, batch_size=5)


def made_lines() -> list[dict]:
    """Lines of every form that the official file has, in its order and its numbers: 553."""
    objects, colors = itertools.cycle(OBJECTS), itertools.cycle(COLORS)
    relations, counts = itertools.cycle(RELATIONS), itertools.cycle((2, 3, 4))
    lines: list[dict] = []
    for _ in range(80):
        lines.append({"tag": "single_object", "include": [{"class": next(objects), "count": 1}]})
    for _ in range(99):
        lines.append({"tag": "two_object", "include": [{"class": next(objects), "count": 1} for _ in range(2)]})
    for _ in range(80):
        name, count = next(objects), next(counts)
        include, exclude = ([{"class": name, "count": c}] for c in (count, count + 1))
        lines.append({"tag": "counting", "include": include, "exclude": exclude})
    for _ in range(94):
        lines.append({"tag": "colors", "include": [{"class": next(objects), "count": 1, "color": next(colors)}]})
    for _ in range(100):
        placed = {"class": next(objects), "count": 1, "position": [next(relations), 0]}
        lines.append({"tag": "position", "include": [{"class": next(objects), "count": 1}, placed]})
    for _ in range(100):
        include = [{"class": next(objects), "count": 1, "color": next(colors)} for _ in range(2)]
        lines.append({"tag": "color_attr", "include": include})
    return [line | {"prompt": f"a photo of number {index}"} for index, line in enumerate(lines)]


def official_file(name: str) -> Path | None:
    """An official file that a developer may have beside the repository."""
    places = (parent / "shared" / "data" / "geneval" / name for parent in Path(__file__).resolve().parents)
    return next((place for place in places if place.is_file()), None)


@pytest.fixture(scope="session")
def metadata_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 553 official lines where they are at hand; otherwise as many of the same forms."""
    official = official_file("evaluation_metadata.jsonl")
    if official is not None:
        return official
    file = tmp_path_factory.mktemp("geneval") / "metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in made_lines()))
    return file


@pytest.fixture(scope="session")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lines of each task, in letters that the random pipeline's tokenizers know."""
    lines = made_lines()
    chosen = [line for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr")
              for line in [each for each in lines if each["tag"] == tag][:2]]  # fmt: skip
    file = tmp_path_factory.mktemp("geneval") / "twelve.jsonl"
    file.write_text(
        "".join(json.dumps(line | {"prompt": f"prompt {ascii_lowercase[i]}"}) + "\n" for i, line in enumerate(chosen))
    )
    return file


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mask2Former with 12 queries; its classifier is loud, so that some objects pass the thresholds."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12, num_labels=80,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config).eval()
        model.class_predictor.weight.data.normal_().mul_(2)
    folder = tmp_path_factory.mktemp("geneval") / "detector"
    model.save_pretrained(folder)
    prepare = {"size": {"shortest_edge": 64, "longest_edge": 96}, "size_divisor": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    return folder


@pytest.fixture
def run(
    tiny_random_folder: Path, twelve: Path, detector_folder: Path, clip_folder: Path, tmp_path: Path
) -> Callable[..., Any]:
    """The suite on the random pipeline; options override."""

    def go(out: str = "out", **options: Any) -> Any:
        given = {"model": str(tiny_random_folder), "metadata": twelve, "images_per_prompt": 2, "settings": QUICK}
        models = {"detector_model": str(detector_folder), "clip_model": str(clip_folder)}
        chosen = given | models | options
        return evaluate(chosen.pop("model"), chosen.pop("metadata"), tmp_path / out, **chosen)

    return go
