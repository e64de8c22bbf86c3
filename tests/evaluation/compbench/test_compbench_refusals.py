"""What the suite refuses: folders that are not whole, references and models that do not fit, places it cannot write."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bittern.errors import UserError
from bittern.evaluation.compbench.judge import Models
from bittern.evaluation.drawing import Settings


def test_folders_that_are_not_whole(
    run: Callable[..., Any], finished: tuple[Path, dict[str, Any]], prompt_files: Path, tmp_path: Path
) -> None:
    place = tmp_path / "given"
    shutil.copytree(finished[0], place)
    shapes = place / "shape" / "samples"

    def refused(**options: Any) -> str:
        with pytest.raises(UserError) as told:
            run("scores", **({"model": None, "images": place, "images_per_prompt": None} | options))
        assert not (tmp_path / "scores").exists()
        return str(told.value)

    assert "expected a folder with pictures such as" in refused(images=tmp_path / "nowhere")
    assert "has no folder of a category" in refused(images=shapes)
    assert "add --prompts with its file" in refused(images=shapes, prompts=None)
    assert "holds 2 pictures of 'a red bee and a blue key': expected 3" in refused(images_per_prompt=3)
    (tmp_path / "color_val.txt").write_text("a tan cup\na missing bee\n")
    assert "has no picture of 'a missing bee'" in refused(prompts=tmp_path / "color_val.txt")
    gone = shapes / "a long pen_000003.png"
    gone.unlink()
    assert "holds 1 pictures of 'a long pen': expected 2, 2 for every prompt" in refused()
    gone.write_bytes(b"no picture")
    (shapes / "a long pen_000002.jpg").write_bytes(b"")
    assert "holds two pictures of the number 000002" in refused()
    (shapes / "a long pen_000002.jpg").rename(shapes / "a long pen.png")
    assert "is not named in the official form" in refused()
    (shapes / "a long pen.png").unlink()
    with pytest.raises(UserError, match=r"a long pen_000003\.png cannot be read"):
        run("scores", model=None, images=place, images_per_prompt=None)
    shutil.rmtree(place / "texture")
    shutil.rmtree(tmp_path / "scores")
    assert "lacks the folder texture" in refused()


def test_references_that_do_not_fit(
    run: Callable[..., Any], finished: tuple[Path, dict[str, Any]], models: Models, owl_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="would draw other noise"):
        run("x", model=None, images=finished[0], images_per_prompt=None, reference="tiny-flux")
    with pytest.raises(UserError, match=r"out has another seed than this run \(3 and not 5\)"):
        run("x", settings=Settings(seed=5, steps=1, batch_size=5), reference=str(finished[0]))
    other = tmp_path / "owl"
    shutil.copytree(owl_folder, other)
    (other / "note.json").write_text("{}")
    with pytest.raises(UserError, match="was judged by another detector than this run"):
        run("x", models=dataclasses.replace(models, detector=str(other)), reference=str(finished[0]))
    assert not (tmp_path / "x").exists()
    base = tmp_path / "base"
    base.mkdir()
    rows = (finished[0] / "results.jsonl").read_text().splitlines()
    (base / "results.jsonl").write_text("\n".join(rows[:5]))
    with pytest.raises(UserError, match="has no verdict on sample 1 of prompt 1000000"):
        run(reference=str(base))
    for damage in (b'{"category": "colour"}', rows[0].encode() + b"\xff"):
        (base / "results.jsonl").write_bytes(damage + b"\n")
        with pytest.raises(UserError, match=r"results\.jsonl:1 is no line of T2I-CompBench's results"):
            run(reference=str(base))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "suite compbench needs a model that draws"),
        ({"prompts": None}, "needs its prompts: add --prompts"),
        ({"images_per_prompt": 0}, "images per prompt is 0: expected 1 to 10,000; leave it out for 10"),
        ({"limit": 7}, "limit 7 leaves tasks without a prompt: expected at least 8"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"reference": "/nowhere"}, "/nowhere"),
        ({"models": Models(blip="/nowhere")}, "--blip /nowhere"),
    ],
)
def test_wrong_requests_fail_before_anything_is_made(
    options: dict[str, Any], message: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run(**options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["blip", "clip", "detector", "depth"])
def test_models_of_another_kind_and_models_that_are_nowhere(
    name: str, run: Callable[..., Any], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = models.clip if name != "clip" else models.blip
    with pytest.raises(UserError, match=rf"--{name} .* is a '\w+': expected a .* such as .*/"):
        run(models=dataclasses.replace(models, **{name: other}))

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    default = getattr(Models(), name)
    with pytest.raises(UserError, match=rf"weights of {default} are not here.*hf download {default} .*--{name} FOLDER"):
        run(models=dataclasses.replace(models, **{name: default}))
    assert not (tmp_path / "out").exists()


def test_what_no_prompt_needs_is_not_asked_for(
    run: Callable[..., Any], models: Models, prompt_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    only = Models("./nowhere", models.clip, "./nowhere", "./nowhere")
    found = run(prompts=prompt_files / "non_spatial_val.txt", models=only, parser=None).to_dict()
    assert list(found["tasks"]) == ["non_spatial"] and found["not_comparable"] == []
    assert found["blip"] is found["parser"] is found["complex_kinds"] is None and found["clip"] == models.clip
    with pytest.raises(UserError, match=r"color, shape, texture and complex need spaCy.*bittern\[compbench\]"):
        run("again", prompts=prompt_files / "color_val.txt", models=models, parser=None)


def test_output_that_cannot_be_written(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file: expected a folder"):
        run("file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="holds something else"):
        run("mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
