"""`bittern generate --lora`: by file and by name, at a strength, into the picture's file and out of it again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

import bittern
from bittern import pipelines, tiny_flux
from bittern.cli import main
from bittern.errors import UserError
from bittern.evaluation import scenes
from bittern.evaluation.drawing import Settings, draw
from bittern.evaluation.generate import generate, read_metadata
from bittern.evaluation.replay import replay

Capture = pytest.CaptureFixture[str]
TARGETS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp")


@pytest.fixture(scope="module")
def few_bit(new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "few"
    pipe = new_tiny_random_pipeline()
    bittern.quantize(pipe, "svdquant-fast")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformer, state = new_tiny_random_pipeline().transformer, {}
    generator = torch.Generator().manual_seed(0)
    for path in TARGETS:
        n, k = transformer.get_submodule(path).weight.shape
        state[f"transformer.{path}.lora_A.weight"] = 0.3 * torch.randn(4, k, generator=generator)
        state[f"transformer.{path}.lora_B.weight"] = 0.3 * torch.randn(n, 4, generator=generator)
    file = tmp_path_factory.mktemp("lora") / "some-style.v2.safetensors"
    save_file(state, file)
    return file


def test_a_picture_with_a_lora_is_the_pipelines_own_and_comes_again(
    few_bit: Path, lora: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["generate", str(few_bit), "a cat", "--seed", "3", "--steps", "2"]
    out = tmp_path / "a.png"
    capsys.readouterr()
    assert main.run([*words, "--lora", str(lora), "--lora-strength", "0.5", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loras"] == [{"file": str(lora), "strength": 0.5}] and told["fused"] is False

    pipe = pipelines.load(few_bit)
    plain = generate(pipe, ["a cat"], seed=3, steps=2)
    pipe.load_lora_weights(str(lora), adapter_name="own")
    pipe.set_adapters("own", 0.5)
    again = replay(out)
    assert torch.equal(again.drawing.images, generate(pipe, ["a cat"], seed=3, steps=2))
    assert again.identical and again.changed == {}
    assert not torch.equal(again.drawing.images, plain)
    metadata = read_metadata(out)
    assert json.loads(metadata["loras"]) == [[str(lora), 0.5]]


def test_a_picture_without_a_lora_says_nothing_of_one(few_bit: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    assert main.run(["generate", str(few_bit), "a cat", "--steps", "1", "--out", str(out)]) == 0
    assert not {"loras", "fused"} & set(read_metadata(out))


def test_a_loaded_pipeline_is_given_its_lora_by_hand(tiny_random_pipeline: FluxPipeline, lora: Path) -> None:
    settings = Settings(steps=1, loras=(pipelines.Lora(str(lora)),))
    with pytest.raises(UserError, match=r"FluxPipeline is loaded already; use bittern\.load_loras on it"):
        draw(tiny_random_pipeline, ["a cat"], settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora", "outlin"], "unknown LoRA 'outlin': did you mean 'outline'?"),
        (["--lora", "no/where.safetensors"], "no LoRA 'no/where.safetensors' here: expected a .safetensors file"),
        (["--lora-strength", "0.5"], "--lora-strength 0.5 is that of a LoRA: give --lora as well"),
        (["--lora", "outline", "--lora-strength", "nan"], "--lora-strength nan: expected a finite number"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    assert main.run(["generate", "tiny-flux", "a cat", "--out", str(tmp_path / "a.png"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_lora_for_it_is_one_line(few_bit: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    state = {
        "transformer.nowhere.lora_A.weight": torch.zeros(4, 8),
        "transformer.nowhere.lora_B.weight": torch.zeros(8, 4),
    }
    save_file(state, other)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10" + b"\0" * 20)
    pipe = pipelines.load(few_bit)
    for file, message in ((other, "2 of 2 tensors match no layer"), (broken, "damaged or incomplete")):
        with pytest.raises(UserError, match=f"{re.escape(str(file))}.*{message}"):
            pipelines.load_lora(pipe, file)


@pytest.mark.parametrize("name", ["green", "outline"])
def test_the_embedded_loras_are_small_and_have_a_card(name: str) -> None:
    assert name in tiny_flux.loras() and set(tiny_flux.loras()) == set(scenes.EFFECTS)
    file = pipelines.resolve_lora(name)
    assert file.stat().st_size < 1_000_000 and file.with_suffix(".json").is_file()
    assert f"`{name}`" in (file.parent / "README.md").read_text()
    assert pipelines.resolve_lora(file) == file
