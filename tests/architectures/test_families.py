"""Every declared family against the forward of the installed diffusers, on tiny random models."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bittern
from bittern import quantization, recipes
from bittern.architectures import Plan, known, plan
from bittern.architectures.grouped_attention import Face
from bittern.architectures.recording import read_inputs
from bittern.layers import FewBitWeight, QuantConv2d, QuantLinear, quant_layers
from families import BATCH, FAMILIES, Family, run, seeded

# Relative error of the prediction with 4-bit weights, a quarter above what was measured: it depends on how much of the
# output comes straight from the residual stream, and in a U-Net without a trained one on nothing else than the blocks.
CLOSE = {"flux": 0.01, "flux2": 0.004, "sd3": 0.01, "pixart": 0.015, "sana": 0.04, "qwen_image": 0.007}
CLOSE |= {"z_image": 0.07, "sd15": 0.2, "sdxl": 0.23, "wan": 0.08, "ltx": 0.02}

GELU_LEAST = -0.17005


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: Family) -> nn.Module:
    """A model that tests must not change."""
    return family.build()


@pytest.fixture(scope="module")
def made(model: nn.Module) -> Plan:
    return plan(model, recipes.load("int4"))


@pytest.fixture(scope="module")
def few(family: Family) -> nn.Module:
    """The same in few bits, not to be changed either."""
    few = family.build()
    bittern.quantize(few, "int4")
    return few


def paths_of(made: Plan) -> list[str]:
    return [path for job in made.jobs for path in job.paths]


def test_every_layer_is_a_target_or_kept_for_a_declared_reason(family: Family, model: nn.Module, made: Plan) -> None:
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    layers = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    assert sorted([*paths_of(made), *made.kept]) == sorted(layers)
    assert len(paths_of(made)) == family.targets
    assert not any(reason.startswith("outside the blocks") for reason in made.kept.values()), made.kept
    assert known(family.class_name) is made.architecture


def test_groups_are_the_layers_of_a_block_that_read_one_tensor(family: Family, model: nn.Module, made: Plan) -> None:
    reading = read_inputs(model, lambda: run(model, family), BATCH)
    assert set(reading.inputs) >= {path for path in paths_of(made) if isinstance(model.get_submodule(path), nn.Linear)}
    seen: dict[Any, set[str]] = {}
    for path, where in reading.inputs.items():
        site = made.architecture.site(path)
        # The text of a cross-attention is one tensor for all blocks; a group stays within its block.
        if site and not site.is_modulation:
            seen.setdefault((site.parent, where), set()).add(path)
    assert {frozenset(job.paths) for job in made.jobs if len(job.paths) > 1} == {
        frozenset(group) for group in seen.values() if len(group) > 1
    }
    modulation = {path for path in paths_of(made) if made.architecture.site(path).is_modulation}
    assert modulation == reading.per_image & set(paths_of(made))


def test_shifted_inputs_come_out_of_a_gelu_and_no_others_do(family: Family, model: nn.Module) -> None:
    made = plan(model, recipes.load("svdquant-fast").override(default={"rank": 4}))
    inputs = watched(model, family, [path for path in paths_of(made) if "mod" not in path])
    for job in made.jobs:
        for path in job.paths:
            if path not in inputs or made.architecture.site(path).is_modulation:
                continue
            parts = inputs[path].split(job.segments, dim=-1)
            shifts = job.scheme.shift or (0.0,) * len(parts)
            for part, shift in zip(parts, shifts, strict=True):
                assert (part.min() >= GELU_LEAST) == bool(shift), (path, float(part.min()))


def watched(model: nn.Module, family: Family, paths: list[str]) -> dict[str, Tensor]:
    """The inputs of linears in one pass."""
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
        for path in paths
        if isinstance(model.get_submodule(path), nn.Linear)
    ]
    run(model, family)
    for handle in handles:
        handle.remove()
    return inputs


def test_a_few_bit_copy_is_close_and_reloads_to_equal_bits(
    family: Family, model: nn.Module, few: nn.Module, tmp_path: Path
) -> None:
    want = run(model, family)
    predicted = quantization.predict(model, "int4").to_dict()
    report = bittern.inspect(few)
    assert {**report.to_dict(), "targets": 0} == {**predicted, "targets": 0}
    got = run(few, family)
    error = float((got - want).norm() / want.norm())
    assert 0.1 * CLOSE[name_of(family)] < error < CLOSE[name_of(family)]
    few.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) == report.file_bytes
    again = type(few).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, family), got)
    assert quantization.inspect(tmp_path).to_dict() == report.to_dict()


def test_four_bit_activations_run_and_are_close(family: Family, model: nn.Module) -> None:
    few = family.build()
    bittern.quantize(few, recipes.load("svdquant-fast").override(default={"rank": 8, "rounds": 0}))
    bittern.layers.set_path(few, "a4")
    want, got = run(model, family), run(few, family)
    assert float((got - want).norm() / want.norm()) < 2 * CLOSE[name_of(family)]


def name_of(family: Family) -> str:
    return next(name for name, other in FAMILIES.items() if other is family)


def test_concatenated_inputs_of_flux2_are_attention_and_mlp() -> None:
    family = FAMILIES["flux2"]
    model = family.build()
    made = plan(model, recipes.load("int4"))
    segments = {job.paths[0]: job.segments for job in made.jobs if len(job.segments) > 1}
    assert segments == {f"single_transformer_blocks.{i}.attn.to_out": (64, 192) for i in range(2)}
    attn, mlp = model.single_transformer_blocks[1].attn, []
    attn.mlp_act_fn.register_forward_hook(lambda *call: mlp.append(call[-1]))
    path = "single_transformer_blocks.1.attn.to_out"
    assert torch.equal(watched(model, family, [path])[path][..., 64:], mlp[-1])


class Count(TorchDispatchMode):
    """Counts the operations of few-bit layers."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += str(func).startswith("bittern.few_bit_linear")
        return func(*args, **(kwargs or {}))


def apart(few: nn.Module, family: Family) -> Tensor:
    """The prediction when no layers run as one, since each has a hook."""
    handles = [layer.register_forward_hook(lambda *_: None) for layer in quant_layers(few).values()]
    got = run(few, family)
    for handle in handles:
        handle.remove()
    return got


def test_attention_runs_its_groups_as_one(family: Family, made: Plan, few: nn.Module) -> None:
    with Count() as count:
        got = run(few, family)
    # Larger kernels are convolved; Z-Image's mlp asks for its two linears one by one.
    jobs = [job for job in made.jobs if job.kernel in (None, (1, 1))]
    assert count.calls == len(jobs) + sum("feed_forward.w1" in job.paths[0] for job in jobs)
    assert torch.allclose(got, apart(few, family), rtol=1e-4, atol=1e-5)
    assert torch.equal(run(pickle.loads(pickle.dumps(copy.deepcopy(few))), family), got)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_grouped_attention_leaves_room_for_others(name: str) -> None:
    family = FAMILIES[name]
    few = family.build()
    before = {path: (type(p), inspect.signature(p.__call__)) for path, p in few.attn_processors.items()}
    bittern.quantize(few, "int4")
    for path, processor in few.attn_processors.items():
        kind, signature = before[path]
        assert isinstance(processor, kind) and type(processor) is not kind
        assert inspect.signature(processor.__call__) == signature
    want = run(few, family)
    few.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    assert torch.allclose(run(few, family), want, rtol=1e-4, atol=1e-5)
    for key, parameter in few.named_parameters():
        if "lora_B" in key:
            parameter.data.fill_(0.05)
    with_lora = run(few, family)
    assert (with_lora - want).norm() > 0.001 * want.norm()
    assert torch.allclose(with_lora, apart(few, family), rtol=1e-4, atol=1e-5)
    few.delete_adapters("default")
    assert torch.equal(run(few, family), want)
    for module in few.modules():
        if hasattr(module, "processor"):
            module.processor = type(module.processor).__base__()
    assert torch.allclose(run(few, family), want, rtol=1e-4, atol=1e-5)


def test_a_group_serves_only_the_tensor_it_was_asked_for() -> None:
    attn = FAMILIES["sd3"].build()
    bittern.quantize(attn, "int4")
    attn = attn.transformer_blocks[0].attn
    x, other = seeded(1, 3, 64), 2 * seeded(1, 3, 64)
    face = Face(attn)
    with Count() as count:
        q, v, k = face.to_q(x), face.to_v(x), face.to_k(other)
    assert count.calls == 2
    for got, layer, of in ((q, attn.to_q, x), (k, attn.to_k, other), (v, attn.to_v, x)):
        assert torch.allclose(got, layer(of), rtol=1e-4, atol=1e-6)
    assert face.heads == attn.heads and face.norm_q is attn.norm_q
    with pytest.raises(AttributeError, match="to_z"):
        face.to_z(x)


@pytest.mark.parametrize("name", ["wan"])
def test_blocks_with_grouped_attention_compile_without_a_break(name: str) -> None:
    family = FAMILIES[name]
    few = family.build()
    bittern.quantize(few, "int4")
    want = run(few, family)
    torch._dynamo.reset()
    few.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.allclose(run(few, family), want, rtol=1e-4, atol=1e-5)


def test_layers_that_a_family_keeps_in_float32_stay_so(tmp_path: Path) -> None:
    few = FAMILIES["wan"].build()
    few.save_pretrained(tmp_path / "whole")
    load = diffusers.WanTransformer3DModel.from_pretrained
    few = load(tmp_path / "whole", dtype=torch.bfloat16)
    assert few.scale_shift_table.dtype == torch.float32
    bittern.quantize(few, "int4")
    few.save_pretrained(tmp_path / "few")
    again = load(tmp_path / "few", dtype=torch.bfloat16)
    for (key, one), other in zip(few.state_dict().items(), again.state_dict().values(), strict=True):
        assert one.dtype == other.dtype, key
        assert isinstance(one, FewBitWeight) or torch.equal(one, other), key


def test_unet_layers_are_of_the_kinds_that_the_recipe_says() -> None:
    few = FAMILIES["sd15"].build()
    bittern.quantize(few, recipes.load("svdquant-fast").override(default={"rank": 8, "rounds": 0}))
    layers = quant_layers(few)
    resnet = "down_blocks.1.resnets.0."
    kinds = {name: layers[resnet + name] for name in ("conv1", "conv_shortcut", "time_emb_proj")}
    assert {name: (type(layer), layer.scheme.activations, layer.scheme.rank) for name, layer in kinds.items()} == {
        "conv1": (QuantConv2d, 16, 0),
        "conv_shortcut": (QuantConv2d, 16, 0),
        "time_emb_proj": (QuantLinear, 16, 0),
    }
    # A 1 x 1 convolution after a norm is a linear like any other.
    proj_in = layers["mid_block.attentions.0.proj_in"]
    assert isinstance(proj_in, QuantConv2d) and (proj_in.scheme.activations, proj_in.scheme.rank) == (4, 8)


PUBLISHED = {
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
}
"""Parameters of models as their authors released them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_at_full_size_nearly_all_weights_are_few_bit(name: str) -> None:
    family = FAMILIES[name]
    with init_empty_weights():
        model = getattr(diffusers, family.class_name)(**family.full)
    report = quantization.predict(model, "int4")
    assert report.parameters == PUBLISHED[name]
    weights = sum(row.shape[0] * row.shape[1] for row in report.rows)
    assert weights > 0.985 * report.parameters
    # 4 bits, and 16 for each group of 64; every full-size K is a multiple of 64.
    assert report.bits_per_weight == pytest.approx(4.25, abs=1e-6)
    kept = report.parameters - weights
    assert report.bytes == weights * 4.25 / 8 + kept * 4
