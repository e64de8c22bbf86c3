"""The built-in name: tiny-flux's components around another transformer, and a clear word while there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bittern
from bittern import pipelines, tiny_flux, tiny_flux_ternary
from bittern.cli import main
from bittern.errors import UserError

TRAINED = Path(tiny_flux_ternary.__file__).parent / tiny_flux_ternary.TRANSFORMER


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    pipe = pipelines.load("tiny-flux")
    bittern.quantize(pipe.transformer, "ternary-fast")
    pipe.transformer.save_pretrained(folder)
    return folder


def test_other_components_are_tiny_fluxs(transformer: Path) -> None:
    folder = tiny_flux_ternary.assembled(transformer, tiny_flux.path())
    assert folder == tiny_flux_ternary.assembled(transformer, tiny_flux.path())
    pipe, original = pipelines.load(folder), pipelines.load("tiny-flux")
    for name in ("vae", "text_encoder", "text_encoder_2"):
        own, other = (getattr(each, name).state_dict() for each in (pipe, original))
        assert all(torch.equal(tensor, other[key]) for key, tensor in own.items())
    assert bittern.inspect(pipe).ternary_share_blocks == 1
    assert bittern.inspect(folder).recipe == "ternary-fast"


def test_without_a_trained_transformer_the_name_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make it with `bittern quantize tiny-flux --recipe ternary-distilled"):
        tiny_flux_ternary.assembled(tmp_path, tiny_flux.path())


def test_the_built_in_name() -> None:
    if not TRAINED.exists():
        with pytest.raises(UserError, match="tiny-flux-ternary is not in this copy"):
            pipelines.resolve("tiny-flux-ternary")
        return
    assert sum(file.stat().st_size for file in TRAINED.iterdir()) <= 3_500_000
    report = bittern.inspect(pipelines.resolve("tiny-flux-ternary"))
    assert report.ternary_share_blocks >= 0.99
    assert {row.rank for row in report.rows} == {0}


@pytest.mark.parametrize("command", [["inspect", "--dry-run"], ["quantize", "--out", "out"]])
def test_it_is_called_by_its_name_where_it_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run([command[0], tiny_flux_ternary.NAME, *command[1:], "--recipe", "int4"]) == 2
    shown = capsys.readouterr().err
    assert shown == "error: 'tiny-flux-ternary' is already quantized (bittern): give the original\n"
