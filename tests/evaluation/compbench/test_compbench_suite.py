"""The suite from prompts to scores on a random pipeline: layout, official results, references, refusals."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bittern
from bittern.cli import main
from bittern.evaluation import hosted
from bittern.evaluation.clip import Clip
from bittern.evaluation.compbench import rules
from bittern.evaluation.compbench.blip import Blip
from bittern.evaluation.compbench.depth import Depth
from bittern.evaluation.compbench.detector import NamedDetector
from bittern.evaluation.compbench.judge import Models
from bittern.evaluation.compbench.prompts import CATEGORIES, read_prompts
from bittern.evaluation.drawing import Artist
from bittern.evaluation.generate import read_metadata

Capture = pytest.CaptureFixture[str]
# The folders in which the official scorers leave their vqa_result.json.
OFFICIAL = {
    "color": ["annotation_blip"],
    "shape": ["annotation_blip"],
    "texture": ["annotation_blip"],
    "spatial": ["labels/annotation_obj_detection_2d"],
    "3d_spatial": ["labels/annotation_obj_detection_3d"],
    "numeracy": ["annotation_num"],
    "non_spatial": ["annotation_clip"],
    "complex": ["annotation_3_in_1", "annotation_blip", "annotation_clip", "labels/annotation_obj_detection_2d"],
}


def pictures(place: Path) -> dict[str, bytes]:
    return {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*.png")}


def results(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]


def answers(place: Path) -> dict[str, list[dict[str, Any]]]:
    return {str(f.relative_to(place)): json.loads(f.read_text()) for f in place.rglob("vqa_result.json")}


def test_layout_and_results_are_the_official_ones(finished: tuple[Path, dict[str, Any]], prompt_files: Path) -> None:
    out, told = finished
    requests = read_prompts(prompt_files)
    names = [f"{r.tag}/samples/{r.prompt}_{2 * r.number + k:06d}.png" for r in requests for k in range(2)]
    assert sorted(pictures(out)) == sorted(names)
    for index, name in enumerate(names):
        made = read_metadata(out / name)
        assert (made["prompt"], made["seed"]) == (requests[index // 2].prompt, str(3 + index))
    files = answers(out)
    assert sorted(files) == sorted(f"{c}/{part}/vqa_result.json" for c, parts in OFFICIAL.items() for part in parts)
    rows = {row["filename"]: row for row in results(out)}
    assert list(rows) == names
    for file, listed in files.items():
        assert [each["question_id"] for each in listed] == [0, 1, 2, 3]
        assert all(set(each) == {"question_id", "answer"} for each in listed)
        # BLIP's answers are texts of four places, as the official scorer writes them; the others are numbers.
        for each in listed:
            if "blip" in file:
                assert re.fullmatch(r"[01]\.\d{4}", each["answer"])
            else:
                assert isinstance(each["answer"], float | int)
    means = {}
    for category, (first, *_) in OFFICIAL.items():
        values = [float(each["answer"]) for each in files[f"{category}/{first}/vqa_result.json"]]
        assert values == [row["score"] for row in rows.values() if row["category"] == category]
        means[category] = sum(values) / 4
    assert told["tasks"] == pytest.approx(means) and list(told["tasks"]) == list(CATEGORIES)
    assert told["overall"] == pytest.approx(sum(means.values()) / 8)
    assert (told["suite"], told["images"], told["prompts"], told["size"]) == ("compbench", 32, 16, "32x32")
    assert told["not_comparable"] == ["spatial", "3d_spatial", "numeracy", "complex"]
    assert told["detector_threshold"] == 0.2 and told["complex_kinds"] is False and told["parser"] == "by hand 1"
    assert told["judge"] == json.loads((out / "judge.json").read_text())
    assert set(told["judge"]) == {"rules", "blip", "clip", "detector", "depth", "parser"}
    # Two prompts of a category: the error is half their difference.
    color = [row["score"] for row in rows.values() if row["category"] == "color"]
    assert told["tasks_stderr"]["color"] == pytest.approx(abs(sum(color[:2]) - sum(color[2:])) / 4)
    # The random models do see things: scoring was not idle.
    assert any(row["details"].get("objects") for row in rows.values())
    assert len({row["score"] for row in rows.values()}) > 12


def test_scores_follow_from_the_models_and_the_rules(
    finished: tuple[Path, dict[str, Any]], prompt_files: Path, models: Models, parser: Any
) -> None:
    out, _ = finished
    blip, clip = Blip.load(Path(models.blip)), Clip.load(Path(models.clip))
    owl, depth = NamedDetector.load(Path(models.detector)), Depth.load(Path(models.depth))
    requests = {(r.tag, r.prompt): r for r in read_prompts(prompt_files)}

    def cosine(image: Image.Image, text: str) -> float:
        return float(clip.see([image])[0] @ clip.read([text])[0])

    def product(image: Image.Image, prompt: str) -> float:
        shares = blip.yes(image, [f"{phrase.lower()}?" for phrase in parser(prompt).phrases])
        return round(float(np.prod([round(share, 4) for share in shares])), 4)

    for row in results(out):
        image, request = hosted.open_rgb(out / row["filename"]), requests[row["category"], row["prompt"]]
        asked = request.relation
        expected: dict[str, float]
        match row["category"]:
            case "color" | "shape" | "texture":
                expected = {"blip": product(image, row["prompt"])}
            case "spatial":
                expected = {"spatial": rules.spatial(asked, owl(image, [asked.first, asked.second]))}
            case "3d_spatial":
                seen = owl(image, [asked.first, asked.second])
                expected = {"3d_spatial": rules.spatial(asked, seen, lambda image=image: depth(image))}
            case "numeracy":
                seen = owl(image, [rules.counted_name(name) for name, _ in request.counts])
                expected = {"numeracy": rules.numeracy(request.counts, seen)}
            case "non_spatial":
                expected = {"clip": cosine(image, row["prompt"])}
            case _:
                words = parser(row["prompt"]).words
                asked = rules.complex_relation(row["prompt"], words)
                placed = rules.spatial(asked, owl(image, [asked.first, asked.second])) if asked else 0.0
                text = " ".join(word for word, part in words if part != "ADJ")
                expected = {"blip": product(image, row["prompt"]), "spatial": placed, "clip": cosine(image, text)}
                expected["3_in_1"] = sum(expected.values()) / 3
        assert row["scores"] == pytest.approx(expected, abs=1e-5), row["prompt"]
        assert row["score"] == row["scores"][list(expected)[-1]]


def test_a_run_goes_on_and_judges_nothing_twice(
    run: Callable[..., Any], prompt_files: Path, owl_folder: Path, models: Models, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    drawn: Counter[tuple[str, int]] = Counter()
    draw, calls = Artist.draw, 0

    def counting(self: Artist, prompts: list[str], *, seed: int, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        drawn.update((prompt, seed + i) for i, prompt in enumerate(prompts))
        return draw(self, prompts, seed=seed, **options)

    monkeypatch.setattr(Artist, "draw", counting)
    with pytest.raises(KeyboardInterrupt):
        run()
    first = run()
    assert set(drawn.values()) == {1} and len(drawn) == 32
    notes = tmp_path / "out" / "verdicts.0.jsonl"
    assert len(notes.read_text().splitlines()) == 32
    with monkeypatch.context() as patch:
        patch.setattr(Blip, "load", None)
        patch.setattr(NamedDetector, "load", None)
        assert run().to_dict() == first.to_dict()
    # Another detector judges anew what rests on it: four categories of four pictures.
    other = tmp_path / "owl"
    shutil.copytree(owl_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "another"}))
    run(models=dataclasses.replace(models, detector=str(other)))
    assert len(notes.read_text().splitlines()) == 32 + 16
    assert set(drawn.values()) == {1}


def test_given_pictures_get_the_same_scores(
    run: Callable[..., Any], finished: tuple[Path, dict[str, Any]], prompt_files: Path, tmp_path: Path
) -> None:
    out, told = finished
    options = {"model": None, "images": out, "images_per_prompt": None}
    for prompts in (None, prompt_files):
        again = run("scores", prompts=prompts, force=True, **options).to_dict()
        assert answers(tmp_path / "scores") == answers(out) and not list((tmp_path / "scores").rglob("*.png"))
        assert again["tasks"] == told["tasks"] and again["model"] is None and again["seed"] is None
    # One category's folder, as the official scorers take it; the pictures may be JPEGs and lie in the folder itself.
    flat = tmp_path / "flat"
    shutil.copytree(out / "color" / "samples", flat)
    one = run("flat-scores", prompts=prompt_files / "color_val.txt", **(options | {"images": flat}))
    assert one.to_dict()["tasks"] == {"color": told["tasks"]["color"]}
    for file in flat.iterdir():
        Image.open(file).save(file.with_suffix(".jpg"), quality=95)
        file.unlink()
    assert run("jpeg", prompts=prompt_files / "color_val.txt", **(options | {"images": flat})).to_dict()["images"] == 4


def test_prompts_that_stand_twice_have_pictures_of_their_own(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "spatial_val.txt").write_text("a bee near a key\na boy near a cup\na bee near a key\n")
    run("twice", prompts=tmp_path / "spatial_val.txt")
    options = {"model": None, "prompts": tmp_path / "spatial_val.txt", "images_per_prompt": None}
    run("scores", images=tmp_path / "twice", **options)
    assert [r["question_id"] for r in results(tmp_path / "scores")] == [0, 1, 2, 3, 4, 5]
    assert results(tmp_path / "scores") == results(tmp_path / "twice")


def test_kinds_of_complex_prompts_are_scored_as_such(
    run: Callable[..., Any], prompt_files: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    shutil.copy(prompt_files / "complex_val.txt", folder)
    first, second = (prompt_files / "complex_val.txt").read_text().splitlines()
    (folder / "complex_val_spatial.txt").write_text(first)
    (folder / "complex_val_action.txt").write_text(second)
    assert run(prompts=folder).to_dict()["complex_kinds"] is True
    for row in results(tmp_path / "out"):
        parts = ("blip", "spatial") if row["number"] == 0 else ("blip", "clip")
        assert row["score"] == pytest.approx(sum(row["scores"][part] for part in parts) / 2)


def test_a_finished_run_is_paired_prompt_by_prompt(
    run: Callable[..., Any], finished: tuple[Path, dict[str, Any]], new_tiny_random_pipeline: Callable[[], Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    few = new_tiny_random_pipeline()
    bittern.quantize(few, "ternary-fast")
    few.save_pretrained(tmp_path / "few")
    told = run(model=str(tmp_path / "few"), reference=str(finished[0])).to_dict()
    assert not (tmp_path / "out" / "reference").exists()
    gaps: dict[str, list[float]] = {}
    for one, other in zip(results(tmp_path / "out"), results(finished[0]), strict=True):
        assert one["filename"] == other["filename"]
        gaps.setdefault(one["category"], []).append(one["score"] - other["score"])
    means = {category: sum(values) / 4 for category, values in gaps.items()}
    assert any(means.values())
    assert {category: one["mean"] for category, one in told["differences"].items()} == pytest.approx(means)
    assert told["difference"]["mean"] == pytest.approx(sum(means.values()) / 8) and told["difference"]["n"] == 16
    assert told["reference_scores"]["tasks"] == pytest.approx(finished[1]["tasks"])
    for one in (told["difference"], *told["differences"].values()):
        assert one["low"] <= one["mean"] <= one["high"] and "claim" in one


def test_a_model_as_the_reference_is_drawn_from_the_same_noise(
    run: Callable[..., Any], new_tiny_random_pipeline: Callable[[], Any], finished: tuple[Path, dict[str, Any]],
    tiny_random_folder: Path, tmp_path: Path, prompt_files: Path,
) -> None:  # fmt: skip
    few = new_tiny_random_pipeline()
    bittern.quantize(few, "ternary-fast")
    few.save_pretrained(tmp_path / "few")
    told = run(
        model=str(tmp_path / "few"), reference=str(tiny_random_folder), prompts=prompt_files / "color_val.txt"
    ).to_dict()
    base = results(tmp_path / "out" / "reference")
    assert told["reference"] == str(tiny_random_folder)
    assert [row["score"] for row in base] == [
        row["score"] for row in results(finished[0]) if row["category"] == "color"
    ]
    gaps = [one["score"] - other["score"] for one, other in zip(results(tmp_path / "out"), base, strict=True)]
    assert told["differences"]["color"]["mean"] == pytest.approx(sum(gaps) / 4) == told["difference"]["mean"]


def test_one_prompt_claims_no_certainty(
    run: Callable[..., Any], new_tiny_random_pipeline: Callable[[], Any], tiny_random_folder: Path,
    prompt_files: Path, tmp_path: Path,
) -> None:  # fmt: skip
    few = new_tiny_random_pipeline()
    bittern.quantize(few, "ternary-fast")
    few.save_pretrained(tmp_path / "few")
    options = {"model": str(tmp_path / "few"), "reference": str(tiny_random_folder), "limit": 1}
    told = run(prompts=prompt_files / "color_val.txt", **options).to_dict()
    assert told["overall_stderr"] is None and told["tasks_stderr"] == {"color": None}
    assert told["reference_scores"]["overall_stderr"] is None
    for gap in (told["difference"], told["differences"]["color"]):
        assert gap["low"] is gap["high"] is None and "its error is not known" in gap["claim"]


def command(out: Path, model: Path, prompts: Path, models: Models) -> list[str]:
    return [
        "evaluate", str(model), "--suite", "compbench", "--prompts", str(prompts), "--detector", models.detector,
        "--depth", models.depth, "--blip", models.blip, "--clip", models.clip, "--images-per-prompt", "1", "--steps",
        "1", "--batch-size", "3", "--out", str(out), "--json",
    ]  # fmt: skip


def test_the_command(
    tiny_random_folder: Path, prompt_files: Path, models: Models, parser: Any, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("bittern.evaluation.compbench.phrases.load", lambda: parser)
    words = command(tmp_path / "cb", tiny_random_folder, prompt_files, models)
    assert main.run([*words, "--force"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 16 and told["results"] == str(tmp_path / "cb" / "results.jsonl")
    again = command(tmp_path / "again", tiny_random_folder, prompt_files, models)
    assert main.run([*again[:-1], "--reference", str(tmp_path / "cb")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3d_spatial" in shown and "16 pictures of 16 prompts" in shown
    assert "spatial, 3d_spatial, numeracy, complex rest on another detector than published scores" in shown
    assert "complex is the mean of three for every prompt" in shown
    assert "T2I-CompBench score cannot be told apart" in shown and "color cannot be told apart" in shown
    assert main.run(["evaluate", "tiny-flux", "--suite", "compbench", "--metadata", "x"]) == 2
    assert "takes no --metadata: it is for --suite geneval" in " ".join(capsys.readouterr().err.split())
    assert main.run(["evaluate", "tiny-flux", "--suite", "geneval", "--depth", "x"]) == 2
    assert "takes no --depth: it is for --suite compbench" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(
    tiny_random_folder: Path, prompt_files: Path, models: Models, tmp_path: Path, capsys: Capture
) -> None:
    few = tmp_path / "prompts"
    few.mkdir()
    for category in ("spatial", "3d_spatial", "numeracy", "non_spatial"):
        shutil.copy(prompt_files / f"{category}_val.txt", few)
    assert main.run(command(tmp_path / "one", tiny_random_folder, few, models)) == 0
    one = json.loads(capsys.readouterr().out)
    words = command(tmp_path / "two", tiny_random_folder, few, models)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bittern.cli.main"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    assert results(tmp_path / "one") == results(tmp_path / "two")
    assert answers(tmp_path / "one") == answers(tmp_path / "two")
    assert one | {"results": ""} == two | {"results": ""}
    assert len(list((tmp_path / "two").glob("verdicts.*.jsonl"))) == 2
