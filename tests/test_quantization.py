"""The conductor: what every layer becomes, what the report says of it, and that a failure changes nothing."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import bittern
from bits import expect_bits
from bittern import quantization, recipes
from bittern.errors import UserError
from bittern.layers import QuantLinear, quant_layers

NewPipeline = Callable[[], FluxPipeline]
RECIPES = [name for name in recipes.names() if not recipes.load(name).calibrated]


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    return {path: m.weight.detach().clone() for path, m in model.named_modules() if type(m) is nn.Linear}


@pytest.fixture
def model(new_tiny_random_pipeline: NewPipeline) -> FluxTransformer2DModel:
    return new_tiny_random_pipeline().transformer


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_report_agrees_with_the_layers(model: FluxTransformer2DModel, recipe: str) -> None:
    before = plain_weights(model)
    parameters = sum(p.numel() for p in model.parameters())
    report = bittern.quantize(model, recipe)
    layers = quant_layers(model)
    assert [row.path for row in report.rows] == sorted(layers, key=lambda path: (path.split(".")[0], path))
    assert len(layers) == 14 + 6
    assert report.recipe == recipe
    for row in report.rows:
        layer, weight = layers[row.path], before[row.path]
        assert row.shape == tuple(weight.shape) == (layer.out_features, layer.in_features)
        scheme = layer.scheme
        assert (row.format, row.group_size, row.rank) == (scheme.weight, scheme.group_size, scheme.rank)
        assert row.activations == scheme.activations
        assert row.bytes == sum(t.nbytes for leaf, t in layer.tensors().items() if leaf != "bias")
        missed = (layer.weight.dequantize().double() - weight).norm() / weight.norm()
        assert row.error == pytest.approx(missed.item(), rel=1e-4)
        limit = 0.6 if scheme.weight == "ternary" else 0.12
        assert 0 < row.error < limit
    weights = sum(math.prod(row.shape) for row in report.rows)
    assert report.bits_per_weight == pytest.approx(8 * sum(row.bytes for row in report.rows) / weights)
    assert report.parameters == parameters
    ternary = sum(math.prod(row.shape) for row in report.rows if row.format == "ternary")
    assert report.ternary_share == pytest.approx(ternary / parameters)
    in_blocks = sum(w.numel() for path, w in before.items() if "blocks" in path)
    assert report.ternary_share_blocks == pytest.approx(ternary / in_blocks)


def test_groups_and_segments_reach_the_layers(model: FluxTransformer2DModel) -> None:
    bittern.quantize(model, "svdquant-fast")
    layers = quant_layers(model)
    single = "single_transformer_blocks.0."
    names = [single + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    group = layers[names[0]].group
    assert group is not None
    assert group.members == [layers[name] for name in names]
    assert layers[single + "proj_out"].segments == (64, 256)
    assert layers[single + "norm.linear"].group is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_prediction_inspection_and_files_agree(model: FluxTransformer2DModel, recipe: str, tmp_path: Path) -> None:
    predicted = bittern.predict(model, recipe)
    size = bittern.predict_size(model, recipe)
    report = bittern.quantize(model, recipe)
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert size == report.file_bytes == file.stat().st_size
    tensors = load_file(file)
    assert report.bytes == predicted.bytes == sum(t.nbytes for t in tensors.values())
    targets = {row.path for row in report.rows}
    stored = {name: t for name, t in tensors.items() if name.rpartition(".")[0] in targets and "bias" not in name}
    weights = sum(math.prod(row.shape) for row in report.rows)
    bits = 8 * sum(t.nbytes for t in stored.values()) / weights
    for seen in (report, predicted, bittern.inspect(model), bittern.inspect(tmp_path), bittern.inspect(str(tmp_path))):
        assert seen.bits_per_weight == pytest.approx(bits)
        assert seen.parameters == report.parameters
    assert bittern.inspect(tmp_path) == report == bittern.inspect(model)
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert {"bits_per_weight", "ternary_share", "ternary_share_blocks", "bytes", "targets"} <= set(data)
    assert {"path", "format", "group_size", "rank", "activations", "error"} <= set(data["targets"][0])
    assert recipe in repr(report)
    assert len(repr(report)) < 120


def test_prediction_at_full_size() -> None:
    """FLUX.1 with every block linear ternary at 2 bits: the sizes that the 1.58-bit FLUX paper works with."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    report = bittern.predict(flux, "ternary-fast")
    assert report.parameters == 11_901_408_320
    assert report.ternary_share == pytest.approx(0.9944, abs=5e-5)
    assert report.ternary_share_blocks == 1.0
    assert report.bytes / 1e9 == pytest.approx(3.099, abs=5e-4)
    assert len(report.rows) == 19 * 14 + 38 * 6


def test_inspecting_sixteen_bits(tiny_random_pipeline: FluxPipeline, tiny_random_folder: Path) -> None:
    report = bittern.inspect(tiny_random_pipeline)
    assert report.rows == ()
    assert (report.ternary_share, report.ternary_share_blocks) == (0.0, 0.0)
    assert report.bits_per_weight == 32.0
    assert report.bytes == 4 * report.parameters
    assert bittern.inspect(tiny_random_folder) == report


def test_inspecting_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no model: expected a folder with config\.json"):
        bittern.inspect(tmp_path)
    with pytest.raises(UserError, match="has no transformer or unet"):
        bittern.inspect(SimpleNamespace())
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match="is not a model's config"):
        bittern.inspect(tmp_path)


def test_inspecting_a_folder_of_another_models_config(model: FluxTransformer2DModel, tmp_path: Path) -> None:
    bittern.quantize(model, "int4")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    path = next(iter(config["quantization_config"]["targets"]))
    config["quantization_config"]["targets"]["another.layer"] = config["quantization_config"]["targets"][path]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"target 'another\.layer' is no linear of Flux"):
        bittern.inspect(tmp_path)


def test_same_seed_same_bytes_and_no_trace_in_the_random_state(new_tiny_random_pipeline: NewPipeline) -> None:
    first, second = new_tiny_random_pipeline(), new_tiny_random_pipeline()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    bittern.quantize(first, "svdquant-fast", seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    bittern.quantize(second, "svdquant-fast", seed=5)
    for (name, one), other in zip(
        first.transformer.state_dict().items(), second.transformer.state_dict().values(), strict=True
    ):
        if not name.endswith(".weight"):
            assert torch.equal(one, other), name


def test_a_layer_does_not_depend_on_the_others(new_tiny_random_pipeline: NewPipeline) -> None:
    whole, part = new_tiny_random_pipeline().transformer, new_tiny_random_pipeline().transformer
    bittern.quantize(whole, "svdquant-fast")
    bittern.quantize(part, recipes.load("svdquant-fast").override(keep=["single_transformer_blocks.*"]))
    for path, layer in quant_layers(part).items():
        for leaf, tensor in layer.tensors().items():
            assert torch.equal(tensor, quant_layers(whole)[path].tensors()[leaf]), (path, leaf)
    assert not any(path.startswith("single") for path in quant_layers(part))


def test_progress_rises_to_the_total(model: FluxTransformer2DModel) -> None:
    calls: list[tuple[str, float, float]] = []
    bittern.quantize(model, "int4", progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1][1:] == (20, 20)
    assert "transformer_blocks.0.norm1.linear" in calls[0][0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(model: FluxTransformer2DModel, value: float) -> None:
    with torch.no_grad():
        model.single_transformer_blocks[0].proj_out.weight[1, 2] = value
    before = plain_weights(model)
    with pytest.raises(UserError, match=r"1 weights of single_transformer_blocks\.0\.proj_out are NaN or infinite"):
        bittern.quantize(model, "int4")
    assert plain_weights(model).keys() == before.keys()


def test_weights_that_are_not_loaded_are_refused() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6)
        )
    with pytest.raises(UserError, match=r"the weight of transformer_blocks\.0\.norm1\.linear is not loaded"):
        bittern.quantize(model, "int4")


def test_a_failure_midway_leaves_the_model_as_it_was(
    model: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, config = plain_weights(model), dict(model.config)
    real, calls = quantization.jobs.solve, []

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(quantization.jobs, "solve", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        bittern.quantize(model, "int4")
    after = plain_weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[path], before[path]) for path in before)
    assert dict(model.config) == config
    assert not getattr(model, "is_quantized", False)
    monkeypatch.undo()
    assert len(bittern.quantize(model, "int4").rows) == 20


def test_a_quantized_model_is_refused(model: FluxTransformer2DModel) -> None:
    bittern.quantize(model, "int4")
    for act in (bittern.quantize, bittern.predict_size):
        with pytest.raises(UserError, match=r"already quantized \(bittern\): load the original"):
            act(model, "int4")
    assert isinstance(model.proj_out, nn.Linear)
    assert not isinstance(model.proj_out, QuantLinear)


def test_a_model_quantized_by_others_is_refused(model: FluxTransformer2DModel) -> None:
    model.is_quantized, model.quantization_method = True, "torchao"
    with pytest.raises(UserError, match=r"already quantized \(torchao\)"):
        bittern.quantize(model, "int4")


def test_a_model_with_an_adapter_is_refused(tiny_random_pipeline: FluxPipeline) -> None:
    from peft import LoraConfig

    tiny_random_pipeline.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_k"]))
    with pytest.raises(UserError, match=r"attn\.to_k wears a LoRA adapter: fuse or unload it"):
        bittern.quantize(tiny_random_pipeline, "int4")


def test_other_mistakes(model: FluxTransformer2DModel) -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'int5': did you mean 'int4'\?"):
        bittern.quantize(model, "int5")
    with pytest.raises(UserError, match="recipe int4 uses no prompts: leave them out"):
        bittern.quantize(model, "int4", prompts=["a red circle"])
    for seed in (-1, 2**31, 0.5, True):
        with pytest.raises(UserError, match=r"seed .*: expected a whole number"):
            bittern.quantize(model, "int4", seed=seed)
    with pytest.raises(UserError, match="blocks of model class 'Linear' cannot be found"):
        bittern.quantize(nn.Linear(4, 4), "int4")


def test_solver_settings_of_recipes_are_the_solvers_own() -> None:
    from dataclasses import asdict

    from bittern.solvers import SolverOptions

    assert recipes.LayerSpec(weight="int4").solver() == asdict(SolverOptions())


def test_any_target_may_have_any_scheme(new_tiny_random_pipeline: NewPipeline, tmp_path: Path) -> None:
    """Every target gets a scheme of its own by a glob: it has it, and the model survives a round trip."""
    whole = new_tiny_random_pipeline().transformer
    targets = sorted(quant_layers(quantized(new_tiny_random_pipeline().transformer, "int4")))
    choices = random.Random(0)
    wanted: dict[str, dict[str, Any]] = {
        path: {
            "weight": choices.choice(["int4", "ternary"]),
            "group_size": choices.choice([16, 32, 64, None]),
            "activations": choices.choice([4, 8, 16]),
            "rank": choices.choice([0, 3, 16, "1/8"]),
            "scale_dtype": choices.choice(["bf16", "fp16", "fp32"]),
            "smoothing": choices.choice(["none", "span"]),
        }
        for path in targets
    }
    kept = "transformer_blocks.0.attn.to_k"
    named = {path.replace("single_", "s*_"): wanted[path] for path in targets if path != kept}
    globs = {"*": {"rank": 7}, **named}  # later globs win
    model = quantized(whole, recipes.load("int4").override(name="any", overrides=globs, keep=[kept]))
    layers = quant_layers(model)
    assert set(layers) == set(targets) - {kept} and type(model.get_submodule(kept)) is nn.Linear
    for path, layer in layers.items():
        wish = wanted[path]
        limit = min(layer.in_features, layer.out_features)
        assert layer.scheme.rank == (limit // 8 if wish["rank"] == "1/8" else wish["rank"])
        assert layer.scheme.smooth == (wish["smoothing"] == "span")
        for key in ("weight", "group_size", "activations", "scale_dtype"):
            assert getattr(layer.scheme, key) == wish[key], path
    assert len({layer.scheme for layer in layers.values()}) > 12
    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip
    expect_bits(again.state_dict(), model.state_dict())
    with torch.no_grad():
        want, got = model(**inputs)[0], again(**inputs)[0]
    # Tensors of a file lie at any address, and a BLAS may sum what is not aligned in another order.
    assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def quantized(model: FluxTransformer2DModel, recipe: str | recipes.Recipe) -> FluxTransformer2DModel:
    bittern.quantize(model, recipe)
    return model
