"""What a run reads and where it writes lie apart: --force would delete the pictures that are to be judged."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bittern.errors import UserError
from bittern.evaluation.compbench import suite as compbench
from bittern.evaluation.geneval import suite as geneval


def files(place: Path) -> dict[str, bytes]:
    return {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*") if f.is_file()}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """What --force takes for an earlier run."""
    place = tmp_path / "run"
    (place / "reference" / "00000" / "samples").mkdir(parents=True)
    (place / "run.json").write_text('{"suite": "geneval"}')
    (place / "results.jsonl").write_text("{}\n")
    (place / "reference" / "results.jsonl").write_text("{}\n")
    (place / "metadata.jsonl").write_text("{}\n")
    return place


def judges_geneval(out: Path, **options: Any) -> Any:
    return geneval.evaluate(options.pop("model", None), options.pop("metadata", None), out, force=True, **options)


def judges_compbench(out: Path, **options: Any) -> Any:
    return compbench.evaluate(options.pop("model", None), options.pop("metadata", None), out, force=True, **options)


@pytest.mark.parametrize("suite", [judges_geneval, judges_compbench])
@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("run", {"images": "run"}, "--images {run} is the same folder as --out {run}"),
        ("run", {"images": "run/../run/reference"}, "/reference is inside --out {run}"),
        ("run/scores", {"images": "run"}, "--images {run} is around --out {run}/scores"),
        ("run", {"images": "link"}, "is the same folder as --out {run}"),
        ("link", {"images": "run"}, "is the same folder as"),
        ("run", {"model": "tiny-flux", "reference": "run"}, "--reference {run} is the same folder as --out {run}"),
        ("run", {"model": "tiny-flux", "reference": "run/reference"}, "is inside --out {run}"),
        ("run", {"model": "run/reference"}, "the model {run}/reference is inside --out {run}"),
        ("run", {"model": "tiny-flux", "metadata": "run/metadata.jsonl"}, "metadata.jsonl is inside --out {run}"),
    ],
)
def test_inputs_are_never_emptied(
    suite: Callable[..., Any], out: str, options: dict[str, str], message: str, earlier: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(earlier)
    before = files(earlier)
    given = {name: value if value == "tiny-flux" else str(tmp_path / value) for name, value in options.items()}
    with pytest.raises(UserError, match=re.escape(message.format(run=earlier))):
        suite(tmp_path / out, **given)
    assert files(earlier) == before


def test_detectors_are_kept_too(tmp_path: Path, earlier: Path, detector_folder: Path, twelve: Path) -> None:
    shutil.copytree(detector_folder, earlier / "detector")
    with pytest.raises(UserError, match=r"--detector .*/detector is inside --out .*/run"):
        judges_geneval(earlier, model="tiny-flux", metadata=twelve, detector_model=str(earlier / "detector"))
    assert (earlier / "detector" / "config.json").is_file()
