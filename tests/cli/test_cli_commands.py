"""The commands on a random pipeline: what they write, and what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bittern import formats, ops, pipelines, quantization
from bittern.cli import main
from bittern.evaluation.generate import generate, read_metadata, to_pil
from bittern.scheme import Scheme

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def few_bit(tiny_random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "few"
    assert main.run(["quantize", str(tiny_random_folder), "--recipe", "svdquant-fast", "--out", str(out)]) == 0
    return out


def told(arguments: list[str], capsys: Capture) -> dict:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert main.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_quantize_says_what_it_did_and_how_large_it_is(
    tiny_random_folder: Path, few_bit: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["quantize", str(tiny_random_folder), "--recipe", "svdquant-fast", "--out", str(tmp_path / "q")]
    result = told(arguments, capsys)
    files = [f for f in (tmp_path / "q" / "transformer").glob("*.safetensors")]
    assert result["real_bytes"] == sum(f.stat().st_size for f in files) < result["original_bytes"]
    assert result["predicted_bytes"] == pytest.approx(result["real_bytes"], rel=0.01)
    assert result["targets"] == quantization.inspect(few_bit).to_dict()["targets"]
    # The same model, recipe and seed: the same bytes.
    assert [f.read_bytes() for f in files] == [(few_bit / "transformer" / f.name).read_bytes() for f in files]
    assert main.run(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main.run([*arguments, "--force"]) == 0
    shown = capsys.readouterr().out
    assert "int4" in shown and "bits per weight" in shown and "predicted" in shown


def test_inspect_reads_headers_only(few_bit: Path, capsys: Capture) -> None:
    result = told(["inspect", str(few_bit)], capsys)
    assert set(result) >= {
        "bits_per_weight",
        "ternary_weights",
        "ternary_share",
        "ternary_share_blocks",
        "bytes",
        "targets",
    }
    assert set(result["targets"][0]) >= {"path", "format", "group_size", "rank", "activations", "error"}
    assert main.run(["inspect", str(few_bit / "transformer")]) == 0
    shown = capsys.readouterr().out
    assert all(target["path"] in shown for target in result["targets"])


def test_generate_writes_pictures_that_can_be_drawn_again(few_bit: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "a.png"
    arguments = ["generate", str(few_bit), "two green triangles", "--seed", "7", "--steps", "2", "--out", str(file)]
    result = told(arguments, capsys)
    assert result["images"] == [{"file": str(file), "prompt": "two green triangles", "seed": 7}]
    metadata = read_metadata(file)
    assert metadata["model"] == str(few_bit) and metadata["seed"] == "7" and metadata["steps"] == "2"
    assert metadata["size"] == "32x32" and metadata["path"] == result["path"] and metadata["bittern"]
    images = generate(pipelines.load(few_bit), [metadata["prompt"]], seed=int(metadata["seed"]), steps=2)
    from PIL import Image

    with Image.open(file) as picture:
        assert picture.tobytes() == to_pil(images[0]).tobytes()


def test_generate_from_a_file_into_a_folder(few_bit: Path, tmp_path: Path, capsys: Capture) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    arguments = ["generate", str(few_bit), "first", "--prompts", str(prompts), "--steps", "1"]
    assert main.run([*arguments, "--out", str(tmp_path / "pics"), "--path", "a16", "--batch-size", "2"]) == 0
    shown = capsys.readouterr()
    assert "3 pictures" in shown.out and "path a16" in shown.out and "drawing" in shown.err
    made = [read_metadata(tmp_path / "pics" / f"{i:05d}.png") for i in range(3)]
    assert [(m["prompt"], m["seed"], m["path"]) for m in made] == [
        ("first", "0", "a16"),
        ("a", "1", "a16"),
        ("b", "2", "a16"),
    ]


def test_evaluate_prints_errors_beside_scores(few_bit: Path, tiny_random_folder: Path, capsys: Capture) -> None:
    arguments = ["evaluate", str(few_bit), "--reference", str(tiny_random_folder), "--limit", "6", "--steps", "1"]
    result = told(arguments, capsys)
    assert set(result) >= {"suite", "overall", "tasks", "fidelity", "images", "seed", "path", "versions"}
    assert result["images"] == 6 and result["fidelity"]["psnr"] > 0
    assert main.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "overall" in shown and " ± " in shown and "PSNR" in shown and "95 % interval" in shown


def test_evaluate_fidelity_on_own_prompts(
    few_bit: Path, tiny_random_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    arguments = ["evaluate", str(few_bit), "--suite", "fidelity", "--reference", str(tiny_random_folder)]
    result = told([*arguments, "--prompts", str(tmp_path / "p.txt"), "--limit", "2", "--steps", "1"], capsys)
    assert result["suite"] == "fidelity" and result["images"] == 2 and result["overall"] is None


def test_compare_writes_one_page(few_bit: Path, tiny_random_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "new" / "r.html"
    arguments = [
        "compare",
        str(tiny_random_folder),
        str(few_bit),
        "--limit",
        "6",
        "--steps",
        "1",
        "--report",
        str(report),
    ]
    result = told(arguments, capsys)
    assert [model["model"] for model in result["models"]] == [str(tiny_random_folder), str(few_bit)]
    assert result["report"] == str(report)
    html = report.read_text(encoding="utf-8").replace("<span>", "").replace("</span>", "")
    assert f"bittern compare {tiny_random_folder} {few_bit} --report {report} --limit 6 --seed 0 --steps 1" in html
    assert main.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "few" in shown and "reference" in shown and f"report: {report}" in shown


def test_demo_goes_the_whole_way(
    tiny_random_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bittern.tiny_flux.path", lambda: tiny_random_folder, raising=False)
    arguments = ["demo", "--out", str(tmp_path / "demo"), "--limit", "6", "--steps", "1"]
    result = told(arguments, capsys)
    assert [entry["recipe"] for entry in result["quantized"]] == ["svdquant-fast", "ternary-fast"]
    assert len(result["models"]) == 3 and result["images"] == 6
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    # A second run replaces what the first one wrote.
    assert main.run(arguments) == 0
    assert "report:" in capsys.readouterr().out


def test_doctor_gives_a_reason_for_every_path(capsys: Capture) -> None:
    result = told(["doctor"], capsys)
    assert result["versions"]["torch"] == torch.__version__ and result["registered_with_diffusers"] is True
    assert {row["path"] for row in result["paths"]} == {"a4", "a8-int8", "a8-fp8", "a8-fp8-folded", "a16"}
    assert all(row["reason"] for row in result["paths"])
    assert any(row["runs"] for row in result["paths"])
    for weight in formats.FORMATS:
        assert {row["path"] for row in result["paths"] if row["weight"] == weight and row["runs"]}, weight
    chosen = {
        (row["weight"], row["activations"]): row for row in result["paths"] if row["chosen"] and row["device"] == "cpu"
    }
    for weight, bits in (("int4", 4), ("ternary", 8), ("int4", 16)):
        choice, row = ops.choose_path(Scheme(weight=weight, activations=bits), "cpu"), chosen[weight, bits]
        assert (row["path"], row["backend"], row["reason"]) == (choice.path, choice.backend, choice.reason)
    assert main.run(["doctor"]) == 0
    assert "chosen path" in capsys.readouterr().out


def test_doctor_says_which_attention_runs_and_why_others_do_not(capsys: Capture) -> None:
    rows = [row for row in told(["doctor"], capsys)["attention"] if row["device"] == "cpu"]
    found = {row["attention"]: row for row in rows}
    assert found["native"]["runs"] and found["_native_math"]["runs"]
    assert not found["_native_cudnn"]["runs"]
    assert all(row["reason"] for row in rows)


def test_pictures_say_which_attention_drew_them(few_bit: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["generate", str(few_bit), "a", "--steps", "1", "--attention", "_native_math"]
    result = told([*arguments, "--out", str(tmp_path / "a.png")], capsys)
    assert result["attention"] == "_native_math"
    assert read_metadata(tmp_path / "a.png")["attention"] == "_native_math"


def test_both_sides_of_an_evaluation_attend_alike(few_bit: Path, tiny_random_folder: Path, capsys: Capture) -> None:
    arguments = ["--limit", "6", "--steps", "1", "--attention", "_native_flash"]
    result = told(["evaluate", str(few_bit), "--reference", str(tiny_random_folder), *arguments], capsys)
    assert result["attention"] == "_native_flash"
    report = ["--report", str(few_bit.parent / "r.html")]
    result = told(["compare", str(tiny_random_folder), str(few_bit), *arguments, *report], capsys)
    assert [model["attention"] for model in result["models"]] == ["_native_flash"] * 2


def test_benchmark_prints_both_sides_and_their_ratio(tiny_random_folder: Path, capsys: Capture) -> None:
    arguments = ["benchmark", str(tiny_random_folder), "--recipe", "ternary-fast", "--steps", "1", "--runs", "2"]
    result = told(arguments, capsys)
    assert [row["model"] for row in result["rows"]] == ["16 bit", "ternary-fast"]
    assert result["size"] == 32 and result["command"].startswith("bittern benchmark ")
    ratio, (base, few) = result["ratios"]["ternary-fast"]["eager"], (row["ms_runs"] for row in result["rows"])
    assert ratio["low"] == pytest.approx(min(base) / max(few), rel=0.01)
    assert (ratio["ratio"] is None) == (ratio["low"] <= 1 <= ratio["high"])
    assert main.run([*arguments, "--profile"]) == 0
    shown = capsys.readouterr()
    assert "ternary-fast" in shown.out and "times faster" in shown.out and "few_bit_linear" in shown.out
    assert "16 bit, eager: " in shown.err


def test_a_process_prints_nothing_but_json(few_bit: Path, tiny_random_folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bittern.cli.main",
        "evaluate",
        str(few_bit),
        "--reference",
        str(tiny_random_folder),
    ]
    done = subprocess.run([*command, "--limit", "6", "--steps", "1", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 6
    assert all(line.startswith("drawing with ") for line in done.stderr.splitlines()), done.stderr


def test_home_is_expanded_wherever_something_is_written(
    tiny_random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = str(tiny_random_folder)
    assert main.run(["quantize", model, "--recipe", "int4", "--out", "~/few"]) == 0
    assert main.run(["generate", "~/few", "a", "--steps", "1", "--out", "~/a.png"]) == 0
    assert main.run(["compare", model, "~/few", "--limit", "1", "--steps", "1", "--report", "~/r.html"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "few", "r.html"]
