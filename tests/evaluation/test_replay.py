"""Pictures that are drawn again from what their files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import save_file

import bittern
from bittern.cli import main
from bittern.errors import UserError
from bittern.evaluation.drawing import Settings
from bittern.evaluation.generate import read_metadata, save_png
from bittern.evaluation.replay import replay

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def few_bit(new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay") / "few"
    pipe = new_tiny_random_pipeline()
    bittern.quantize(pipe, "svdquant-fast")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def drawn(few_bit: Path, tmp_path: Path) -> list[Path]:
    """Five pictures in batches of three and two, with an arithmetic that was forced."""
    (tmp_path / "p.txt").write_text("\n".join("abcde"))
    words = ["generate", str(few_bit), "--prompts", str(tmp_path / "p.txt"), "--seed", "9", "--steps", "2"]
    assert main.run([*words, "--batch-size", "3", "--path", "a16", "--out", str(tmp_path / "drawn")]) == 0
    return sorted((tmp_path / "drawn").iterdir())


def test_every_picture_of_a_batch_comes_again_to_the_bit(drawn: list[Path], few_bit: Path) -> None:
    assert [read_metadata(file)["batch"] for file in drawn] == ["1 of 3", "2 of 3", "3 of 3", "1 of 2", "2 of 2"]
    for index, file in enumerate(drawn):
        found = replay(file)
        assert found.identical and found.psnr == 100 and found.changed == {}
        assert (found.drawing.seed, found.drawing.steps, found.drawing.path) == (9 + index, 2, "a16")
        assert found.drawing.prompts == ["abcde"[index]] and found.drawing.images.shape[0] == 1


def test_what_is_asked_for_otherwise_is_told(drawn: list[Path], tiny_random_folder: Path) -> None:
    found = replay(drawn[1], settings=Settings(steps=1))
    assert not found.identical and 0 < found.psnr < 100 and found.changed == {"steps": ("2", "1")}
    other = replay(drawn[1], model=str(tiny_random_folder))
    assert not other.identical and other.changed["model"][1] == str(tiny_random_folder)
    assert other.changed["path"] == ("a16", "fp32")


def test_the_command_writes_the_picture_and_says_whether_it_is_the_same(
    drawn: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    words = ["generate", "--replay", str(drawn[2]), "--out", str(tmp_path / "again.png")]
    capsys.readouterr()
    assert main.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["identical"] is True and told["file"] == str(tmp_path / "again.png") and told["changed"] == {}
    with Image.open(drawn[2]) as one, Image.open(tmp_path / "again.png") as two:
        assert np.array_equal(np.asarray(one), np.asarray(two))
    # It says of itself that it was drawn alone, and can be drawn again in turn.
    assert read_metadata(tmp_path / "again.png")["seed"] == "11"
    assert main.run(["generate", "--replay", str(drawn[0]), "--out", str(tmp_path / "new")]) == 0
    assert "every pixel is the same" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["00000-replay.png"]


@pytest.mark.parametrize("fuse", [False, True])
def test_loras_are_part_of_the_story(fuse: bool, few_bit: Path, tmp_path: Path, capsys: Capture) -> None:
    g = torch.Generator().manual_seed(0)
    path = "transformer.transformer_blocks.0.ff.net.2"
    factors = {f"{path}.lora_A.weight": (4, 256), f"{path}.lora_B.weight": (64, 4)}
    save_file({key: torch.randn(shape, generator=g) for key, shape in factors.items()}, tmp_path / "wild.safetensors")
    words = ["generate", str(few_bit), "a", "--steps", "2"]
    assert main.run([*words, "--out", str(tmp_path / "plain.png")]) == 0
    words += ["--lora", f"{tmp_path / 'wild.safetensors'}:-0.5", "--out", str(tmp_path / "wild.png"), "--json"]
    capsys.readouterr()
    assert main.run([*words, *["--fuse"] * fuse]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loras"] == [{"file": str(tmp_path / "wild.safetensors"), "strength": -0.5}] and told["fused"] is fuse
    with Image.open(tmp_path / "plain.png") as one, Image.open(tmp_path / "wild.png") as two:
        assert not np.array_equal(np.asarray(one), np.asarray(two))
    found = replay(tmp_path / "wild.png")
    assert found.identical and found.changed == {}
    other = replay(tmp_path / "plain.png", settings=Settings(loras=found.drawing.loras, fuse=fuse))
    assert torch.equal(other.drawing.images, found.drawing.images) and not other.identical
    assert other.changed.keys() == ({"loras", "fused"} if fuse else {"loras"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "does not say its model"),
        ({"seed": "x"}, "says seed 'x'"),
        ({"batch": "3 of 2"}, "says batch '3 of 2'"),
        ({"loras": "wild"}, "says LoRAs 'wild'"),
        ({"size": "64x64"}, "draws 32x32 pictures and .* is 64x64"),
        ({"model": "/nowhere/model"}, "/nowhere/model"),
    ],
)
def test_files_that_cannot_be_drawn_again(
    change: dict[str, str | None], message: str, drawn: list[Path], tmp_path: Path
) -> None:
    said = {key: value for key, value in (read_metadata(drawn[0]) | change).items() if value is not None}
    save_png(torch.zeros(3, 32, 32, dtype=torch.uint8), tmp_path / "b.png", said)
    with pytest.raises(UserError, match=message):
        replay(tmp_path / "b.png")


def test_what_is_no_picture_of_ours(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read"):
        replay(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot be read"):
        replay(tmp_path / "nowhere.png")
    assert main.run(["generate", "--replay", str(tmp_path / "a.png"), "tiny-flux", "a prompt"]) == 2
    assert "has a prompt of its own: leave out 'a prompt'" in capsys.readouterr().err
    assert main.run(["generate"]) == 2
    assert "no model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "3"], "has a seed and steps of its own: leave out --seed 3"),
        (["--steps", "2"], "leave out --steps 2"),
        (["--out", "PICTURE"], "is the picture itself: expected another file"),
    ],
)
def test_a_replay_takes_no_other_seed_and_spares_the_picture(
    drawn: list[Path], more: list[str], message: str, capsys: Capture
) -> None:
    before = drawn[0].read_bytes()
    words = [str(drawn[0]) if word == "PICTURE" else word for word in more]
    out = [] if "--out" in words else ["--out", str(drawn[0].parent / "other.png")]
    assert main.run(["generate", "--replay", str(drawn[0]), *words, *out]) == 2
    assert message in capsys.readouterr().err and drawn[0].read_bytes() == before
