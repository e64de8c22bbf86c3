"""What the suite refuses: folders that are not whole, runs and models that do not fit, places it cannot write."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bittern.cli import main
from bittern.errors import UserError
from bittern.evaluation.drawing import Settings

Capture = pytest.CaptureFixture[str]


def pictures(place: Path) -> list[Path]:
    return list(place.rglob("*.png"))


def test_a_run_of_something_else_is_kept_unless_forced(run: Callable[..., Any], tmp_path: Path) -> None:
    run()
    with pytest.raises(UserError, match=r"holds a run with another images_per_prompt \(2, now 1\).*--force"):
        run(images_per_prompt=1)
    with pytest.raises(UserError, match="another seed"):
        run(settings=Settings(seed=4, steps=1, batch_size=5))
    run(images_per_prompt=1, force=True)
    assert len(pictures(tmp_path / "out")) == 12
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="holds something else"):
        run("mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(UserError, match="is a file"):
        run("mine/thesis.txt")
    with pytest.raises(UserError, match=r"thesis\.txt is a file, not a folder"):
        run("mine/thesis.txt/deep")


def test_folders_that_are_not_whole(run: Callable[..., Any], tmp_path: Path, twelve: Path) -> None:
    run()
    out = tmp_path / "out"

    def refused(**options: Any) -> str:
        with pytest.raises(UserError) as told:
            run("scores", **({"model": None, "images": out, "images_per_prompt": None} | options))
        return str(told.value)

    assert "expected a folder" in refused(images=tmp_path / "nowhere")
    assert "holds no numbered folder" in refused(images=out / "00000" / "samples")
    assert "holds 2 pictures: expected 3" in refused(images_per_prompt=3)
    lines = twelve.read_text().splitlines()
    (tmp_path / "more.jsonl").write_text("\n".join([*lines, lines[0]]))
    assert "lacks the folder 00012" in refused(metadata=tmp_path / "more.jsonl")
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)))
    assert "give the file that the pictures were drawn from" in refused(metadata=tmp_path / "turned.jsonl")
    (out / "00001" / "samples" / "0001.png").unlink()
    assert re.search(r"00001/samples holds 1 pictures: expected 2", refused())
    (out / "00001" / "samples" / "0001.png").write_bytes(b"no picture")
    assert "cannot be read" in refused()
    (out / "00001" / "metadata.jsonl").unlink()
    assert "needs the metadata of its prompt" in refused()


def test_folders_without_pictures_and_numbers_that_stand_twice(
    run: Callable[..., Any], tmp_path: Path, twelve: Path
) -> None:
    given = tmp_path / "given"
    for index, line in enumerate(twelve.read_text().splitlines()):
        (given / f"{index:05d}" / "samples").mkdir(parents=True)
        (given / f"{index:05d}" / "metadata.jsonl").write_text(line)
        if index:
            Image.new("RGB", (32, 32)).save(given / f"{index:05d}" / "samples" / "0000.png")

    def refused(**options: Any) -> str:
        with pytest.raises(UserError) as told:
            run("scores", **({"model": None, "metadata": None, "images": given, "images_per_prompt": None} | options))
        assert not (tmp_path / "scores").exists()
        return str(told.value)

    assert "00000/samples holds no picture: expected 0000.png" in refused()
    alone = tmp_path / "alone"
    shutil.copytree(given / "00000", alone / "00000")
    assert "alone/00000/samples holds no picture" in refused(images=alone)
    picture = given / "00000" / "samples" / "0000.png"
    Image.new("RGB", (32, 32)).save(picture)
    (given / "²").mkdir()
    shutil.copy(picture, picture.with_name("0.png"))
    assert "00000/samples holds 0.png and 0000.png, one number twice" in refused()
    picture.with_name("0.png").unlink()
    shutil.copytree(given / "00003", given / "3")
    assert "given holds 00003 and 3, one number twice" in refused()
    assert "one number twice" in refused(metadata=twelve)
    shutil.rmtree(given / "3")
    # A folder whose name is a digit and no number is none of ours.
    assert run("scores", model=None, metadata=None, images=given, images_per_prompt=None).to_dict()["prompts"] == 12


def test_references_that_do_not_fit(run: Callable[..., Any], tmp_path: Path) -> None:
    run()
    with pytest.raises(UserError, match="would draw other noise"):
        run("x", model=None, images=tmp_path / "out", reference="tiny-flux")
    base = tmp_path / "base"
    shutil.copytree(tmp_path / "out", base)
    Image.new("RGB", (64, 32)).save(base / "00000" / "samples" / "0000.png")
    with pytest.raises(UserError, match=r"has pictures of 32x32 pixels and .*base of 64x32: expected one size"):
        run(reference=str(base))
    with pytest.raises(UserError, match=r"has pictures of 32x32 pixels and .*base/00000/samples/0000.png of 64x32"):
        run("y", reference=str(base))
    assert not pictures(tmp_path / "y")
    rows = (base / "results.jsonl").read_text().splitlines()
    (base / "results.jsonl").write_text("\n".join(rows[:5]))
    with pytest.raises(UserError, match="has no verdict on sample 1 of prompt 2"):
        run(reference=str(base))
    for damage in (b'{"filename": "a.png"}', rows[0].encode() + b"\xff"):
        (base / "results.jsonl").write_bytes(damage + b"\n")
        with pytest.raises(UserError, match=r"results\.jsonl:1 is no line of GenEval's results"):
            run(reference=str(base))


def test_a_finished_run_of_other_noise_or_another_judge_is_no_reference(
    run: Callable[..., Any], detector_folder: Path, tmp_path: Path
) -> None:
    run("base")
    base = tmp_path / "base"
    shutil.copytree(detector_folder, tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 96, "longest_edge": 96}}')

    def refused(**options: Any) -> str:
        with pytest.raises(UserError) as told:
            run("now", reference=str(base), **options)
        assert not (tmp_path / "now").exists()
        return str(told.value)

    seed, steps = Settings(seed=99, steps=1, batch_size=5), Settings(seed=3, steps=2, batch_size=5)
    assert "base has another seed than this run (3 and not 99)" in refused(settings=seed)
    assert "base has another number of steps than this run (1 and not 2)" in refused(settings=steps)
    assert "another number of pictures a prompt than this run (2 and not 1)" in refused(images_per_prompt=1)
    assert "another set of prompts than this run" in refused(limit=6)
    assert "was judged by another detector than this run" in refused(detector_model=str(tmp_path / "other"))
    given = {"model": None, "metadata": None, "images": base, "images_per_prompt": None}
    assert "was judged by another detector" in refused(**given, detector_model=str(tmp_path / "other"))
    judge = json.loads((base / "judge.json").read_text())
    (base / "judge.json").write_text(json.dumps(judge | {"rules": 0}))
    assert "was judged by other rules than this run" in refused()
    (base / "judge.json").unlink()
    assert "does not say who judged" in refused()
    # Results of the official scorer say nothing of seeds; pictures that are given have none either.
    (base / "run.json").unlink()
    assert run("now", reference=str(base), settings=seed).difference is not None
    run("base2")
    assert run("pictures", reference=str(tmp_path / "base2"), **given).difference is not None


@pytest.mark.parametrize(
    "damage", [b"garbage", b'{"prompt": "\xff"}', b"[]", b'{"prompt": 1}', b'{"prompt": [0]}', b""]
)
def test_a_damaged_verdict_is_named_and_can_be_removed(
    damage: bytes, run: Callable[..., Any], tmp_path: Path, twelve: Path
) -> None:
    first = run(images_per_prompt=1)
    file = tmp_path / "out" / "verdicts.0.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
    with pytest.raises(UserError, match=r"verdicts\.0\.jsonl:3 is no verdict: remove that line"):
        run(images_per_prompt=1)
    file.write_bytes(b"\n".join([*lines[:2], *lines[3:]]))
    assert run(images_per_prompt=1).to_dict() == first.to_dict()
    assert len(file.read_bytes().split(b"\n")) == len(lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "needs a model that draws"),
        ({"metadata": None}, "needs its prompts: add --metadata"),
        ({"images_per_prompt": 0}, "images per prompt is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 3}, "limit 3 leaves tasks"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"reference": "/nowhere"}, "/nowhere"),
        ({"detector_model": "/nowhere"}, "--detector /nowhere"),
        ({"clip_model": "./nowhere"}, "--clip ./nowhere"),
        ({"settings": Settings(seed=-1)}, "seed is -1"),
    ],
)
def test_wrong_requests_fail_before_anything_is_made(
    options: dict[str, Any], message: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_models_of_another_kind_fail_before_anything_is_drawn(
    run: Callable[..., Any], detector_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--clip .* is a 'mask2former': expected a clip such as openai/clip-vit-large"):
        run(clip_model=str(detector_folder))
    with pytest.raises(UserError, match=r"--detector .* is a 'clip': expected a mask2former such as"):
        run(detector_model=str(clip_folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that takes no new folder")
def test_places_that_take_no_folder(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"--out /proc/x.*choose another place") as told:
        run("/proc/x")
    assert re.search("nothing new can be made there|not writable", str(told.value))


@pytest.mark.parametrize("suite", ["geneval", "compbench"])
@pytest.mark.parametrize(
    "words", ["--seed 3", "--steps 4", "--path a4", "--batch-size 2", "--dtype fp32", "--attention native"]
)
def test_pictures_that_are_given_are_not_drawn(suite: str, words: str, tmp_path: Path, capsys: Capture) -> None:
    given = ["evaluate", "--suite", suite, "--images", str(tmp_path), "--out", str(tmp_path / "out"), *words.split()]
    assert main.run(given) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"--images draws nothing, so {words.split()[0]} would be ignored: leave one of them out" in told
