"""The suite from prompts to a score on a random pipeline: layout, going on after a kill, references, refusals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import bittern
from bittern.cli import main
from bittern.errors import UserError
from bittern.evaluation.drawing import Artist
from bittern.evaluation.generate import read_metadata
from bittern.evaluation.runs import folder
from bittern.evaluation.shards import Shard

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Counts how often every prompt was drawn from every noise."""
    counted: Counter[tuple[str, int]] = Counter()
    draw = Artist.draw

    def counting(self: Artist, prompts: list[str], *, seed: int, **options: Any) -> Any:
        found = draw(self, prompts, seed=seed, **options)
        counted.update((prompt, seed + i) for i, prompt in enumerate(prompts))
        return found

    monkeypatch.setattr(Artist, "draw", counting)
    return counted


def pictures(place: Path) -> dict[str, bytes]:
    return {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*.png")}


def results(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]


def test_the_layout_is_the_official_one_and_the_score_follows_from_the_results(
    run: Callable[..., Any], tmp_path: Path, twelve: Path
) -> None:
    found = run()
    out = tmp_path / "out"
    lines = [json.loads(line) for line in twelve.read_text().splitlines()]
    for index, line in enumerate(lines):
        place = out / f"{index:05d}"
        assert json.loads((place / "metadata.jsonl").read_text()) == line
        assert sorted(f.name for f in (place / "samples").iterdir()) == ["0000.png", "0001.png"]
        for sample in range(2):
            told = read_metadata(place / "samples" / f"{sample:04d}.png")
            assert (told["prompt"], told["seed"]) == (line["prompt"], str(3 + 2 * index + sample))
    rows = results(out)
    assert [row["filename"] for row in rows] == [f"{i:05d}/samples/{s:04d}.png" for i in range(12) for s in range(2)]
    assert all(set(row) == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"} for row in rows)
    assert [json.loads(row["metadata"]) for row in rows[::2]] == lines
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    shares = {tag: [row["correct"] for row in rows if row["tag"] == tag] for tag in told["tasks"]}
    assert len(shares) == 6
    assert told["tasks"] == pytest.approx({tag: sum(v) / len(v) for tag, v in shares.items()})
    assert told["overall"] == pytest.approx(sum(told["tasks"].values()) / 6)
    assert told["correct_images"] == sum(row["correct"] for row in rows) and told["images"] == 24
    assert (told["suite"], told["seed"], told["steps"], told["size"]) == ("geneval", 3, 1, "32x32")
    # The random detector does find things: scoring was not idle.
    assert any(json.loads(row["details"]) for row in rows)


def test_a_run_that_is_asked_for_again_draws_and_judges_nothing(
    run: Callable[..., Any], drawn: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run()
    assert set(drawn.values()) == {1} and len(drawn) == 24
    monkeypatch.setattr("bittern.evaluation.geneval.detector.Detector.find", None)
    assert run().to_dict() == first.to_dict()
    assert set(drawn.values()) == {1}


@pytest.mark.parametrize("at", ["between batches", "while dealing out", "while judging"])
def test_a_killed_run_goes_on_to_the_same_result_and_draws_nothing_twice(
    at: str, run: Callable[..., Any], drawn: Counter[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("whole")
    drawn.clear()
    calls = 0
    place, name = {
        "between batches": (Artist, "draw"),
        "while dealing out": (folder, "_deal_out"),
        "while judging": (folder.Notes, "add"),
    }[at]
    original = getattr(place, name)

    def dying(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, dying)
        with pytest.raises(KeyboardInterrupt):
            run()
    if at == "while judging":
        # The kill tore the line that was being written.
        with (tmp_path / "out" / "verdicts.0.jsonl").open("a") as handle:
            handle.write('{"prompt": 2, "sam')
    run()
    assert set(drawn.values()) == {1} and len(drawn) == 24
    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_picture_that_was_lost_is_drawn_again_as_it_was(run: Callable[..., Any], tmp_path: Path) -> None:
    run()
    before = pictures(tmp_path / "out")
    (tmp_path / "out" / "00003" / "samples" / "0001.png").unlink()
    run()
    assert pictures(tmp_path / "out") == before


def test_another_picture_or_detector_is_judged_again(
    run: Callable[..., Any], tmp_path: Path, detector_folder: Path
) -> None:
    run()
    lines = len((tmp_path / "out" / "verdicts.0.jsonl").read_text().splitlines())
    Image.new("RGB", (32, 32)).save(tmp_path / "out" / "00000" / "samples" / "0000.png")
    run()
    assert len((tmp_path / "out" / "verdicts.0.jsonl").read_text().splitlines()) == lines + 1
    other = tmp_path / "other"
    shutil.copytree(detector_folder, other)
    (other / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 96, "longest_edge": 96}}))
    run(detector_model=str(other))
    assert len((tmp_path / "out" / "verdicts.0.jsonl").read_text().splitlines()) == 2 * lines + 1


def test_given_pictures_get_the_same_verdicts(run: Callable[..., Any], tmp_path: Path) -> None:
    first = run()
    again = run("scores", model=None, metadata=None, images=tmp_path / "out", images_per_prompt=None)
    assert results(tmp_path / "scores") == results(tmp_path / "out")
    assert not list((tmp_path / "scores").rglob("*.png"))
    told = again.to_dict()
    assert told["overall"] == first.to_dict()["overall"] and told["model"] is None and told["seed"] is None


def test_a_reference_is_paired_prompt_by_prompt(
    run: Callable[..., Any], new_tiny_random_pipeline: Callable[[], Any], tmp_path: Path, tiny_random_folder: Path
) -> None:
    few = new_tiny_random_pipeline()
    bittern.quantize(few, "ternary-fast")
    few.save_pretrained(tmp_path / "few")
    found = run(model=str(tmp_path / "few"), reference=str(tiny_random_folder))
    told = found.to_dict()
    rows, base = results(tmp_path / "out"), results(tmp_path / "out" / "reference")
    assert told["reference"] == str(tiny_random_folder) and len(base) == 24
    gaps: dict[str, list[int]] = {}
    for one, other in zip(rows, base, strict=True):
        assert one["filename"] == other["filename"]
        gaps.setdefault(one["tag"], []).append(one["correct"] - other["correct"])
    assert told["difference"]["mean"] == pytest.approx(sum(sum(g) / len(g) for g in gaps.values()) / 6)
    assert told["difference"]["n"] == 12
    # A finished run serves as well, and nothing is drawn for it.
    again = run("again", model=str(tmp_path / "few"), reference=str(tmp_path / "out" / "reference"))
    assert again.to_dict()["difference"] == told["difference"]
    assert not (tmp_path / "again" / "reference").exists()


def test_shards_part_the_work() -> None:
    items = list(range(11))
    parts = [Shard(rank, 4).share(items) for rank in range(4)]
    assert sorted(item for part in parts for item in part) == items and max(map(len, parts)) - min(map(len, parts)) == 1
    assert Shard(2, 4, 1).device("cuda") == "cuda:1" and Shard(2, 4, 1).device("cuda:0") == "cuda:0"
    assert Shard().device("cuda") == "cuda" and Shard(1, 2).device("cpu") == "cpu"


def command(out: Path, model: Path, twelve: Path, detector: Path, clip: Path) -> list[str]:
    return [
        "evaluate", str(model), "--suite", "geneval", "--metadata", str(twelve), "--detector", str(detector), "--clip",
        str(clip), "--images-per-prompt", "1", "--steps", "1", "--batch-size", "3", "--out", str(out), "--json",
    ]  # fmt: skip


def test_the_command(
    tiny_random_folder: Path, twelve: Path, detector_folder: Path, clip_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = command(tmp_path / "ge", tiny_random_folder, twelve, detector_folder, clip_folder)
    assert main.run([*words, "--force"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 12 and told["results"] == str(tmp_path / "ge" / "results.jsonl")
    assert main.run(words[:-1]) == 0
    shown = capsys.readouterr().out
    assert "color_attr" in shown and "12 pictures of 12 prompts" in shown and "results.jsonl" in shown


def test_fidelity_takes_the_same_clip(
    tiny_random_folder: Path, clip_folder: Path, detector_folder: Path, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "p.txt").write_text("a\nb\n")
    words = ["evaluate", str(tiny_random_folder), "--suite", "fidelity", "--reference", str(tiny_random_folder)]
    words += ["--prompts", str(tmp_path / "p.txt"), "--steps", "1", "--clip", str(clip_folder)]
    assert main.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["fidelity"]
    assert told["clip_score"] == told["reference_clip_score"] >= 0 and told["velocity_error"] == 0
    assert main.run(words[:-2]) == 0
    assert "CLIP score not measured: add --clip" in capsys.readouterr().out
    assert main.run([*words[:-2], "--limit", "1"]) == 0
    assert "PSNR 100.00 dB (error not known), SSIM 1.0000 (error not known)" in capsys.readouterr().out
    assert main.run([*words, "--limit", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["fidelity"]
    assert {told[f"{key}_stderr"] for key in ("psnr", "ssim", "clip_score", "reference_clip_score")} == {None}
    assert main.run(["evaluate", "tiny-flux", "--clip", str(clip_folder)]) == 2
    assert "leave out --clip" in capsys.readouterr().err
    # Another kind of model is refused before anything is drawn.
    monkeypatch.setattr(Artist, "draw", None)
    assert main.run([*words[:-2], "--clip", str(detector_folder)]) == 2
    assert "is a 'mask2former': expected a clip" in " ".join(capsys.readouterr().err.split())


def test_a_folder_serves_one_run_at_a_time(run: Callable[..., Any], tmp_path: Path) -> None:
    run()
    before = pictures(tmp_path / "out")
    other = folder.Claim(tmp_path / "out", alone=False)
    for force in (False, True):
        with pytest.raises(UserError, match=r"out is in use by a run that has not ended"):
            run(force=force)
    assert pictures(tmp_path / "out") == before
    other.release()
    run(force=True)
    assert pictures(tmp_path / "out") == before


# Runs the command and kills its own process, or that of one rank, when something was called so many times. What was
# drawn and what was delivered is told in a file, a line a picture.
DYING = """
import os, signal, sys
from bittern.evaluation.drawing import Artist
from bittern.evaluation.runs import folder
log, place, dies_at = sys.argv[1:4]

def tell(what, name):
    with open(log, "a") as handle:
        handle.write(f"{what} {name}\\n")

def draw(self, prompts, *, seed, **options):
    found = original(self, prompts, seed=seed, **options)
    for index, prompt in enumerate(prompts):
        tell("drawn", f"{prompt}-{seed + index}")
    return found

def deliver(out, number, batch, *rest):
    delivered(out, number, batch, *rest)
    for picture in batch:
        tell("delivered", picture.name)

original, Artist.draw = Artist.draw, draw
delivered, folder.deliver = folder.deliver, deliver

def deadly(function):
    calls = 0
    def called(*args, **options):
        nonlocal calls
        calls += 1
        if calls == int(dies_at) and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return called

if place != "nowhere":
    owner, name = {"draw": (Artist, "draw"), "deal": (folder, "_deal_out"), "judge": (folder.Notes, "add")}[place]
    setattr(owner, name, deadly(getattr(owner, name)))
from bittern.cli.main import main
sys.argv[1:] = sys.argv[4:]
main()
"""


def stamps(place: Path) -> dict[str, tuple[int, int]]:
    """What changes when a picture is written again, of every picture that is whole, dealt out or not."""
    found: dict[str, tuple[int, int]] = {}
    for file in place.rglob("*.png"):
        drawn, *parts = file.relative_to(place).parts
        if drawn != ".drawn":
            parts = [drawn, *parts]
        elif parts.pop(0).endswith(".tmp"):
            continue
        found["/".join(parts)] = (file.stat().st_ino, file.stat().st_mtime_ns)
    return found


@pytest.mark.slow
def test_sigkill_at_any_time_costs_no_picture(
    tiny_random_folder: Path, twelve: Path, detector_folder: Path, clip_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main.run(command(tmp_path / "whole", tiny_random_folder, twelve, detector_folder, clip_folder)) == 0
    whole = json.loads(capsys.readouterr().out)
    words = command(tmp_path / "killed", tiny_random_folder, twelve, detector_folder, clip_folder)
    log = tmp_path / "log"
    deaths = [("draw", 2), ("deal", 1), ("deal", 3), ("judge", 5), ("nowhere", 0)]
    before: dict[str, tuple[int, int]] = {}
    for place, call in deaths:
        launch = [sys.executable, "-c", DYING, str(log), place, str(call), *words]
        done = subprocess.run(launch, capture_output=True, text=True)
        assert done.returncode == (0 if place == "nowhere" else -signal.SIGKILL), done.stderr
        now = stamps(tmp_path / "killed")
        assert {name: now.get(name) for name in before} == before
        before = now
    killed = json.loads(done.stdout)
    told = Counter(line for line in log.read_text().splitlines() if line.startswith("drawn"))
    assert len(told) == 12 and set(told.values()) == {1}
    assert pictures(tmp_path / "whole") == pictures(tmp_path / "killed")
    assert results(tmp_path / "whole") == results(tmp_path / "killed")
    assert killed | {"results": ""} == whole | {"results": ""}
    verdicts = [json.loads(line) for line in (tmp_path / "killed" / "verdicts.0.jsonl").read_text().splitlines()]
    assert Counter((v["prompt"], v["sample"]) for v in verdicts) == {(index, 0): 1 for index in range(12)}


@pytest.mark.slow
def test_four_processes_give_the_bytes_of_one_even_when_one_is_killed(
    tiny_random_folder: Path, twelve: Path, detector_folder: Path, clip_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main.run(command(tmp_path / "one", tiny_random_folder, twelve, detector_folder, clip_folder)) == 0
    one = json.loads(capsys.readouterr().out)
    words = command(tmp_path / "four", tiny_random_folder, twelve, detector_folder, clip_folder)
    script, log = tmp_path / "dying.py", tmp_path / "log"
    script.write_text(DYING)
    before: dict[str, tuple[int, int]] = {}
    for place in ("deal", "nowhere"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(script)]
        done = subprocess.run([*launch, str(log), place, "1", *words], capture_output=True, text=True)
        assert (done.returncode == 0) == (place == "nowhere"), done.stderr
        now = stamps(tmp_path / "four")
        assert {name: now.get(name) for name in before} == before
        before = now
    four = json.loads(done.stdout)
    told = Counter(line for line in log.read_text().splitlines() if line.startswith("delivered"))
    assert set(told.values()) == {1}
    assert pictures(tmp_path / "one") == pictures(tmp_path / "four")
    assert results(tmp_path / "one") == results(tmp_path / "four")
    assert one | {"results": ""} == four | {"results": ""}
    assert len(list((tmp_path / "four").glob("verdicts.*.jsonl"))) == 4
