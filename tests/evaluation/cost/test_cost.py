"""The cost of a step: what is built, what is called, what is timed, and what may be said of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bittern
from bittern import layers, quantization, recipes
from bittern.errors import UserError
from bittern.evaluation.cost import benchmark as cost
from bittern.evaluation.cost import random_weights
from bittern.evaluation.cost.benchmark import How, benchmark, ratios, weight_bytes
from bittern.evaluation.cost.inputs import inputs
from bittern.evaluation.cost.models import PUBLISHED, subject
from bittern.evaluation.cost.timing import Ratio, timed
from bittern.formats import int4, nvfp4, ternary
from families import FAMILIES

QUICK = How(steps=1, runs=2)

PARAMETERS = {
    "flux.1-dev": 11.90e9,
    "flux.1-schnell": 11.89e9,
    "flux.2-dev": 32.2e9,
    "sd3.5-large": 8.06e9,
    "pixart-sigma": 0.611e9,
    "sana-1.6b": 1.604e9,
    "qwen-image": 20.43e9,
    "z-image": 6.15e9,
    "sdxl": 2_567_463_684,
    "sd1.5": 859_520_964,
}
"""What the authors say their models have."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_mean_the_published_models(name: str) -> None:
    model = random_weights.skeleton(subject(name), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=2e-3)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_name_runs_in_few_bits_and_in_sixteen(name: str) -> None:
    found = benchmark(name, "svdquant-fast", QUICK, mini=True)
    sixteen, few = found.rows
    assert sixteen["paths"] == {} and sum(few["paths"].values()) > 0
    assert sixteen["finite"] and few["finite"]
    assert 0 < few["resident_gib"] < sixteen["resident_gib"]
    assert [row["mode"] for row in found.rows] == ["eager", "eager"]


@pytest.mark.parametrize("recipe", ["svdquant-fast", "ternary-fast", "int4"])
def test_random_codes_have_the_sizes_that_quantizing_would_give(recipe: str) -> None:
    what = subject("flux.1-dev", mini=True)
    model = random_weights.few_bit(what, recipe, "cpu", torch.bfloat16)
    foreseen = quantization.predict(random_weights.skeleton(what, torch.bfloat16), recipe)
    found = layers.quant_layers(model)
    assert set(found) == {row.path for row in foreseen.rows}
    for row in foreseen.rows:
        assert found[row.path].scheme.weight == row.format and found[row.path].scheme.rank == row.rank
    assert sum(p.numel() for p in model.parameters()) < foreseen.parameters
    # In memory ternary codes have two bits; on disk they may have fewer.
    assert weight_bytes(model) == pytest.approx(foreseen.bytes, rel=0.02 if recipe != "ternary-fast" else 0.3)
    for layer in found.values():
        layer.scheme.format.check(layer.parts().codes, layer.scheme.layout(layer.segments).padded_k)
        assert len(set(layer.parts().codes.unique().tolist())) > 10


@pytest.mark.parametrize("weight", ["int4", "nvfp4", "ternary"])
def test_random_codes_are_those_of_rounded_gaussian_weights(weight: str) -> None:
    what, recipe = subject("flux.1-dev", mini=True), recipes.load("int4" if weight == "int4" else "ternary-fast")
    if weight == "nvfp4":
        recipe = recipes.load("int4").override(default={"weight": "nvfp4", "group_size": 16, "scale_dtype": "e4m3"})
    layer = next(iter(layers.quant_layers(random_weights.few_bit(what, recipe, "cpu", torch.bfloat16)).values()))
    layout, scheme = layer.scheme.layout(layer.segments), layer.scheme
    drawn = scheme.format.unpack(layer.parts().codes, layout.padded_k).float()
    group, generator = scheme.group_size or 4096, torch.Generator().manual_seed(0)
    blocks = torch.randn(2**18 // group, 1, group, dtype=torch.float64, generator=generator)
    lengths = torch.tensor([float(blocks.shape[-1])])
    solve = {"int4": int4.absmax, "nvfp4": nvfp4.absmax, "ternary": ternary.least_squares}[scheme.weight]
    solved = solve(blocks, lengths, torch.bfloat16)[0].float()
    for share in (0.2, 0.4, 0.6, 0.8, 0.95):
        apart = drawn.abs().flatten()[:8192].quantile(share) - solved.abs().flatten()[:8192].quantile(share)
        assert abs(apart) <= scheme.format.largest // 6
    assert drawn.std().item() == pytest.approx(solved.std().item(), rel=0.05)


def test_one_seed_makes_one_model() -> None:
    what = subject("flux.1-dev", mini=True)
    first, again = (random_weights.few_bit(what, "ternary-fast", "cpu", torch.bfloat16) for _ in range(2))
    for (name, one), (_, other) in zip(first.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(one, other), name


def test_shared_storages_count_once() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)])
    assert weight_bytes(model) == 2 * 4 * (32 + 4)
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 4 * (32 + 4 + 4)


@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_have_the_size_and_the_batch_that_were_asked_for(batch: int) -> None:
    what = subject("flux.1-dev", mini=True)
    model = random_weights.dense(what, "cpu", torch.float32)
    x = inputs(model, what, 128, batch, "cpu", torch.float32)
    assert x["hidden_states"].shape == (batch, 64, 64) and x["img_ids"].shape == (64, 3)
    assert x["img_ids"][9].tolist() == [0, 1, 1]
    assert x["guidance"].tolist() == [3.5] * batch
    with torch.no_grad():
        assert model(**x, return_dict=False)[0].shape == (batch, 64, 64)


def test_a_few_bit_folder_is_measured_beside_sixteen_bits(tiny_random_folder: Path, tmp_path: Path) -> None:
    from bittern.folders import quantize_folder

    quantize_folder(tiny_random_folder, "ternary-fast", tmp_path / "few")
    found = benchmark(str(tmp_path / "few"), None, How(steps=1, runs=2, size=32))
    assert [row["model"] for row in found.rows] == ["16 bit", str(tmp_path / "few")]
    assert [row["dtype"] for row in found.rows] == ["bf16", "bf16"] and found.size == 32
    report = bittern.inspect(tmp_path / "few")
    assert sum(found.rows[1]["paths"].values()) == len(report.rows)
    with pytest.raises(UserError, match="few-bit already"):
        benchmark(str(tmp_path / "few"), "int4", QUICK)


def test_a_folder_in_sixteen_bits_has_its_own_weights(tiny_random_folder: Path) -> None:
    from diffusers import FluxTransformer2DModel

    what = subject(str(tiny_random_folder))
    # The VAE of the random pipeline halves a picture once.
    assert (what.size, what.factor) == (32, 2)
    model = cost.loaded(what, "cpu", torch.float32)
    stored = FluxTransformer2DModel.from_pretrained(tiny_random_folder / "transformer").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    found = benchmark(str(tiny_random_folder), None, QUICK)
    # Its files hold float32; both sides of a comparison compute alike.
    assert [(row["model"], row["dtype"]) for row in found.rows] == [("16 bit", "bf16")]
    assert found.to_dict()["ratios"] == {}


def test_compiled_rows_count_their_graphs() -> None:
    how = How(steps=1, runs=2, compile=True, compiler="eager", profile=True)
    found = benchmark("flux.1-dev", "ternary-fast", how, mini=True)
    assert [(row["model"], row["mode"]) for row in found.rows] == [
        (model, mode) for model in ("16 bit", "ternary-fast") for mode in ("eager", "compiled")
    ]
    few = found.rows[-1]
    # One graph for each of the two kinds of block.
    assert few["graphs"] == 2 and few["graphs_after_warm_up"] == 0
    assert set(found.ratios["ternary-fast"]) == {"eager", "compiled"}
    assert any(kernel["ms"] > 0 for kernel in few["kernels"])
    assert "few_bit_linear" in " ".join(kernel["name"] for kernel in few["kernels"])
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_forced_path_and_attention_are_what_ran() -> None:
    found = benchmark(
        "flux.1-dev", "svdquant-fast", How(steps=1, runs=1, path="a16", attention="_native_math"), mini=True
    )
    assert [row["attention"] for row in found.rows] == ["_native_math"] * 2
    assert set(found.rows[1]["paths"]) == {"a16"}


@pytest.mark.parametrize(
    ("model", "recipe", "how", "mini", "parts"),
    [
        ("flux.1-dve", None, How(), False, ["'flux.1-dve'", "did you mean 'flux.1-dev'"]),
        ("tiny-flux", None, How(), True, ["--mini", "'tiny-flux'"]),
        ("flux.1-dev", None, How(size=100), True, ["size is 100", "multiple of 16"]),
        ("flux.1-dev", None, How(batch=0), True, ["batch is 0"]),
        ("flux.1-dev", None, How(steps=0), True, ["steps is 0"]),
        ("flux.1-dev", None, How(graph=True), True, ["--graph", "cpu", "leave it out"]),
        ("flux.1-dev", None, How(attention="falsh"), True, ["'falsh'", "did you mean 'flash'"]),
        ("flux.1-dev", "svdquant-fats", How(), True, ["did you mean 'svdquant-fast'"]),
    ],
)
def test_refusals(model: str, recipe: str | None, how: How, mini: bool, parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        benchmark(model, recipe, how, mini=mini)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_a_family_whose_inputs_are_unknown_is_refused() -> None:
    from bittern.evaluation.cost.inputs import check_request
    from bittern.evaluation.cost.models import Subject

    with pytest.raises(UserError, match="'WanTransformer3DModel' cannot be benchmarked"):
        check_request(Subject("wan", "WanTransformer3DModel", FAMILIES["wan"].tiny), 64, 1)


def test_timing_is_what_a_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter([0.0, 0.010, 1.0, 1.030, 2.0, 2.011, 3.0, 3.012])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    found = timed(lambda: calls.append(1), "cpu", steps=2, runs=2)
    assert len(calls) == 4
    assert found.medians == pytest.approx([20.0, 11.5])
    assert found.ms == pytest.approx(11.5)
    assert found.spread == pytest.approx(8.5 / 11.5)
    assert found.to_dict() == {
        "ms": 11.5, "ms_runs": [20.0, 11.5], "ms_least": 10.0, "ms_most": 30.0, "spread": round(8.5 / 11.5, 4)
    }  # fmt: skip


def test_a_ratio_within_the_spread_is_not_told() -> None:
    told = Ratio.of([100.0, 104.0, 102.0], [50.0, 52.0, 51.0])
    assert told.told and told.value == 2.0
    assert (told.low, told.high) == (100 / 52, 104 / 50)
    close = Ratio.of([100.0, 104.0, 102.0], [99.0, 101.0, 98.0])
    assert not close.told and close.to_dict()["ratio"] is None
    assert "not told: runs give 0.99 to 1.06" in str(close)
    assert "2.00x" in str(told)
    single = Ratio.of([100.0], [50.0])
    assert not single.told and single.to_dict()["ratio"] is None and "single run" in str(single)
    slower = Ratio.of([50.0, 51.0], [100.0, 100.0])
    assert slower.told and slower.to_dict() == {"ratio": 0.505, "low": 0.5, "high": 0.51}


def test_ratios_are_between_rows_of_one_way_of_running() -> None:
    def row(model: str, mode: str, ms: float) -> dict[str, object]:
        return {"model": model, "mode": mode, "ms_runs": [ms, ms]}

    rows = [row("16 bit", "eager", 8), row("16 bit", "compiled", 4), row("x", "eager", 2), row("x", "other", 1)]
    assert {mode: ratio.value for mode, ratio in ratios(rows)["x"].items()} == {"eager": 4.0}
