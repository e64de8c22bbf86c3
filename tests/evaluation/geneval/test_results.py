"""Runs of the suite in a comparison: which model they are of, and which of them may stand beside each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bittern
from bittern.cli import main
from bittern.errors import UserError
from bittern.evaluation.drawing import Settings
from bittern.evaluation.geneval.suite import evaluate
from bittern.evaluation.results import gather, read
from bittern.evaluation.stats import paired_difference

Runs = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def runs(
    tiny_random_folder: Path,
    new_tiny_random_pipeline: Callable[[], Any],
    twelve: Path,
    detector_folder: Path,
    clip_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """A few-bit model, its run, and in that the reference's."""
    place = tmp_path_factory.mktemp("runs")
    few = new_tiny_random_pipeline()
    bittern.quantize(few, "ternary-fast")
    few.save_pretrained(place / "few")
    models = {"detector_model": str(detector_folder), "clip_model": str(clip_folder)}
    evaluate(
        str(place / "few"), twelve, place / "run", reference=str(tiny_random_folder), images_per_prompt=2,
        settings=Settings(steps=1), **models,
    )  # fmt: skip
    return place / "few", place / "run", place / "run" / "reference"


def changed(run: Path, to: Path, **values: Any) -> Path:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("reference"))
    told = json.loads((to / "run.json").read_text()) | values
    (to / "run.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return to


def test_models_are_told_by_their_weights(runs: Runs, tiny_random_folder: Path, tmp_path: Path) -> None:
    few, run, reference = runs
    moved = tmp_path / "moved"
    shutil.copytree(few, moved)
    first, second, third = gather([run], [str(tiny_random_folder), str(moved), "tiny-flux"])
    assert first is not None and first.folder == reference and first.judged.score == read(reference).judged.score
    assert second is not None and second.folder == run and third is None
    assert gather([], ["a", "b"]) == [None, None]
    assert gather([run, reference], [str(tiny_random_folder), str(moved)])[0] is not None


def test_the_report_shows_them(
    runs: Runs, tiny_random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, run, reference = runs
    words = ["compare", str(tiny_random_folder), str(few), "--limit", "6", "--steps", "1", "--results", str(run)]
    words += ["--report", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")]
    assert main.run([*words, "--json"]) == 0
    base, model = (each["geneval"] for each in json.loads(capsys.readouterr().out)["models"])
    one, other = (read(place).judged.score for place in (run, reference))
    assert (base["overall"], model["overall"]) == (other.overall.mean, one.overall.mean)
    assert base["difference"] is None and model["images"] == 24
    assert model["difference"]["claim"] == paired_difference(one.outcomes, other.outcomes).claim
    page = (tmp_path / "r.html").read_text()
    assert "GenEval score by task" in page and f"<span>{run}</span>" in page
    assert "GenEval task" in (tmp_path / "r.md").read_text()
    assert main.run(words) == 0
    assert "GenEval score cannot be told apart" in capsys.readouterr().out


def test_what_is_no_run_of_these_models_is_refused(runs: Runs, tiny_random_folder: Path, tmp_path: Path) -> None:
    few, run, reference = runs
    models = [str(tiny_random_folder), str(few)]

    def refused(*places: Path, models: list[str] = models) -> str:
        with pytest.raises(UserError) as told:
            gather(places, models)
        return str(told.value)

    assert "holds no GenEval run" in refused(few) and "holds no GenEval run" in refused(tmp_path / "nowhere")
    assert "pictures of an unknown model" in refused(changed(run, tmp_path / "given", model=None))
    (changed(run, tmp_path / "half") / "results.jsonl").unlink()
    assert "half has not finished" in refused(tmp_path / "half")
    assert "weights that no compared model has" in refused(run, models=["tiny-flux"])
    assert "are runs of one model" in refused(run, changed(run, tmp_path / "twice"))
    for key, what in {
        "seed": "another seed",
        "metadata": "another set of prompts",
        "steps": "another number of steps",
    }.items():
        assert what in refused(changed(run, tmp_path / key, **{key: 7}), reference)
    for key, what in {"detector": "another detector", "clip": "another clip", "rules": "other rules"}.items():
        other = changed(reference, tmp_path / f"other-{key}")
        told = json.loads((other / "judge.json").read_text())
        (other / "judge.json").write_text(json.dumps(told | {key: 7}))
        assert f"was judged by {what}" in refused(run, other)
        (other / "judge.json").unlink()
        assert "does not say who judged its pictures" in refused(run, other)
    torn = changed(reference, tmp_path / "torn")
    (torn / "results.jsonl").write_text("\n".join((torn / "results.jsonl").read_text().splitlines()[:-1]) + "\n")
    assert "verdicts on other pictures" in refused(run, torn)


def test_the_last_judge_counts_and_not_every_one_that_ever_was(
    runs: Runs, tiny_random_folder: Path, twelve: Path, detector_folder: Path, clip_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    few, run, reference = runs
    shutil.copytree(detector_folder, tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 96, "longest_edge": 96}}')
    again = changed(reference, tmp_path / "again")
    options = {"images_per_prompt": 2, "settings": Settings(steps=1), "clip_model": str(clip_folder)}
    models, judge = [str(tiny_random_folder), str(few)], again / "judge.json"

    def judged_by(detector: Path) -> dict[str, Any]:
        return evaluate(models[0], twelve, again, detector_model=str(detector), **options).to_dict()["judge"]

    first = judged_by(detector_folder)
    assert first == json.loads(judge.read_text()) and set(first) == {"rules", "detector", "clip"}
    assert gather([run, again], models)[0] is not None
    other = judged_by(tmp_path / "other")
    assert other == json.loads(judge.read_text()) and {k for k in first if first[k] != other[k]} == {"detector"}
    with pytest.raises(UserError, match="was judged by another detector than"):
        gather([run, again], models)
    # A kill while results are written leaves none that would pass for the other's.
    with monkeypatch.context() as patch:
        patch.setattr("bittern.evaluation.geneval.verdicts.GenEvalJudge.tell", None)
        with pytest.raises(TypeError):
            judged_by(detector_folder)
    with pytest.raises(UserError, match="does not say who judged"):
        gather([run, again], models)
    # Judged by the first one again, from verdicts that it reached before.
    assert judged_by(detector_folder) == first and gather([run, again], models)[0] is not None
