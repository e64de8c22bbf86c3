"""The scripts for readers run as they stand."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_lora_draws_outlines_on_few_bits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "lora.png"
    monkeypatch.setattr(sys, "argv", ["lora.py", "--steps", "10", "--out", str(out)])
    runpy.run_path(str(EXAMPLES / "lora.py"), run_name="__main__")
    shown = capsys.readouterr().out
    counts = dict(re.findall(r"^ *(.+): (\d+) of 6 pictures", shown, re.MULTILINE))
    assert counts["16 bit"] == counts["few bits"] == "0"
    assert min(int(counts["16 bit + LoRA"]), int(counts["few bits + LoRA"])) >= 4
    near = {name: float(psnr) for name, psnr in re.findall(r"^ *(.+): ([\d.]+) dB PSNR", shown, re.MULTILINE)}
    assert min(near.values()) > 20
    assert "after unloading, every pixel is as before: True" in shown
    picture = np.asarray(Image.open(out))
    assert picture.shape == (128 * len(counts), 6 * 128, 3)
    assert not np.array_equal(picture[:128], picture[128:256])
