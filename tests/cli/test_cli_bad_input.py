"""Every mistake of the user's: one line with value, expectation and mend, exit code 2, no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bittern.cli import main

Capture = pytest.CaptureFixture[str]
Tensors = dict[str, torch.Tensor]


def refused(arguments: list[str], capsys: Capture) -> str:
    """The one line of a command that must fail for a mistake."""
    capsys.readouterr()
    code = main.run(arguments)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith(("drawing", "solving"))]
    assert code == 2, shown.err
    assert shown.out == "" and len(lines) == 1 and lines[0].startswith("error: "), shown
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["inspect", "tiny-flix"], ["'tiny-flix'", "tiny-flux"]),
        (["inspect", "/nowhere/model"], ["/nowhere/model", "expected"]),
        (["generate", "MODEL"], ["no prompts", "--prompts"]),
        (["generate", "MODEL", ""], ["prompt 1 is empty", "expected"]),
        (["generate", "MODEL", "a", "--prompts", "/nowhere.txt"], ["/nowhere.txt", "expected"]),
        (["generate", "MODEL", "a", "b", "--out", "x.png"], ["x.png", "2 prompts", "folder"]),
        (["generate", "MODEL", "a", "--out", "x.jpg"], ["x.jpg", "expected a .png"]),
        (["generate", "MODEL", "a", "--device", "tpu"], ["'tpu'", "expected"]),
        (["generate", "MODEL", "a", "--out", "FILE/x.png"], ["x.png", "notes.txt is a file"]),
        (["generate", "MODEL", "a", "--device", "mps"], ["'mps'", "cpu, cuda"]),
        (["generate", "MODEL", "a", "--device", "cuda"], ["cuda", "--device cpu"]),
        (["generate", "MODEL", "a", "--dtype", "bf15"], ["'bf15'", "did you mean 'bf16'"]),
        (["generate", "MODEL", "a", "--path", "a5"], ["'a5'", "a4"]),
        (["generate", "MODEL", "a", "--device", "cpu", "--cuda-graphs"], ["--cuda-graphs", "cpu", "leave it out"]),
        (["generate", "MODEL", "a", "--path", "a4"], ["--path a4", "has none: leave it out"]),
        (["generate", "MODEL", "a", "--attention", "_native_mth"], ["'_native_mth'", "did you mean '_native_math'"]),
        (["generate", "MODEL", "a", "--attention", "flash"], ["'flash' does not run on cpu", "usable here: "]),
        (
            ["generate", "MODEL", "a", "--lora", "/nowhere.safetensors:0.5"],
            ["'/nowhere.safetensors'", "expected a .safetensors file"],
        ),
        (["generate", "MODEL", "a", "--lora", "FILE:inf"], ["strength inf", "expected a finite number"]),
        (["generate", "MODEL", "a", "--fuse"], ["--fuse is for LoRAs", "expected --lora"]),
        (["benchmark", "flux.1-dve"], ["'flux.1-dve'", "did you mean 'flux.1-dev'"]),
        (["benchmark", "MODEL", "--mini"], ["--mini is for an architecture's name"]),
        (["benchmark", "MODEL", "--graph"], ["--graph", "leave it out"]),
        (["benchmark", "MODEL", "--path", "a4"], ["--path a4 is for few-bit layers", "give a --recipe"]),
        (["benchmark", "MODEL", "--size", "30"], ["size is 30", "multiple of 4"]),
        (["benchmark", "MODEL", "--recipe", "svdquant-fats"], ["did you mean 'svdquant-fast'"]),
        (["generate", "MODEL", "a", "--steps", "0"], ["steps is 0", "expected"]),
        (["generate", "MODEL", "a", "--seed", "-1"], ["seed is -1", "expected"]),
        (["generate", "MODEL", "a", "--out", "x" * 300 + ".png"], ["name too long", "shorter"]),
        (["demo", "--limit", "0", "--out", "OUT"], ["limit is 0", "expected 1 to"]),
        (["evaluate", "MODEL", "--suite", "scene"], ["'scene'", "did you mean 'scenes'"]),
        (["evaluate", "MODEL", "--suite", "fidelity"], ["reference", "--reference MODEL"]),
        (["evaluate", "MODEL", "--limit", "0"], ["limit 0", "expected at least 6"]),
        (["evaluate", "MODEL", "--limit", "1000000000"], ["limit is 1000000000", "expected 1 to"]),
        (["evaluate", "MODEL", "--reference", "/nowhere/ref"], ["/nowhere/ref", "expected"]),
        (["compare", "MODEL"], ["one model", "expected two or more"]),
        (["compare", "MODEL", "MODEL", "--report", "/"], ["/ is a folder", "expected a file"]),
        (["compare", "MODEL", "MODEL", "--report", "FILE/r.html"], ["r.html", "notes.txt is a file"]),
        (["quantize", "MODEL", "--recipe", "svdquant-fats", "--out", "OUT"], ["did you mean 'svdquant-fast'"]),
        (["quantize", "MODEL", "--recipe", "int4", "--out", "FULL"], ["not empty", "--force"]),
        (["quantize", "MODEL", "--recipe", "int4", "--out", "MODEL", "--force"], ["would replace the model"]),
        (["quantize", "MODEL", "--recipe", "int4", "--out", "FILE/x"], ["notes.txt/x", "not writable"]),
        (["quantize", "MODEL", "--recipe", "int4", "--out", "OUT", "--seed", "-2"], ["-2", "expected"]),
        (["recipes", "/nowhere.yaml"], ["/nowhere.yaml", "expected"]),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    parts: list[str],
    tiny_random_folder: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    places = {"MODEL": tiny_random_folder, "OUT": tmp_path / "out", "FULL": tmp_path / "full"}
    places |= {f"FILE/{name}": tmp_path / "full" / "notes.txt" / name for name in ("x", "x.png", "r.html")}
    line = refused([str(places.get(word, word)) for word in arguments], capsys)
    assert all(part in line for part in parts), line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_empty_prompts_file(content: str, tiny_random_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "p.txt").write_text(content)
    line = refused(["generate", str(tiny_random_folder), "--prompts", str(tmp_path / "p.txt")], capsys)
    assert "p.txt is empty" in line


@pytest.mark.parametrize("gib", ["nan", "inf", "1e300", "-1", "0"])
@pytest.mark.parametrize("option", ["--gpu-memory", "--record-memory"])
def test_memory_that_is_no_amount(
    option: str, gib: str, tiny_random_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["quantize", str(tiny_random_folder), "--recipe", "svdquant", "--out", str(tmp_path / "o")]
    line = refused([*arguments, option, gib], capsys)
    assert f"{option} {float(gib):g}: expected GiB" in line


def test_memory_for_records_that_nobody_makes(tiny_random_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["quantize", str(tiny_random_folder), "--recipe", "int4", "--out", str(tmp_path / "o")]
    assert "recipe int4 records nothing" in refused([*arguments, "--gpu-memory", "8"], capsys)


def test_unknown_recipe_key_is_refused_with_the_nearest(
    tiny_random_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "r.yaml").write_text("default: {weight: int4, grup_size: 64}\n")
    arguments = ["quantize", str(tiny_random_folder), "--recipe", str(tmp_path / "r.yaml"), "--out", "o"]
    assert "did you mean 'group_size'" in refused(arguments, capsys)


def test_full_disk_leaves_finished_blocks_and_nothing_else(
    tiny_random_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("diffusers.FluxTransformer2DModel.save_pretrained", full)
    out = tmp_path / "out"
    line = refused(["quantize", str(tiny_random_folder), "--recipe", "int4", "--out", str(out)], capsys)
    assert str(out) in line and "full" in line
    assert "2 finished blocks are kept, run the same command again" in line
    assert [file.name for file in tmp_path.iterdir()] == [".out.unfinished"]


@pytest.fixture(scope="module")
def ternary(tiny_random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ternary") / "model"
    assert main.run(["quantize", str(tiny_random_folder), "--recipe", "ternary-fast", "--out", str(out)]) == 0
    return out


def first(tensors: Tensors, leaf: str) -> str:
    return next(name for name in tensors if name.endswith(leaf))


def drop(tensors: Tensors) -> str:
    name = first(tensors, ".scales")
    del tensors[name]
    return name


def add(tensors: Tensors) -> str:
    tensors["transformer_blocks.0.surplus"] = torch.zeros(3)
    return "transformer_blocks.0.surplus"


def reshape(tensors: Tensors) -> str:
    name = first(tensors, ".codes")
    tensors[name] = tensors[name][:, :-1].contiguous()
    return name


def leave_the_range(tensors: Tensors) -> str:
    name = first(tensors, ".codes")
    tensors[name][0, 0] = 0xFF
    return name


def poison(tensors: Tensors) -> str:
    name = first(tensors, ".scales")
    tensors[name][0, 0] = float("nan")
    return name


@pytest.mark.parametrize("damage", [drop, add, reshape, leave_the_range, poison])
def test_damaged_tensors_are_named(
    damage: Callable[[Tensors], str], ternary: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(ternary, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = damage(tensors)
    save_file(tensors, file, metadata)
    line = refused(["generate", str(model), "a", "--steps", "1", "--out", str(tmp_path / "a.png")], capsys)
    assert name in line
    assert not (tmp_path / "a.png").exists()


def test_truncated_file(ternary: Path, tmp_path: Path, capsys: Capture) -> None:
    model = tmp_path / "model"
    shutil.copytree(ternary, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    for command in (["inspect", str(model)], ["generate", str(model), "a", "--out", str(tmp_path / "a.png")]):
        assert file.name in refused(command, capsys)


def test_newer_format_version(ternary: Path, tmp_path: Path, capsys: Capture) -> None:
    model = tmp_path / "model"
    shutil.copytree(ternary, model)
    file = model / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 99
    file.write_text(json.dumps(config))
    for command in (["inspect", str(model)], ["generate", str(model), "a", "--out", str(tmp_path / "a.png")]):
        line = refused(command, capsys)
        assert "format_version 99" in line and "upgrade" in line


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: Capture) -> None:
    assert "model_index.json" in refused(["generate", str(tmp_path), "a"], capsys)
    assert "config.json" in refused(["inspect", str(tmp_path)], capsys)
