"""Models that no family lists: blocks found by looking, shared inputs by one pass without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

import bittern
from bittern import recipes
from bittern.architectures import generic, of, plan
from bittern.architectures.recording import record
from bittern.errors import UserError
from bittern.layers import QuantLinear, quant_layers
from families import FAMILIES


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "pixart", "sana", "sd15", "wan", "ltx"])
def test_it_finds_of_a_known_family_what_is_declared(name: str) -> None:
    family = FAMILIES[name]
    with init_empty_weights():
        model = getattr(diffusers, family.class_name)(**family.tiny)
    found, declared = generic.discover(model), of(model)
    assert found.name == f"generic ({family.class_name})"
    for path, module in model.named_modules():
        site = declared.site(path)
        if not isinstance(module, nn.Linear) or site is None or "samplers" in path:
            continue
        # Wan's image branch did not run: the pass had no image.
        expected = set(site.group) if "attn2.add_" not in path else {path}
        if site.is_modulation:
            assert found.site(path).is_modulation, path
        else:
            assert set(found.site(path).group) == expected, path
            assert not found.site(path).is_modulation, path
    outside = [path for path in declared.outside if "*" not in path]
    assert outside and not any(found.site(path) for path in outside)


def test_without_a_pass_no_groups_are_declared_and_it_says_why() -> None:
    family = FAMILIES["qwen_image"]
    with init_empty_weights():
        model = getattr(diffusers, family.class_name)(**family.tiny)
    found = generic.discover(model)
    (block,) = found.blocks
    assert block.groups == () and block.modulation == ("img_mod.1", "txt_mod.1")
    assert "2 x transformer_blocks.*" in found.notes[0]
    assert "no shared inputs are declared, since a pass on inputs made up from its config failed" in found.notes[0]


def test_the_pass_leaves_no_trace() -> None:
    model = FAMILIES["pixart"].build()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    reading = record(model)
    assert not isinstance(reading, str) and len(reading.inputs) > 20
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


AURA = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 64,
    "pos_embed_max_size": 64,
}


def test_an_unlisted_model_is_quantized_saved_and_reloaded(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AuraFlowTransformer2DModel(**AURA).eval()
    g = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=g),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=g),
        "timestep": torch.tensor([0.3, 0.7]),
    }
    with torch.no_grad():
        want = model(**call).sample
        report = bittern.quantize(model, "int4")
        got = model(**call).sample
    # q, k, v, added q, k, v, two outputs and two mlps of three layers; two modulations; then one of each.
    assert len(report.rows) == 2 * (8 + 6 + 2) + 2 * (4 + 3 + 1)
    # Most of the output comes from the residual stream, past the blocks.
    assert 0.0005 < float((got - want).norm() / want.norm()) < 0.01
    layers = quant_layers(model)
    first = layers["joint_transformer_blocks.0.attn.to_q"]
    assert isinstance(first, QuantLinear) and len(first.group.members) == 3
    model.save_pretrained(tmp_path)
    again = diffusers.AuraFlowTransformer2DModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**call).sample, got)
    assert bittern.inspect(tmp_path).to_dict() == report.to_dict()


def test_an_unlisted_model_with_a_known_processor_runs_its_groups_as_one(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
            norm_num_groups=8,
        ).eval()
    call = {"sample": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "timestep": 10}
    bittern.quantize(model, "int4")
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert {type(processor).__name__ for processor in processors} == {"GroupedAttnProcessor2_0"}
    attention = model.mid_block.attentions[0]
    assert [attention.to_q.rows, attention.to_k.rows, attention.to_v.rows] == [(0, 32), (32, 64), (64, 96)]
    model.save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        got = model(**call).sample
        assert torch.equal(again(**call).sample, got)
        for processor in processors:
            processor.__class__ = type(processor).__base__
        assert torch.allclose(model(**call).sample, got, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(k, k)
        self.attention = nn.MultiheadAttention(k, 2)
        self.depthwise = nn.Conv2d(k, k, 3, groups=k)
        self.video = nn.Conv3d(k, k, 1)


class Lists(nn.Module):
    """Two blocks in a list, one more in a list of its own, and layers outside."""

    def __init__(self, outside: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(16, outside)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.middle = nn.ModuleList([Block(16)])
        self.text_embedders = nn.ModuleList([Block(16), Block(16)])
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(16, 4))


def test_single_elements_of_a_repeated_class_are_blocks_and_embedders_are_not() -> None:
    made = plan(Lists(), recipes.load("int4"))
    assert [job.paths for job in made.jobs] == [(f"{place}.mlp",) for place in ("blocks.0", "blocks.1", "middle.0")]
    assert made.kept["first"] == made.kept["text_embedders.0.mlp"] == "outside the blocks of generic (Lists)"
    assert made.kept["blocks.1.attention.out_proj"] == "nn.MultiheadAttention reads its weight past the layer"
    assert made.kept["blocks.0.depthwise"] == "a grouped convolution has few weights and no few-bit form"
    assert made.kept["middle.0.video"] == "a Conv3d has no few-bit form"
    assert "since it has no config" in made.architecture.notes[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 4), "the blocks of model class 'Linear' cannot be found: none repeats; expected"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "class 'Sequential' cannot be found: none repeats"),
        (Lists(outside=4096), "class 'Lists' cannot be found: those that repeat hold 3% of its weights"),
    ],
)
def test_a_model_without_blocks_is_refused_in_one_line(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan(model, recipes.load("int4"))
    assert "\n" not in str(caught.value)


def test_a_recorded_group_holds_in_every_copy_or_not_at_all() -> None:
    class Odd(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            self.a, self.b, self.own = nn.Linear(8, 8), nn.Linear(8, 8), own

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.clone() if self.own else x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Odd(False), Odd(True)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))

    from bittern.architectures.recording import read_inputs

    model = Model()
    reading = read_inputs(model, lambda: model(torch.ones(3, 8)), images=2)
    same: dict[Any, list[str]] = {}
    for path, where in reading.inputs.items():
        same.setdefault(where, []).append(path)
    assert sorted(same.values()) == [["blocks.0.a", "blocks.0.b"], ["blocks.1.a"], ["blocks.1.b"]]
    block = generic._block("blocks.*", ["blocks.0", "blocks.1"], model, reading)
    assert block.groups == () and block.modulation == ()
    assert generic._block("blocks.*", ["blocks.0"], model, reading).groups == (("a", "b"),)
