"""The benchmark of layers at every number of tokens: that its command works, and what its ratios are of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import every_layer as benchmark
import performance_table
import pytest


def test_ratios_are_to_the_16_bit_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    options = ["--mini", "--device", "cpu", "--tokens", "3", "1", "--json", str(file)]
    monkeypatch.setattr(benchmark, "LAYERS", {name: benchmark.LAYERS[name] for name in ("qkv", "out and down")})
    monkeypatch.setattr(sys, "argv", ["every_layer.py", *options])
    benchmark.main()
    record = json.loads(file.read_text())
    # Two layers, two numbers of tokens; bf16, and two weights on two paths.
    assert len(record["rows"]) == 2 * 2 * (1 + 4)
    dense = {(row["layer"], row["m"]): row["ms"] for row in record["rows"] if row["call"] == "bf16"}
    for row in record["rows"]:
        if row["call"] != "bf16":
            assert row["times_faster"] == pytest.approx(dense[row["layer"], row["m"]] / row["ms"], abs=2e-3)
    assert next(row["k"] for row in record["rows"] if row["layer"] == "out and down") == [64, 256]
    shown = "\n".join(performance_table.lines(record))
    assert benchmark.table(record) in shown and record["device"] in shown


def test_the_table_tells_what_is_slower_and_what_is_not_there() -> None:
    rows = [{"layer": "out", "m": m, "call": "int4 a16", "times_faster": found} for m, found in ((1, 2.0), (1024, 0.5))]
    rows.append({"layer": "up", "m": 1024, "call": "int4 a16", "times_faster": 1.0})
    _, _, first, second = benchmark.table({"rows": rows}).splitlines()
    assert first == "| out | int4 a16 | 2.00 | **0.50** |" and second == "| up | int4 a16 |  | 1.00 |"
