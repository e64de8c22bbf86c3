"""The benchmark of layers on a CPU: that its command works, and what its ratios are of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cpu as benchmark
import pytest
import torch

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Inputs are rounded, too, and so some of their codes are others.
BF16 = 1.5e-2


def test_ratios_are_to_the_dense_layer_of_the_same_dtype(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "_BUDGET_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--mini", "--threads", "1", "--json", str(tmp_path / "cpu.json")])
    before = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(before)
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    # Two weights; of each two dense layers, and four kernels for each dtype.
    assert len(rows) == 2 * (2 + 8)
    dense = {(row["weight"], row["call"].removeprefix("dense ")): row["ms"] for row in rows if "ratio" not in row}
    for row in rows:
        if "ratio" in row:
            name = row["call"].split()[-1]
            assert row["ratio"] == pytest.approx(row["ms"] / dense[row["weight"], name], rel=2e-3)
            assert row["error"] < (BF16 if name == "bf16" else 1e-5)


def test_stored_results_have_small_errors() -> None:
    result = json.loads((RESULTS / "cpu.json").read_text())
    assert result["cpu"] and result["commit"] and result["versions"]["torch"]
    errors = {row["call"]: row["error"] for row in result["rows"] if "error" in row}
    assert errors
    assert all(error < (BF16 if call.endswith("bf16") else 1e-5) for call, error in errors.items())
