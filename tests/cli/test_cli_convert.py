"""`bittern convert`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nunchaku_files as files
from bittern.cli import main


def test_in_and_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_flux(tmp_path / "f.safetensors", symmetric=True)
    ours, lite, again = (str(tmp_path / name) for name in ("ours", "lite", "again.safetensors"))
    assert main.run(["convert", str(tmp_path / "f.safetensors"), "--out", ours, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recipe"] == "nunchaku-int4" and len(said["targets"]) == 14 + 2 * 6
    assert main.run(["inspect", ours]) == 0
    assert "nunchaku-int4: 26 few-bit layers" in capsys.readouterr().out
    assert main.run(["convert", ours, "--to", "nunchaku", "--out", again, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["layers"] == 26 and said["rank"] == 32 and said["bytes"] == Path(again).stat().st_size
    # Two inputs with a branch each are one layer of twice the rank in Lite.
    assert main.run(["convert", ours, "--to", "nunchaku-lite", "--out", lite]) == 2
    assert "has one rank for all layers" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.safetensors"
    files.write_flux(file)
    for arguments, message in (
        (["--to", "nunchaku-lite", "--pipeline", "tiny-flux"], "--pipeline is for files that come in"),
        (["--to", "nunchaku-lite"], "no folder"),
        (["--pipeline", "tiny-flx"], "did you mean 'tiny-flux'"),
    ):
        assert main.run(["convert", str(file), "--out", str(tmp_path / "out"), *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    for flags in ([], ["--force"]):
        assert main.run(["convert", str(file), "--out", str(tmp_path / "out"), *flags]) == 2
    assert (tmp_path / "out" / "mine").read_text() == "keep"
