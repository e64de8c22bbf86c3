"""What a model costs: sizes that can be counted, memory that was taken on purpose, time that passes."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch

from bittern.cli import main
from bittern.errors import UserError
from bittern.evaluation.cost import alone
from bittern.evaluation.drawing import Settings

Capture = pytest.CaptureFixture[str]


def test_sizes_are_those_of_the_files_and_the_tensors(tiny_random_folder: Path) -> None:
    cost = alone.measure(str(tiny_random_folder), Settings(steps=3), runs=2)
    files = [file for file in tiny_random_folder.rglob("*") if file.is_file()]
    assert cost.pipeline_bytes == sum(file.stat().st_size for file in files)
    weights = tiny_random_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert cost.disk_bytes == pytest.approx(weights.stat().st_size, rel=0.05)
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(tiny_random_folder / "transformer")
    assert cost.weight_bytes == sum(4 * parameter.numel() for parameter in model.parameters())
    assert (cost.steps, cost.size, cost.path, cost.dtype) == (3, "32x32", "fp32", "fp32")
    assert len(cost.ms_runs) == 2 and min(cost.ms_runs) <= cost.ms_per_step <= max(cost.ms_runs)


def test_steps_are_timed_from_one_to_the_next(tiny_random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(alone.time, "perf_counter", lambda: next(clock) ** 2 / 1e3)
    cost = alone.measure(str(tiny_random_folder), Settings(steps=4), runs=1)
    # A clock that quickens: ticks n and n + 1 are 2 n + 1 milliseconds apart. Two ticks pass before the first run
    # (loading), and each run reads it six times, when it begins, at its four steps, and when it ends.
    second = 2 + 6
    assert cost.ms_per_step == pytest.approx(2 * (second + 2) + 1)
    assert cost.seconds_to_load == 0.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted on Linux")
def test_memory_that_was_taken_is_seen_and_its_peak_as_well() -> None:
    megabyte = 2**20
    before = alone._taken("cpu")
    # Of pages of its own: malloc may have as many left over from another test, which count already.
    kept = torch.frombuffer(mmap.mmap(-1, 64 * megabyte), dtype=torch.uint8).fill_(1)
    after = alone._taken("cpu")
    assert before and after and 56 * megabyte < after - before < 80 * megabyte
    alone._reset_peak(False, "cpu")
    pages = mmap.mmap(-1, 128 * megabyte)
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    pages.close()
    peak = alone._peak(False, "cpu")
    assert peak and 120 * megabyte < peak - after < 150 * megabyte
    assert kept.sum() == 64 * megabyte


def test_the_command_measures_in_a_process_of_its_own(tiny_random_folder: Path, capsys: Capture) -> None:
    words = ["evaluate", str(tiny_random_folder), "--suite", "cost", "--steps", "2"]
    assert main.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["suite"] == "cost" and told["ms_per_step"] > 0 and told["reference_cost"] is None
    assert told["peak_bytes"] >= told["resident_bytes"] > 0


def test_mistakes_are_the_users_here_and_in_the_other_process(
    tiny_random_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    with pytest.raises(UserError, match="/nowhere"):
        alone.evaluate("/nowhere")
    with pytest.raises(UserError, match="'flash' does not run on cpu"):
        alone.evaluate(str(tiny_random_folder), settings=Settings(attention="flash"))
    for option in (["--limit", "3"], ["--batch-size", "2"], ["--out", str(tmp_path)], ["--prompts", "p.txt"]):
        assert main.run(["evaluate", "tiny-flux", "--suite", "cost", *option]) == 2
        assert f"suite cost takes no {option[0]}" in capsys.readouterr().err
    assert main.run(["evaluate", "--suite", "cost"]) == 2
    assert "expected a MODEL" in capsys.readouterr().err
    assert main.run(["evaluate", "tiny-flux", "--images", "x"]) == 2
    assert "suite scenes takes no --images: it is for --suite geneval" in capsys.readouterr().err
    assert main.run(["evaluate", "tiny-flux", "--suite", "geneval", "--prompts", "x"]) == 2
    assert "geneval takes --metadata" in capsys.readouterr().err
