"""Calibrated recipes from prompts to checkpoint, on a random pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import bittern
from bittern import folders, pipelines, recipes
from bittern.cli import main
from bittern.errors import UserError
from bittern.evaluation import scenes
from bittern.layers import quant_layers, set_path
from bittern.quantization import calibration_bytes
from bittern.recipes import Recipe

if TYPE_CHECKING:
    from diffusers import FluxPipeline

NewPipeline = Callable[[], "FluxPipeline"]
PROMPTS = ["a red circle", "two stars", "a cat on a mat"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    small = {"rank": 4, "svd_iterations": 1}
    return recipes.load("svdquant").override(name="small", samples=6, rows=96, default=small)


def weight_file(pipe: FluxPipeline, folder: Path) -> Path:
    pipe.transformer.save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


def test_two_runs_give_the_same_bytes_and_the_stages_are_kept(
    new_tiny_random_pipeline: NewPipeline, recipe: Recipe, tmp_path: Path
) -> None:
    files, reports = [], []
    for run in range(2):
        torch.manual_seed(run)
        pipe = new_tiny_random_pipeline()
        reports.append(bittern.quantize(pipe, recipe, prompts=PROMPTS, seed=3))
        files.append(weight_file(pipe, tmp_path / str(run)))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "0/config.json").read_bytes() == (tmp_path / "1/config.json").read_bytes()
    assert reports[0] == reports[1] == bittern.inspect(tmp_path / "0")
    for row in reports[0].rows:
        assert row.stages is not None
        modulated = ".norm" in row.path
        assert (
            list(row.stages) == ["nearest", "gptq"]
            if modulated
            else ["nearest", "smoothing", "descent", "branch", "gptq"]
        )
        assert row.stages["gptq"] < row.stages["nearest"]
    assert json.loads(json.dumps(reports[0].to_dict()))["targets"][0]["stages"] == reports[0].rows[0].stages
    other = new_tiny_random_pipeline()
    bittern.quantize(other, recipe, prompts=["a blue ring"], seed=3)
    assert weight_file(other, tmp_path / "other").read_bytes() != files[0].read_bytes()


@pytest.mark.parametrize("changes", [{}, {"group_size": 64, "packing": "trits", "rank": 4, "smoothing": "columns"}])
def test_ternary_from_disk_and_in_memory_gives_the_same_bytes(
    changes: dict[str, object], tiny_random_folder: Path, tmp_path: Path
) -> None:
    recipe = recipes.load("ternary").override(name="t", samples=6, rows=64, default=changes)
    streamed = tmp_path / "streamed"

    def stop(what: str, done: float, _total: float) -> None:
        if what.startswith("solving") and done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(tiny_random_folder, recipe, streamed, prompts=PROMPTS, seed=3, progress=stop)
    report = folders.quantize_folder(tiny_random_folder, recipe, streamed, prompts=PROMPTS, seed=3)
    pipe = pipelines.load(tiny_random_folder)
    assert bittern.quantize(pipe, recipe, prompts=PROMPTS, seed=3) == report
    file = "diffusion_pytorch_model.safetensors"
    assert weight_file(pipe, tmp_path / "whole").read_bytes() == (streamed / "transformer" / file).read_bytes()
    assert report.ternary_share_blocks == 1.0
    for row in report.rows:
        assert row.stages is not None
        assert list(row.stages) == ["nearest", "gptq", "refit", "sweeps"]
        assert row.stages["sweeps"] < 0.9 * row.stages["nearest"]


def test_it_is_nearer_to_the_original_than_rounding(new_tiny_random_pipeline: NewPipeline, recipe: Recipe) -> None:
    """On a prompt and noise that calibration has not seen, in the model's own output."""
    original = new_tiny_random_pipeline()
    seen: list[dict[str, object]] = []
    handle = original.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True
    )
    generator = torch.Generator().manual_seed(99)
    original("a blue ring", num_inference_steps=3, height=32, width=32, generator=generator, output_type="latent")
    handle.remove()
    plain = recipes.load("svdquant-fast").override(default={"rank": 0, "rounds": 0, "scales": "absmax", "shift": 0.0})
    errors = []
    for chosen, prompts in ((recipe, PROMPTS), (plain, None)):
        pipe = new_tiny_random_pipeline()
        bittern.quantize(pipe, chosen, prompts=prompts)
        set_path(pipe.transformer, "a4")
        missed = whole = 0.0
        with torch.no_grad():
            for kwargs in seen:
                v = original.transformer(**kwargs)[0]
                missed += float((pipe.transformer(**kwargs)[0] - v).square().sum())
                whole += float(v.square().sum())
        errors.append((missed / whole) ** 0.5)
    assert errors[0] < 0.7 * errors[1]


def test_samples_that_cannot_be_drawn_are_said_and_not_recorded(
    tiny_random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, yaml = tmp_path / "p.txt", tmp_path / "w4.yaml"
    texts.write_text("a red star\n")
    yaml.write_text("rows: 64\ndefault: {weight: int4, activations: 16, rounding: gptq}\n")
    command = ["quantize", str(tiny_random_folder), "--recipe", str(yaml), "--prompts", str(texts), "--samples", "500"]
    assert main.run([*command, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    assert shown.count("500 samples: prompts x steps are 1 x 24 = 24, and all of them are taken\n") == 1
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    assert config["recipe"]["samples"] == 24 and config["recipe"]["name"] == "w4[samples=24]"
    assert "w4[samples=24]" in (tmp_path / "out/README.md").read_text()
    said: list[str] = []
    pipe = pipelines.load(tiny_random_folder)
    report = bittern.quantize(pipe, yaml, prompts=["a red star"], samples=500, say=said.append)
    assert report.recipe == "w4[samples=24]" and len(said) == 1
    assert report == bittern.inspect(tmp_path / "out")


def test_held_out_prompts_are_warned_of(tiny_random_folder: Path, tmp_path: Path) -> None:
    recipe = recipes.load("int4-gptq").override(samples=2, rows=64)
    held, training = scenes.held_out(1)[0].prompt, scenes.training_prompts()[0].prompt
    said: list[str] = []
    folders.quantize_folder(
        tiny_random_folder, recipe, tmp_path / "out", prompts=[f" {held.upper()}.", training], say=said.append
    )
    (line,) = said
    assert line.startswith("warning: 1 of 2 calibration prompts are held out for evaluation, ")
    assert held.upper() in line and "\n" not in line
    said.clear()
    folders.quantize_folder(
        tiny_random_folder, recipe, tmp_path / "out", prompts=[training], say=said.append, force=True
    )
    assert said == []


def test_the_command_writes_the_folder_and_shows_the_stages(
    tiny_random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "p.txt"
    texts.write_text("\n".join(PROMPTS))
    yaml = tmp_path / "w4.yaml"
    yaml.write_text("rows: 64\ndefault: {weight: int4, activations: 16, rounding: gptq}\n")
    command = ["quantize", str(tiny_random_folder), "--recipe", str(yaml), "--prompts", str(texts), "--samples", "3"]
    assert main.run([*command, "--out", str(tmp_path / "a"), "--json"]) == 0
    targets = json.loads(capsys.readouterr().out)["targets"]
    assert all(set(row["stages"]) == {"nearest", "gptq"} for row in targets)
    assert main.run([*command, "--out", str(tmp_path / "b")]) == 0
    assert "output error after" in capsys.readouterr().out
    one, two = (
        folder / "transformer/diffusion_pytorch_model.safetensors" for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert one.read_bytes() == two.read_bytes()
    assert bittern.inspect(tmp_path / "a").recipe == "w4[samples=3]"
    image = pipelines.load(tmp_path / "a")(
        "a star", num_inference_steps=1, height=32, width=32, output_type="pt"
    ).images
    assert torch.isfinite(image).all()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (None, "no such file")]
)
def test_unusable_prompts_files_end_before_anything_is_written(
    content: bytes | None, message: str, tiny_random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, out = tmp_path / "p.txt", tmp_path / "out"
    if content is not None:
        texts.write_bytes(content)
    command = ["quantize", str(tiny_random_folder), "--recipe", "svdquant", "--prompts", str(texts), "--out", str(out)]
    assert main.run(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not out.exists()


def test_what_cannot_be_calibrated_is_refused_and_left_as_it_was(
    tiny_random_pipeline: FluxPipeline, recipe: Recipe
) -> None:
    pipe = tiny_random_pipeline
    with pytest.raises(UserError, match="give the whole pipeline, not its FluxTransformer2DModel"):
        bittern.quantize(pipe.transformer, recipe)
    with pytest.raises(UserError, match="no prompts: expected at least one"):
        bittern.quantize(pipe, recipe, prompts=[])
    with pytest.raises(UserError, match="prompt 2 is ' '"):
        bittern.quantize(pipe, recipe, prompts=["a", " "])
    for key, value in (("samples", 0), ("rows", 1)):
        with pytest.raises(UserError, match=f"{key} {value}: expected"):
            recipe.override(**{key: value})
    with pytest.raises(UserError, match=r"unknown key 'default.roundng': did you mean 'rounding'"):
        recipe.override(default={"roundng": "gptq"})
    pipe.transformer.single_transformer_blocks[0].act_mlp = torch.nn.Threshold(1e9, torch.inf)
    with pytest.raises(UserError, match="NaN or infin"):
        bittern.quantize(pipe, recipe, prompts=PROMPTS)
    assert not quant_layers(pipe.transformer)


def test_the_stated_memory_is_what_a_calibration_holds(new_tiny_random_pipeline: NewPipeline, recipe: Recipe) -> None:
    from bittern.architectures import plan
    from bittern.quantization.calibration import recorder_of

    pipe = new_tiny_random_pipeline()
    made = plan(pipe.transformer, recipe)
    found = recorder_of(pipe, pipe.transformer, recipe, PROMPTS, 0).record(made.jobs)
    sums = sum(t.nbytes for t in found.sensitivity.values())
    sums += sum(s.gram.nbytes for s in found.statistics.values() if s.gram is not None)
    held = sum(s.nbytes for s in found.statistics.values()) + sum(t.nbytes for t in found.sensitivity.values())
    stated = calibration_bytes(made.jobs, recipe.rows, 4)
    assert sums == stated.device > 0
    # The adaLN linears see fewer rows than they may.
    assert 0.6 * stated.host < held <= stated.host


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer_2", "scheduler", "vae"])
def test_a_pipeline_that_cannot_draw_is_told_what_it_lacks(
    part: str, new_tiny_random_pipeline: NewPipeline, recipe: Recipe
) -> None:
    pipe = new_tiny_random_pipeline()
    setattr(pipe, part, None)
    with pytest.raises(UserError, match=f"it has no {part}: load it whole"):
        bittern.quantize(pipe, recipe, prompts=PROMPTS)
