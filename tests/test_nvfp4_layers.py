"""nvfp4 from a recipe to a checkpoint and its layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import bittern
from bits import expect_bits
from bittern import recipes, tiny_flux
from bittern.conversion import export_checkpoint, import_checkpoint
from bittern.errors import UserError
from bittern.formats import KLayout, nvfp4
from bittern.layers import QuantLinear, quant_layers, set_path
from bittern.scheme import Scheme
from bittern.solvers import SolverOptions, relative_error, solve
from converted import their_model

if TYPE_CHECKING:
    from diffusers import FluxPipeline

NVFP4 = {"weight": "nvfp4", "group_size": 16, "scale_dtype": "e4m3"}
SCHEME = Scheme(**NVFP4, activations=8, rank=8, smooth=True)
NewPipeline = Callable[[], "FluxPipeline"]


def solved(n: int, segments: tuple[int, ...], scheme: Scheme = SCHEME) -> tuple[torch.nn.Linear, QuantLinear]:
    with torch.random.fork_rng():
        torch.manual_seed(n)
        linear = torch.nn.Linear(sum(segments), n)
    options = SolverOptions(smoothing="span" if scheme.smooth else "none")
    (solution,) = solve([linear.weight.detach()], scheme, options, segments, 0)
    layer = QuantLinear.from_solution(linear, scheme, segments, solution)
    # What a solver thinks of and what a layer stores are the same weight.
    assert torch.allclose(layer.weight.dequantize(), solution.reconstruct(), rtol=1e-6, atol=1e-7)
    return linear, layer


@pytest.mark.parametrize("segments", [(96,), (40, 100)])
def test_all_paths_compute_the_layer(segments: tuple[int, ...]) -> None:
    linear, layer = solved(50, segments)
    x = torch.randn(30, sum(segments), generator=torch.Generator().manual_seed(0))
    exact = linear(x).detach()
    reached = {}
    for path in ("a16", "a8-int8", "a8-fp8"):
        layer.path = path
        reached[path] = float((layer(x).detach() - exact).norm() / exact.norm())
    missed = layer.weight.dequantize() - linear.weight.detach()
    assert reached["a16"] == pytest.approx(float((x @ missed.T).norm() / exact.norm()), rel=1e-3)
    assert reached["a16"] < 0.09 and reached["a8-int8"] < 0.1 and reached["a8-fp8"] < 0.11


@pytest.mark.parametrize(("tails", "least", "most"), [("flat", -3, -2), ("gaussian", -0.5, 0.5), ("heavy", 2, 3)])
def test_beside_int4_of_its_size(tails: str, least: float, most: float) -> None:
    """Decibels more than int4 in groups of 32, 4.5 bits a weight as well: the heavier the tails, the more."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 2048, generator=generator)
    if tails == "flat":
        weight = torch.rand(64, 2048, generator=generator) - 0.5
    elif tails == "heavy":
        # Student's t with four degrees of freedom.
        weight /= (torch.randn(4, 64, 2048, generator=generator).square().sum(dim=0) / 4).sqrt()
    schemes = (Scheme(**NVFP4), Scheme(group_size=32))
    errors = [relative_error(weight, *solve([weight], scheme, SolverOptions(), (2048,), 0)) for scheme in schemes]
    assert least < 20 * math.log10(errors[1] / errors[0]) < most


@pytest.mark.parametrize("recipe", ["svdquant-fast", "svdquant"])
def test_recipes_solve_it_and_checkpoints_carry_it(
    new_tiny_random_pipeline: NewPipeline, tmp_path: Path, recipe: str
) -> None:
    chosen = recipes.load(recipe).override(default={**NVFP4, "rank": 4}, samples=4, rows=64)
    pipe = new_tiny_random_pipeline()
    given: dict[str, Any] = {"prompts": ["a red circle"]} if recipe == "svdquant" else {}
    report = bittern.quantize(pipe, chosen, **given)
    assert {row.format for row in report.rows} == {"nvfp4"}
    assert all(row.error is not None and row.error < 0.2 for row in report.rows)
    if recipe == "svdquant":
        gains = [row.stages["gptq"] < row.stages["nearest"] for row in report.rows if row.stages]
        assert gains and all(gains)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    own = quant_layers(pipe.transformer)
    for path, layer in quant_layers(again.transformer).items():
        assert torch.equal(layer.weight.dequantize(), own[path].weight.dequantize())
        assert layer.parts().scales.dtype == torch.float8_e4m3fn
    images = []
    for model in (pipe, again):
        set_path(model.transformer, "a16")
        model.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        size = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}
        images.append(model("a cat", **size, generator=noise, output_type="pt").images)
    assert torch.equal(*images)


INT4 = {"weight": "int4", "group_size": 64, "scale_dtype": "bf16"}


@pytest.mark.slow
def test_svdquant_of_tiny_flux_goes_to_nunchaku_lite_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smoothing, branch and GPTQ on nvfp4, as Lite has it: W4A4 layers in nvfp4, adaLN in int4. One block of a kind."""
    from diffusers import DiffusionPipeline, FluxTransformer2DModel

    recipe = recipes.load("svdquant").override(
        default={**NVFP4, "shift": 0.0, "rounds": 0, "smoothing": "grid", "sensitivity": False},
        modulation=INT4,
        samples=1,
        rows=64,
        keep=["transformer_blocks.1.*", *(f"single_transformer_blocks.{i}.*" for i in range(1, 6))],
    )
    pipe = DiffusionPipeline.from_pretrained(tiny_flux.path(), dtype=torch.bfloat16)
    report = bittern.quantize(pipe, recipe, prompts=["a photo of a red circle"])
    solved = [row for row in report.rows if row.format == "nvfp4"]
    assert len(solved) == 12 + 5 and len(report.rows) == len(solved) + 3
    assert all(row.stages["gptq"] < row.stages["nearest"] for row in solved if row.stages)
    pipe.save_pretrained(tmp_path / "ours")

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")

    export_checkpoint(tmp_path / "ours", tmp_path / "lite", "nunchaku-lite")
    _, _, count = their_model(monkeypatch, tmp_path / "lite" / "transformer", FluxTransformer2DModel)
    assert count == len(report.rows)
    import_checkpoint(tmp_path / "lite", tmp_path / "back")
    before, after = tensors(tmp_path / "ours"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    # Its two inputs have a scale a row each, and in Lite one: only the products are the same.
    path = "single_transformer_blocks.0.proj_out"
    layout = KLayout((256, 1024), 16)
    products = [nvfp4.combine(t.pop(f"{path}.scales"), t.pop(f"{path}.row_scales"), layout) for t in (before, after)]
    assert torch.equal(*products)
    expect_bits(after, before)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"weight": "nvfp4"}, "scale_dtype 'bf16' does not fit nvfp4: expected 'e4m3'"),
        ({**NVFP4, "group_size": 64}, "group_size 64 does not fit nvfp4: expected 16"),
        ({**NVFP4, "packing": "nibbles"}, "packing 'nibbles' does not fit nvfp4"),
        ({"weight": "int4", "scale_dtype": "e4m3"}, "scale_dtype 'e4m3' does not fit int4"),
        ({**NVFP4, "branch_dtype": "e4m3"}, "branch_dtype 'e4m3': expected 16 or 32 bits"),
    ],
)
def test_numbers_that_do_not_fit(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scheme(**numbers)
