"""Speed beside other libraries: what a row says, what is refused, and that rows are kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import peers
import peers_speed
import performance_table
import pytest
import torch
from peers_speed import BASE, Method, by_peer, compared, measured, methods, run, select, table
from torch import Tensor, nn

from bittern.evaluation.cost import models, random_weights
from bittern.evaluation.cost.benchmark import How
from bittern.layers import quant_layers

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class _Coarse(nn.Module):
    """A weight of 8 bits and one scale: what a library might put in the place of a layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.abs().max()) / 127
        self.register_buffer("codes", (linear.weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def _setting(name: str, make, library: str = "torch") -> peers.Setting:
    return peers.Setting(library, name, 64, lambda linear, group: (make(linear), 0.0))


def _fail(_linear: nn.Linear) -> nn.Module:
    raise ImportError("needs a kernel\nand more")


def _arguments(file: Path | None = None, **changes: object) -> argparse.Namespace:
    args = peers_speed.parser().parse_args(["--mini", "--device", "cpu", "--steps", "1", "--runs", "2"])
    args.json = file
    return argparse.Namespace(**{**vars(args), **changes})


def test_a_librarys_layers_take_the_places_of_our_plans_and_no_others() -> None:
    what = models.subject("flux.1-dev", mini=True)
    model = by_peer(_setting("coarse", _Coarse))(what, "cpu")
    coarse = {path for path, module in model.named_modules() if isinstance(module, _Coarse)}
    few = random_weights.few_bit(what, "int4", "cpu", torch.bfloat16)
    assert coarse == set(quant_layers(few))
    assert isinstance(model.proj_out, nn.Linear)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_rows_are_kept_and_say_why_there_is_none(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    settings = [
        _setting("coarse", _Coarse),
        _setting("whole", lambda linear: linear),
        _setting("broken", _fail),
        _setting("absent", _Coarse, "no-such-library"),
    ]
    record = run(_arguments(file), methods(settings))
    rows = record["rows"]
    assert json.loads(file.read_text()) == record
    assert list(rows) == [
        f"{name} [eager]" for name in (BASE, "svdquant-fast", "ternary-fast", "coarse", "whole", "broken", "absent")
    ]
    assert rows["coarse [eager]"]["finite"] and rows["coarse [eager]"]["times_smaller"] > 1.5
    base, coarse = rows[f"{BASE} [eager]"], rows["coarse [eager]"]
    assert coarse["times_faster"]["low"] == round(min(base["ms_runs"]) / max(coarse["ms_runs"]), 3)
    assert "leaves layers in 16 bits" in rows["whole [eager]"]["reason"]
    assert rows["broken [eager]"]["reason"] == "ImportError: needs a kernel"
    assert rows["absent [eager]"]["reason"] == "no-such-library is not installed"
    text = table(record)
    assert "| peer | absent | eager | no-such-library is not installed | | | | |" in text
    assert "**ternary-fast**" in text and text == "\n".join(performance_table.lines(record)).rstrip()

    # A later process times 16 bits anew, and what it does not time stays.
    again = run(_arguments(file), select(["ternary"], methods(settings)))
    assert again["rows"]["coarse [eager]"] == coarse
    assert again["rows"][f"{BASE} [eager]"] != base
    assert set(again["rows"]) == set(rows)


def test_what_runs_eager_and_does_not_compile_has_both_rows() -> None:
    method = Method("coarse", "peer", by_peer(_setting("coarse", _Coarse)), "torch")
    how = How(steps=1, runs=1, compile=True, compiler="no-such-compiler")
    eager, compiled = measured(method, models.subject("flux.1-dev", mini=True), how)
    assert eager["finite"] and "reason" not in eager
    assert compiled["mode"] == "compiled" and "no-such-compiler" in compiled["reason"]


def test_ours_must_not_fail() -> None:
    def fail(_what: models.Subject, _device: str) -> nn.Module:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        run(_arguments(), [Method("int4", "ours", fail)])


def test_a_row_is_compared_with_the_same_way_of_running() -> None:
    base = {"eager": {"ms_runs": [8.0, 8.0], "resident_gib": 4.0}}
    row = {"kind": "ours", "mode": "eager", "ms": 2.0, "ms_runs": [2.0, 2.0], "resident_gib": 1.0}
    found = compared(row, base)
    assert found["times_faster"] == {"ratio": 4.0, "low": 4.0, "high": 4.0} and found["times_smaller"] == 4.0
    assert "times_faster" not in compared(row | {"mode": "compiled"}, base)


def test_a_method_that_does_not_exist_is_refused() -> None:
    with pytest.raises(peers_speed.UserError, match="--only 'nf5'"):
        select(["nf5"], methods())
    assert {method.library for method in methods()} == {None, "bitsandbytes", "sdnq", "optimum-quanto", "torchao"}


def test_the_page_of_measurements_is_made_of_the_results() -> None:
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*_h?00.json"))]
    written = "".join(f"{line}\n" for result in results for line in performance_table.lines(result))
    assert written == (RESULTS.parents[1] / "docs" / "performance_table.md").read_text()
