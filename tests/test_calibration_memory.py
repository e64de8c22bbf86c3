"""Calibrating in little memory gives the bytes of calibrating in much, whatever happens on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

import bittern
from bittern import folders, pipelines, recipes, threads
from bittern.architectures import Job, plan
from bittern.errors import UserError
from bittern.quantization import Limits, calibration, calibration_bytes, stored, stream
from bittern.quantization.jobs import blocks_of
from bittern.quantization.preview import skeleton
from bittern.recipes import Recipe
from bittern.trajectories import place, sampler
from bittern.trajectories.placement import weight_bytes

NewPipeline = Callable[[], FluxPipeline]
PROMPTS = ["a red circle", "two stars", "a cat on a mat"]
PLENTY = Limits(None, 2**40)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Everything that is recorded: rows, Gram matrices of the modulation, sensitivities."""
    default = {"rank": 4, "svd_iterations": 1, "smoothing": "none"}
    return recipes.load("svdquant").override(name="small", samples=4, rows=96, default=default | {"sensitivity": True})


@pytest.fixture(params=["flux", pytest.param("unet", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tiny_random_folder: Path) -> Path:
    return tiny_random_folder if request.param == "flux" else request.getfixturevalue("unet_folder")


@dataclass(frozen=True)
class Tight(Limits):
    """Limits that make one pass for each block, and leave most weights on the host."""

    room: int

    @classmethod
    def around(cls, folder: Path, recipe: Recipe) -> Tight:
        blank = skeleton(folder / pipelines.denoiser_name(folder))[0]
        made = plan(blank, recipe)
        costs = [calibration_bytes(jobs, recipe.rows, 4) for _, jobs in blocks_of(made)]
        blocks = sum(weight_bytes(blank.get_submodule(path)) for path in stored.blocks_of(blank, made))
        largest = max(cost.device for cost in costs)
        return cls(8 * largest, max(cost.host for cost in costs), weight_bytes(blank) - blocks + 1000)

    def weights(self, jobs: Sequence[Job], beside: int = 0) -> int:
        return self.room


def interrupt(*_given: Any, **_named: Any) -> None:
    raise KeyboardInterrupt


def weights(folder: Path) -> bytes:
    name = pipelines.denoiser_name(folder)
    return (folder / name / "diffusion_pytorch_model.safetensors").read_bytes()


def test_little_memory_gives_the_same_bytes(
    folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipelines.load(folder)
    bittern.quantize(pipe, recipe, prompts=PROMPTS, limits=PLENTY)
    name = pipelines.denoiser_name(folder)
    getattr(pipe, name).save_pretrained(tmp_path / "memory")
    folders.quantize_folder(folder, recipe, tmp_path / "plenty", prompts=PROMPTS, limits=PLENTY)
    waiting: list[int] = []
    monkeypatch.setattr(stored, "place", lambda *given: waiting.append(place(*given)) or waiting[-1])
    said: list[str] = []
    # Not small any more: blocks run again in the backward pass.
    monkeypatch.setattr(threads, "SMALL_MODEL", 0)
    with threads.one_thread(True):
        folders.quantize_folder(
            folder,
            recipe,
            tmp_path / "tight",
            prompts=PROMPTS,
            limits=Tight.around(folder, recipe),
            progress=lambda what, *_: said.append(what),
        )
    assert len(waiting) > 1 and min(waiting) > weight_bytes(skeleton(folder / name)[0]) / 4
    assert said[0].startswith(f"calibrating in {len(waiting)} passes, each with at most ")
    assert weights(tmp_path / "plenty") == weights(tmp_path / "tight")
    assert weights(tmp_path / "tight") == (tmp_path / "memory/diffusion_pytorch_model.safetensors").read_bytes()


def test_texts_are_encoded_once_and_the_encoders_are_gone_when_the_denoiser_runs(
    folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = type(pipelines.load(folder))
    encoded: list[str] = []
    own = pipeline.encode_prompt

    def spy(pipe: Any, prompt: str, *args: Any, **kwargs: Any) -> Any:
        assert pipe.text_encoder is not None
        assert all(parameter.is_meta for parameter in pipe.components[pipelines.denoiser_name(folder)].parameters())
        encoded.append(prompt)
        return own(pipe, prompt, *args, **kwargs)

    real, drew = sampler.sample, list[bool]()

    def sample(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        drew.append(all(getattr(pipe, name, None) is None for name in ("text_encoder", "text_encoder_2")))
        return real(pipe, *args, **kwargs)

    monkeypatch.setattr(pipeline, "encode_prompt", functools.wraps(own)(lambda *a, **k: spy(*a, **k)))
    monkeypatch.setattr(stored, "sample", sample)
    monkeypatch.setattr(calibration, "record", interrupt)
    recipe = recipe.override(samples=9)
    limits = Tight.around(folder, recipe)
    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(folder, recipe, tmp_path / "out", prompts=PROMPTS[:2], limits=limits)
    assert sorted(encoded) == sorted(PROMPTS[:2])
    assert drew == [True]


def test_an_interrupted_run_repeats_the_pass_in_hand_at_most(
    unet_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of a pass; what was drawn is not drawn again, and finished blocks are not solved."""
    recipe = recipe.override(default={"sensitivity": False})
    whole, out = tmp_path / "whole", tmp_path / "out"
    solved: list[tuple[str, ...]] = []
    recorded: list[list[str]] = []
    real, record = stream.solve_job, calibration.record
    monkeypatch.setattr(stream, "solve_job", lambda job, *rest: solved.append(job.paths) or real(job, *rest))
    monkeypatch.setattr(
        calibration, "record", lambda model, paths, *a, **k: recorded.append(paths) or record(model, paths, *a, **k)
    )
    tight = Tight.around(unet_folder, recipe)
    limits = replace(tight, records=2 * tight.records)
    folders.quantize_folder(unet_folder, recipe, whole, prompts=PROMPTS, limits=limits)
    jobs, wanted = sorted(solved), sum(map(len, recorded))
    largest = max(map(len, recorded))
    assert len(recorded) > 2

    def progress(what: str, done: float, _total: float) -> None:
        if what.startswith("solving") and done == 3:
            raise KeyboardInterrupt

    solved.clear()
    recorded.clear()
    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(unet_folder, recipe, out, prompts=PROMPTS, limits=limits, progress=progress)
    work = folders.workspace_of(out)
    assert len(list(work.glob("*.safetensors"))) == 3 + 1
    monkeypatch.setattr(stored, "sample", None)
    folders.quantize_folder(unet_folder, recipe, out, prompts=PROMPTS, limits=limits)
    assert sorted(solved) == jobs
    assert wanted <= sum(map(len, recorded)) <= wanted + largest
    assert weights(out) == weights(whole)
    assert not work.exists()


def test_a_mistake_in_the_middle_leaves_finished_blocks(
    tiny_random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", stream.solve_job
    error: list[Exception] = [UserError("a layer is odd"), torch.OutOfMemoryError("CUDA out of memory")]

    def solve(job: Job, *rest: Any) -> Any:
        if job.paths[0].startswith("single") and error:
            raise error.pop()
        return real(job, *rest)

    monkeypatch.setattr(stream, "solve_job", solve)
    with pytest.raises(UserError, match=r"out of memory \(CUDA out of memory\): allow .*; 1 finished blocks are kept"):
        folders.quantize_folder(tiny_random_folder, "int4", out)
    with pytest.raises(UserError, match="a layer is odd"):
        folders.quantize_folder(tiny_random_folder, "int4", out)
    assert [file.name for file in folders.workspace_of(out).glob("*.safetensors")] == [
        "0000.transformer_blocks.0.safetensors"
    ]
    folders.quantize_folder(tiny_random_folder, "int4", out)
    assert not folders.workspace_of(out).exists()


def test_limits_that_are_too_narrow_are_refused_before_anything_is_drawn(
    tiny_random_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "sample", None)
    for limits, message in (
        (
            Limits(None, 1000),
            r"records of 0000\.transformer_blocks\.0 take at least .* MiB of the host, and 0\.00 MiB are allowed",
        ),
        (Limits(1000, 2**40), r"sums over the inputs and outputs of 0000\.transformer_blocks\.0 take .* device memory"),
    ):
        with pytest.raises(UserError, match=message):
            folders.quantize_folder(tiny_random_folder, recipe, tmp_path / "out", prompts=PROMPTS, limits=limits)
    with pytest.raises(UserError, match="record memory 0: expected more than 0 bytes"):
        Limits.of("cpu", records=0)
    assert list(tmp_path.iterdir()) == []
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with pytest.raises(UserError, match="those outside the blocks take"):
        place(model, ["1"], torch.device("cpu"), room=439)


def test_records_take_no_more_rows_than_there_are_tokens(tiny_random_folder: Path, tmp_path: Path) -> None:
    """Two samples have 2 x (256 + 16) tokens, and some in the smaller arguments; rows are for 16,384."""
    recipe = recipes.load("int4-gptq").override(rows=16384)
    blank = skeleton(tiny_random_folder / "transformer")[0]
    jobs = [jobs for _, jobs in blocks_of(plan(blank, recipe))]
    asked, there = (max(calibration_bytes(part, rows, 4).host for part in jobs) for rows in (16384, 700))
    assert there < asked / 10
    limits = Limits(None, there)
    given: dict[str, Any] = {"prompts": PROMPTS, "samples": 2}
    folders.quantize_folder(tiny_random_folder, recipe, tmp_path / "tight", limits=limits, **given)
    folders.quantize_folder(tiny_random_folder, recipe, tmp_path / "plenty", limits=PLENTY, **given)
    assert weights(tmp_path / "tight") == weights(tmp_path / "plenty")
    with pytest.raises(UserError, match=r"records of 0000\.\S+ take \d\.\d\d MiB of the host") as refused:
        folders.quantize_folder(tiny_random_folder, recipe, tmp_path / "out", limits=Limits(None, there // 2), **given)
    said = float(str(refused.value).split(" take ")[1].split()[0])
    assert said * 2**20 <= there


def test_a_model_that_is_placed_in_part_computes_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(4)))
    x = torch.randn(3, 10)
    expected = model(x)
    assert place(model, ["1", "2", "3"], torch.device("cpu"), room=2 * 440) == 2 * 440
    assert [layer.weight.is_meta for layer in model] == [False, False, True, True]
    assert torch.equal(model(x), expected)
    assert [layer.weight.is_meta for layer in model] == [False, False, True, True]
