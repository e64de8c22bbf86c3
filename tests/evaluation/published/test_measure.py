"""Suite fidelity with published weights that are there, and without."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_published_networks import reward_shapes, seeded

from bittern.cli import main
from bittern.evaluation.published import image_reward, inception, lpips, measure, weights

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def words(
    tiny_random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_tiny_random_pipeline: Any
) -> list[str]:
    """The command with a few-bit model, on a machine that has nothing."""
    import bittern

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    few = new_tiny_random_pipeline()
    bittern.quantize(few, "ternary-fast")
    few.save_pretrained(tmp_path / "few")
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    (tmp_path / "weights").mkdir()
    found = ["evaluate", str(tmp_path / "few"), "--suite", "fidelity", "--reference", str(tiny_random_folder)]
    return [*found, "--prompts", str(tmp_path / "p.txt"), "--steps", "1", "--weights", str(tmp_path / "weights")]


def test_what_is_absent_is_said_with_how_to_bring_it(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["fidelity"]
    assert told["lpips"] is None and told["fid"] is None and told["image_reward_stderr"] is None
    assert set(told["absent"]) == {"LPIPS", "FID", "ImageReward"}
    assert main.run(words) == 0
    shown = capsys.readouterr().out
    assert f"LPIPS not measured: {lpips.BACKBONE} is not here: fetch https://download.pytorch.org/models/" in shown
    assert f"into {tmp_path / 'weights'}, or give its folder by --weights" in shown
    assert f"FID not measured: {inception.FILE} is not here: fetch https://github.com/mseitzer/pytorch-fid/" in shown
    assert "ImageReward not measured: THUDM/ImageReward is not here: `hf download THUDM/ImageReward" in shown
    assert "CLIP score not measured" in shown
    torch.save(seeded(reward_shapes(8), 4), tmp_path / "weights" / image_reward.FILE)
    assert main.run(words) == 0
    assert "its tokenizer google-bert/bert-base-uncased is not here: `hf download" in capsys.readouterr().out
    assert main.run([*words[:-1], str(tmp_path / "nowhere")]) == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err
    assert main.run(["evaluate", "tiny-flux", "--weights", str(tmp_path)]) == 2
    assert "leave out --weights" in capsys.readouterr().err


def test_what_is_there_is_measured(
    words: list[str], tmp_path: Path, bert_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    place = tmp_path / "weights"
    backbone, eye = seeded(lpips.SHAPES, 2), seeded(inception.shapes(), 1)
    for module, name, tensors in ((lpips, "BACKBONE", backbone), (inception, "FILE", eye)):
        torch.save(tensors, place / "any")
        digits = hashlib.sha256((place / "any").read_bytes()).hexdigest()[:8]
        (place / "any").rename(place / f"net-{digits}.pth")
        monkeypatch.setattr(module, name, f"net-{digits}.pth")
    torch.save(seeded(reward_shapes(8), 4), place / image_reward.FILE)
    (place / "bert-base-uncased").symlink_to(bert_folder)
    seen: list[Any] = []
    original = measure.measure
    monkeypatch.setattr("bittern.evaluation.suites.measure", lambda *args: seen.append(args) or original(*args))
    assert main.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["fidelity"]
    assert told["absent"] == {}
    drawing, reference = seen[0][:2]
    heads = weights.read(weights.beside_package(lpips.HEADS))
    assert told["lpips"] == pytest.approx(sum(lpips.Lpips(backbone, heads)(drawing.images, reference.images)) / 3)
    look = inception.Inception(eye)
    distance = inception.frechet_distance(look(drawing.images), look(reference.images))
    assert told["fid"] == pytest.approx(distance, rel=1e-6) and told["lpips"] > 0 and told["fid"] > 0
    assert told["image_reward"] != told["reference_image_reward"] and told["image_reward_stderr"] > 0
    assert main.run(words) == 0
    shown = capsys.readouterr().out
    assert "LPIPS 0." in shown and "to the reference's 3 pictures" in shown and "ImageReward " in shown
    (place / inception.FILE).write_bytes(b"torn")
    assert main.run(words) == 2
    assert "is not the file that was published" in capsys.readouterr().err
