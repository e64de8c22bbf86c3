"""How low one can go: rows that are kept, what is refused, and the page that is made of them."""

from __future__ import annotations

import argparse
import json
import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import how_low
import how_low_page
import how_low_plot
import pytest
import torch
from how_low import OutOfTime, digits, judged, limited, merge, run, stale
from how_low_plot import Panel, Point, picture
from how_low_variants import Variant, distilled, distilled_folder, sized, variants
from torch import nn

from bittern import pipelines, tiny_flux, tiny_flux_ternary
from bittern.errors import UserError
from bittern.evaluation import scenes
from bittern.evaluation.suites import Score


def _arguments(file: Path, *more: str) -> argparse.Namespace:
    small = ["--images", "2", "--steps", "1", "--samples", "1", "--device", "cpu", "--dtype", "float32"]
    return how_low.arguments().parse_args([*small, "--commit", "abc", "--json", str(file), *more])


@pytest.fixture
def one_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is loaded once, however often a test runs the script."""
    monkeypatch.setattr(pipelines, "load", cache(pipelines.load))


@pytest.mark.usefixtures("one_pipeline")
def test_rows_are_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.json"
    first, failed = run(_arguments(file, "--only", "absmean", "distilled"))
    assert not failed
    kept = json.loads(file.read_text())
    assert kept == first and set(kept["rows"]) == {"16 bit", "ternary-distilled", "absmean rounding"}
    rows = kept["rows"]
    embedded = tiny_flux_ternary.path() / "transformer/diffusion_pytorch_model.safetensors"
    trained = rows["ternary-distilled"]
    assert trained["file_bytes"] == embedded.stat().st_size
    assert trained["bits_per_weight"] == rows["absmean rounding"]["bits_per_weight"] == 1.669
    assert trained["psnr"] > rows["absmean rounding"]["psnr"]
    assert set(trained["training"]) == {"overall", "tasks", "difference", "16 bit"}
    assert len(trained["right"]) == 2 and trained["commit"] == "abc"
    assert {row["reference"] for name, row in rows.items() if name != "16 bit"} == {trained["reference"]}

    monkeypatch.setattr(how_low, "measured", None)
    again, failed = run(_arguments(file, "--only", "absmean", "distilled"))
    assert again["rows"] == rows and not failed
    with pytest.raises(UserError, match=r"steps 1 there, 2 here.*choose another file"):
        run(_arguments(file, "--steps", "2"))
    with pytest.raises(UserError, match="--only int99 is in no row's name"):
        run(_arguments(file, "--only", "int99"))


def test_a_variant_that_fails_leaves_the_others_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_bench: object) -> dict[str, object]:
        raise RuntimeError("a kernel")

    good = Variant("good", "int8", lambda _: {"bits_per_weight": 16.0})
    monkeypatch.setattr(how_low, "variants", lambda *_: [Variant("broken", "int8", fail), good])
    record, failed = run(_arguments(tmp_path / "r.json"))
    assert failed == ["broken"] and set(record["rows"]) == {"16 bit", "good"}


def test_the_same_model_scores_the_same_and_what_differs_is_paired() -> None:
    world = scenes.held_out(12)
    tags = [prompt.tag for prompt in world]
    theirs = Score({task: [True, False] for task in scenes.TASKS})
    mine = Score({task: [True, task == "counting"] for task in scenes.TASKS})
    assert judged(theirs, theirs)["difference"]["mean"] == 0
    found = judged(mine, theirs)
    assert found["difference"]["mean"] == pytest.approx(1 / 12, abs=1e-4)
    assert found["difference"]["better"] == 1 and found["difference"]["worse"] == 0
    assert found["tasks"]["counting"]["difference"]["mean"] == 0.5
    assert found["tasks"]["colors"]["difference"]["mean"] == 0
    said = digits(mine, world)
    assert said == "".join("1" if i < 6 or tags[i] == "counting" else "0" for i in range(12))


def test_prompts_of_the_warning_are_learned_ones_all_tasks_alike() -> None:
    bench = SimpleNamespace(world=range(60))
    learned = how_low.Bench.learned.func(bench)
    assert len(learned) == 60 and not any(prompt.held_out for prompt in learned)
    assert [prompt.tag for prompt in learned[:6]] == list(scenes.TASKS)


def test_bytes_of_what_has_no_format_are_those_it_would_store() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "kept": nn.Linear(6, 4)})
    bench = SimpleNamespace(pipe=SimpleNamespace(transformer=model), dense=model, targets=["a"], file_bytes=1000)
    found = sized(bench, {"bits_per_weight": 8.25})
    assert found == {"bits_per_weight": 8.25, "file_bytes": 1000 - 24 * 2 + round(24 * 8.25 / 8), "written": False}


def test_a_distilled_model_is_found_whole_or_alone_or_not_at_all(tmp_path: Path) -> None:
    whole = tiny_flux_ternary.path()
    assert distilled_folder("tiny-flux", None) == whole / "transformer"
    assert distilled_folder("tiny-flux", whole) == whole / "transformer"
    assert distilled_folder("tiny-flux", whole / "transformer") == whole / "transformer"
    assert distilled_folder("some/model", None) is None
    with pytest.raises(UserError, match="holds no model"):
        distilled_folder("tiny-flux", tmp_path)
    names = [variant.name for variant in variants("tiny-flux", None, False)]
    assert len(set(names)) == len(names)
    assert "ternary, int4 convolutions" in [variant.name for variant in variants("tiny-flux", None, True)]


def test_another_distilled_model_is_measured_anew_and_a_strange_one_refused() -> None:
    one = Variant("x", "distilled", lambda _: {}, stamp="1")
    assert stale(None, one) and stale({"sha256": "2"}, one) and not stale({"sha256": "1"}, one)
    bench = SimpleNamespace(args=SimpleNamespace(model="tiny-unet"))
    with pytest.raises(UserError, match="is not made from tiny-unet: _class_name"):
        distilled(tiny_flux.path() / "transformer")(bench)


def test_the_clock_ends_a_run() -> None:
    with pytest.raises(OutOfTime), limited(0.0):
        while True:
            torch.zeros(1)
    with limited(None):
        pass


def _record(model: str, rows: dict[str, dict[str, object]], **place: object) -> dict[str, object]:
    where = {
        "model": model, "images": 2, "steps": 1, "samples": 1, "dtype": "torch.bfloat16", "device": "c", "torch": "t",
        "diffusers": "d",
    }  # fmt: skip
    return {"environment": where | place, "rows": rows}


def _row(bits: float, mean: float, **more: object) -> dict[str, object]:
    overall = {"mean": mean, "stderr": 0.01}
    difference = {"mean": mean - 0.8, "low": mean - 0.9, "high": mean - 0.7}
    tasks = {"counting": {"mean": mean, "stderr": 0.1, "difference": difference}}
    return {
        "family": "ternary", "bits_per_weight": bits, "file_bytes": 3_000_000, "written": True, "commit": "abc",
        "overall": overall, "tasks": tasks, "difference": difference, "psnr": 20.0, "psnr_stderr": 0.5, **more,
    }  # fmt: skip


def test_files_of_one_run_are_joined_and_others_refused(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.json" for name in "abc"]
    records = [_record("m", {"x": _row(2, 0.5)}), _record("m", {"y": _row(4, 0.7)}), _record("m", {}, images=3)]
    for file, record in zip(files, records, strict=True):
        file.write_text(json.dumps(record))
    merge(files[:2], tmp_path / "out.json")
    assert list(json.loads((tmp_path / "out.json").read_text())["rows"]) == ["y", "x"]
    with pytest.raises(UserError, match=r"c\.json holds rows of another run \(images 3 there, 2 here\)"):
        merge(files, tmp_path / "out.json")


def test_the_table_says_what_was_kept_and_warns_of_a_rehearsal() -> None:
    base = {"family": "16 bit", "bits_per_weight": 16.0, "file_bytes": 22_000_000, "written": True, "commit": ""}
    base |= {"overall": {"mean": 0.8, "stderr": 0.02}, "tasks": {"counting": {"mean": 0.8, "stderr": 0.1}}}
    trained = _row(1.67, 0.6, training={**_row(1, 0.7), "16 bit": base})
    rows = {"16 bit": base, "int8": _row(8.25, 0.8, written=False), "learned": trained}
    text = "\n".join(how_low_page.tables(_record("tiny-flux", rows)))
    assert "A rehearsal: 2 pictures" in text
    assert "| int8 |  | 8.25 | 3.00 (no format) | 20.00 ± 0.50 | 0.800 ± 0.010 | 100.0 % | +0.000 (-0.100 to" in text
    assert "| learned |  | 1.67 | 3.00 | 20.00 ± 0.50 | 0.600 ± 0.010 | 75.0 % |" in text
    assert "learned on prompts of the training side: 0.700 ± 0.010, where 16 bits have 0.800 ± 0.020" in text
    rows["ternary"] = _row(1.67, 0.4, psnr_each=[20.0, 22.0])
    rows["absmean rounding"] = _row(1.67, 0.0, psnr_each=[14.0, 15.0])
    text = "\n".join(how_low_page.tables(_record("tiny-flux", rows)))
    gained = "+6.50 ± 0.50 dB, picture by picture; of the score that rounding loses 50 % is back"
    assert f"- ternary over absmean rounding: {gained}." in text
    many = "\n".join(how_low_page.tables(_record("tiny-flux", rows, images=2048)))
    assert "rehearsal" not in many


def test_points_stand_where_their_numbers_say() -> None:
    points = [Point("one", "1", "int4", 3.0, 20.0, 1.0), Point("two <", "2", "svdquant", 6.0, 40.0, 1.0, filled=False)]
    text = picture("t", "dB", [Panel("m", points, {"line": 30.0})])
    ElementTree.fromstring(text)
    spots = [tuple(map(float, spot)) for spot in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4" \S+ stroke=', text)]
    (x1, y1), (x2, y2) = spots
    level = float(re.search(r"M58 ([\d.]+)H762\" stroke=\"#5b636d\"", text)[1])
    assert level == pytest.approx((y1 + y2) / 2, abs=0.1) and y2 < y1
    plot = how_low_plot
    octave = (plot.WIDTH - plot.LEFT - plot.RIGHT) / math.log2(plot.MOST / plot.LEAST)
    assert x2 - x1 == pytest.approx(octave, abs=0.2)


def test_kept_scores_are_those_of_the_kept_pictures() -> None:
    for model, record in how_low_page.records().items():
        world = scenes.held_out(record["environment"]["images"])
        assert record["environment"]["model"] == model
        for name, row in record["rows"].items():
            right = {task: [] for task in row["tasks"]}
            for prompt, said in zip(world, row["right"], strict=True):
                right[prompt.tag].append(float(said))
            shares = {task: sum(each) / len(each) for task, each in right.items()}
            assert {task: each["mean"] for task, each in row["tasks"].items()} == pytest.approx(shares, abs=1e-3), name
            assert row["overall"]["mean"] == pytest.approx(sum(shares.values()) / len(shares), abs=1e-3), name
            if "psnr" in row:
                assert row["psnr"] == pytest.approx(sum(row["psnr_each"]) / len(world), abs=0.06), name


def test_the_page_is_made_of_the_results() -> None:
    for file, text in how_low_page.pages(how_low_page.records()).items():
        assert file.read_text() == text, f"{file} is not what benchmarks/how_low_page.py writes"
