"""Blocks that are calibrated behind few-bit ones: what they meet, and that nothing else depends on how it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bittern
from bittern import folders, pipelines, recipes
from bittern.architectures import Job
from bittern.errors import UserError
from bittern.layers import quant_layers, swap
from bittern.quantization import Calibration, Limits, component, conductor
from bittern.recipes import Recipe
from bittern.trajectories import record, sample
from test_calibration_memory import Tight, weights

PROMPTS = ["a red circle", "two stars", "a cat on a mat"]
PLENTY = Limits(None, 2**40)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    quick = {"rank": 2, "svd_iterations": 1, "smoothing": "none", "sensitivity": False, "bias_correction": True}
    quick |= {"scales": "absmax"}
    return recipes.load("svdquant").override(
        name="behind", samples=2, rows=64, predecessors="few-bit", default=quick, convolution={"rounding": "nearest"}
    )


@pytest.fixture(params=["flux", "unet"])
def folder(request: pytest.FixtureRequest, tiny_random_folder: Path) -> Path:
    return tiny_random_folder if request.param == "flux" else request.getfixturevalue("unet_folder")


def test_every_way_gives_the_same_bytes(folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    """In memory; from disk, offloaded and with no room for outputs; interrupted."""
    sensitive = pipelines.denoiser_name(folder) == "transformer"
    # Of the U-Net attentions and resamplers are enough: every block takes its time.
    recipe = recipe.override(default={"sensitivity": sensitive}, keep=[] if sensitive else ["*.resnets.*"])
    pipe = pipelines.load(folder)
    bittern.quantize(pipe, recipe, prompts=PROMPTS, limits=PLENTY)
    component(pipe).save_pretrained(tmp_path / "memory")
    expected = (tmp_path / "memory/diffusion_pytorch_model.safetensors").read_bytes()
    assert {layer.path for layer in quant_layers(component(pipe)).values()} == {"auto"}
    said: list[str] = []
    tight = Tight.around(folder, recipe)
    folders.quantize_folder(
        folder, recipe, tmp_path / "tight", prompts=PROMPTS, limits=tight, progress=lambda what, *_: said.append(what)
    )
    assert weights(tmp_path / "tight") == expected
    assert len({what for what in said if what.startswith("loading the denoiser,")}) == 1
    assert sum(what == "loading the denoiser" for what in said) == (2 if sensitive else 1)
    assert any("all of them run every time" in what for what in said)

    def interrupt(what: str, done: float, _total: float) -> None:
        said.append(what)
        if what.startswith("solving") and done == 1:
            raise KeyboardInterrupt

    said.clear()
    given: Any = {"prompts": PROMPTS, "limits": PLENTY}
    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(folder, recipe, tmp_path / "out", **given, progress=interrupt)
    folders.quantize_folder(folder, recipe, tmp_path / "out", **given, progress=lambda what, *_: said.append(what))
    assert weights(tmp_path / "out") == expected
    assert not any("all of them run" in what for what in said)


def test_a_block_meets_what_the_few_bit_blocks_before_it_give(
    folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a model in which the blocks before it, and no others, were exchanged by hand."""
    pipe = pipelines.load(folder)
    model, dense = component(pipe), component(pipelines.load(folder))
    met: dict[str, torch.Tensor] = {}
    real = conductor.solve_job

    def spy(job: Job, modules: Any, seed: int, known: Calibration, *rest: Any) -> Any:
        met[job.paths[0]] = known.statistics[job.paths[0]].rows
        return real(job, modules, seed, known, *rest)

    monkeypatch.setattr(conductor, "solve_job", spy)
    states = sample(pipe, model, PROMPTS, recipe.samples)
    bittern.quantize(pipe, recipe, prompts=PROMPTS)
    before, (path, blocks) = list[str](), cases(folder)
    full = record(dense, [path], states, rows=recipe.rows)[path].rows
    for target, layer in quant_layers(model).items():
        if target.startswith(blocks):
            before.append(target)
            layer.path = "a4" if layer.scheme.activations == 4 else "auto"
            swap(dense, target, layer)
    few = record(dense, [path], states, rows=recipe.rows)[path].rows
    assert len(before) > 5 and torch.equal(met[path], few)
    assert (full - few).norm() / few.norm() > 1e-3


def cases(folder: Path) -> tuple[str, tuple[str, ...]]:
    """A layer, and all blocks before its own: in a U-Net's modules the middle comes last."""
    if pipelines.denoiser_name(folder) == "transformer":
        return "single_transformer_blocks.0.attn.to_q", ("transformer_blocks.0.",)
    return "up_blocks.0.resnets.1.conv1", ("down_blocks.", "mid_block.", "up_blocks.0.resnets.0.")


def test_what_fails_in_the_middle_leaves_the_model_as_it_was(
    tiny_random_folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipelines.load(tiny_random_folder)
    modules = dict(pipe.transformer.named_modules())
    real = conductor.solve_job

    def fail(job: Job, *rest: Any) -> Any:
        if job.paths[0].startswith("single") and len(job.paths) > 1:
            assert quant_layers(pipe.transformer)
            raise UserError("a layer is odd")
        return real(job, *rest)

    monkeypatch.setattr(conductor, "solve_job", fail)
    try:
        bittern.quantize(pipe, recipe, prompts=PROMPTS)
    except UserError:
        # At once: the error still holds the frames of the run.
        assert dict(pipe.transformer.named_modules()) == modules
        assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in modules.values())
    else:
        pytest.fail("expected an error")
