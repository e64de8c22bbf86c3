from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

import bittern
from bittern.errors import UserError
from bittern.evaluation import scenes
from bittern.evaluation.compare import compare
from bittern.evaluation.drawing import Artist, Settings, draw, path_name
from bittern.evaluation.suites import default_limit, evaluate, score_scenes

FIXED_KEYS = {"suite", "overall", "tasks", "fidelity", "images", "seed", "path", "versions"}
QUICK = Settings(seed=5, steps=1)


@pytest.fixture(scope="module")
def few_bit(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> FluxPipeline:
    pipe = new_tiny_random_pipeline()
    bittern.quantize(pipe, "ternary-fast")
    return pipe


def test_the_worlds_own_drawings_score_and_land_in_their_tasks() -> None:
    prompts = scenes.held_out(120)
    table = scenes.SceneTable.of(prompts)
    images = scenes.draw(scenes.sample(table, torch.arange(120), torch.Generator().manual_seed(1)))
    score = score_scenes(images, prompts)
    assert list(score.tasks) == list(scenes.TASKS)
    assert {len(v) for v in score.outcomes.values()} == {20}
    assert score.overall.mean >= 0.97
    blank = score_scenes(torch.zeros_like(images), prompts)
    assert blank.overall.mean == 0 and blank.overall.stderr > 0


def test_scenes_with_a_reference_gives_every_key(few_bit: FluxPipeline, tiny_random_folder: Path) -> None:
    found = evaluate(few_bit, "scenes", reference=str(tiny_random_folder), limit=6, settings=QUICK)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(told) >= FIXED_KEYS and set(told["fidelity"]) >= {"psnr", "ssim"}
    assert (told["suite"], told["images"], told["seed"], told["steps"]) == ("scenes", 6, 5, 1)
    assert set(told["tasks"]) == set(told["tasks_stderr"]) == set(scenes.TASKS)
    assert told["overall"] == pytest.approx(sum(told["tasks"].values()) / 6)
    assert told["path"] == path_name(told["paths"], "") and sum(told["paths"].values()) > 0
    assert told["reference_path"] == "fp32"
    assert 0 < told["fidelity"]["psnr"] < 100 and told["fidelity"]["ssim"] < 1
    assert told["difference"]["mean"] == pytest.approx(told["overall"] - told["reference_scores"]["overall"])
    assert told["versions"]["torch"] == torch.__version__


def test_a_model_equals_itself(tiny_random_pipeline: FluxPipeline) -> None:
    found = evaluate(tiny_random_pipeline, reference=tiny_random_pipeline, limit=6, settings=QUICK)
    assert found.fidelity and found.difference
    assert found.fidelity.identical == 6 and found.fidelity.mean_psnr.mean == 100.0
    assert found.difference.mean == 0 and not found.difference.significant
    assert found.to_dict()["fidelity"]["ssim"] == pytest.approx(1.0)


def test_scenes_alone_has_no_fidelity(tiny_random_pipeline: FluxPipeline) -> None:
    told = evaluate(tiny_random_pipeline, limit=6, settings=QUICK).to_dict()
    assert told["fidelity"] == {"psnr": None, "ssim": None}
    assert told["reference"] is told["difference"] is told["reference_scores"] is None


def test_prompts_of_the_training_side_are_a_gauge_beside_the_score(tiny_random_pipeline: FluxPipeline) -> None:
    seen = scenes.some_of_training(12)
    assert not any(prompt.held_out for prompt in seen) and [p.tag for p in seen[:6]] == list(scenes.TASKS)
    assert len({prompt.prompt for prompt in seen}) == 12
    asked: list[list[str]] = []
    one = "bittern.evaluation.drawing.Artist.draw"
    with pytest.MonkeyPatch.context() as patch:
        draw = Artist.draw
        patch.setattr(one, lambda self, texts, **more: (asked.append(list(texts)), draw(self, texts, **more))[1])
        found = evaluate(
            tiny_random_pipeline, reference=tiny_random_pipeline, limit=6, settings=QUICK, training_prompts=True
        )
    held_out, learned = [p.prompt for p in scenes.held_out(6)], [p.prompt for p in seen[:6]]
    assert asked == [held_out, learned, held_out, learned]
    assert found.training and found.reference_training
    assert found.training.outcomes == found.reference_training.outcomes and len(found.training.tasks) == 6
    told = json.loads(json.dumps(found.to_dict()))
    assert told["training_scores"] == told["reference_training_scores"] and "overall" in told["training_scores"]
    assert evaluate(tiny_random_pipeline, limit=6, settings=QUICK).to_dict()["training_scores"] is None
    with pytest.raises(UserError, match="take --suite scenes"):
        evaluate(tiny_random_pipeline, "fidelity", reference=tiny_random_pipeline, training_prompts=True)


def test_fidelity_takes_any_prompts_and_scores_nothing(
    few_bit: FluxPipeline, tiny_random_pipeline: FluxPipeline
) -> None:
    prompts = ["a", "b", "c"]
    found = evaluate(few_bit, "fidelity", reference=tiny_random_pipeline, prompts=prompts, limit=2, settings=QUICK)
    assert found.drawing.prompts == ["a", "b"] and found.score is None
    told = found.to_dict()
    assert told["overall"] is None and told["tasks"] is None and told["images"] == 2
    one = draw(few_bit, ["a", "b"], QUICK).images.double() - draw(tiny_random_pipeline, ["a", "b"], QUICK).images
    psnr = 10 * torch.log10(255**2 / one.square().mean(dim=(1, 2, 3)))
    assert told["fidelity"]["psnr"] == pytest.approx(psnr.mean().item(), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "scene"}, "unknown suite 'scene': did you mean 'scenes'"),
        ({"suite": "fidelity"}, "add --reference"),
        ({"suite": "scenes", "prompts": ["a"]}, "its own held-out prompts"),
        ({"limit": 5}, "limit 5 leaves tasks without a prompt: expected at least 6"),
        ({"suite": "fidelity", "reference": "tiny", "limit": 0}, "limit is 0"),
        ({"reference": "/nowhere"}, "/nowhere"),
    ],
)
def test_wrong_requests_fail_before_anything_is_drawn(
    options: dict[str, object], message: str, tiny_random_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bittern.evaluation.suites.artist", None)
    with pytest.raises(UserError, match=message):
        evaluate(tiny_random_pipeline, **options)  # type: ignore[arg-type]


def test_default_limits() -> None:
    assert default_limit("cpu") == 120
    assert default_limit("cuda:1") == 2048


def test_a_forced_path_is_the_one_that_is_reported(few_bit: FluxPipeline) -> None:
    drawing = draw(few_bit, ["a"], Settings(steps=1, path="a16"), name="few")
    assert drawing.path == "a16" and set(drawing.paths) == {"a16"}
    assert drawing.metadata(0) | {"bittern": "", "device": ""} == {
        "model": "few",
        "prompt": "a",
        "seed": 0,
        "steps": 1,
        "size": "32x32",
        "path": "a16",
        "forced": "a16",
        "dtype": "fp32",
        "device": "",
        "attention": "native",
        "batch": "1 of 1",
        "bittern": "",
    }
    assert draw(few_bit, ["a"], Settings(steps=1, path="auto")).path != "a16"


def test_compare_measures_each_model_against_the_first(
    few_bit: FluxPipeline, tiny_random_pipeline: FluxPipeline, tiny_random_folder: Path
) -> None:
    found = compare(tiny_random_pipeline, [few_bit, str(tiny_random_folder)], limit=6, settings=QUICK)
    one, same = found.others
    assert same.fidelity and one.fidelity and same.fidelity.identical == 6 and one.fidelity.identical == 0
    told = found.to_dict()
    assert [m["model"] for m in told["models"]][2] == str(tiny_random_folder)
    assert told["models"][1]["bits_per_weight"] < 16 and told["models"][0]["bits_per_weight"] == 32
    assert told["models"][1]["bytes"] < told["models"][0]["bytes"]
    assert told["images"] == 6 and found.world is not None


def test_compare_judges_only_when_every_task_is_there(tiny_random_pipeline: FluxPipeline) -> None:
    few = compare(tiny_random_pipeline, [tiny_random_pipeline], limit=2, settings=QUICK)
    own = compare(tiny_random_pipeline, [tiny_random_pipeline], prompts=["a"], settings=QUICK)
    assert few.world is own.world is None
    assert few.reference.score is own.reference.score is None


def test_compare_refuses_what_cannot_be_compared(
    tiny_random_pipeline: FluxPipeline, new_tiny_random_pipeline: Callable[[], FluxPipeline]
) -> None:
    with pytest.raises(UserError, match="expected two or more"):
        compare(tiny_random_pipeline, [])
    larger = new_tiny_random_pipeline()
    larger.vae.register_to_config(sample_size=2 * larger.vae.config.sample_size)
    with pytest.raises(UserError, match="expected one size"):
        compare(tiny_random_pipeline, [larger], limit=1, settings=QUICK)
