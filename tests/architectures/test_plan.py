"""The plan of a FLUX model: every linear placed, groups and segments as the architecture says."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from bittern import recipes
from bittern.architectures import Plan, plan
from bittern.architectures.plan import fitting_group
from bittern.errors import UserError
from families import FAMILIES


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    """Two double and three single blocks, shapes only."""
    with init_empty_weights():
        return FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6),
        )


def targets(made: Plan) -> list[str]:
    return [path for job in made.jobs for path in job.paths]


def test_every_linear_is_planned_or_kept_once(flux: FluxTransformer2DModel) -> None:
    made = plan(flux, recipes.load("svdquant-fast"))
    linears = [path for path, module in flux.named_modules() if isinstance(module, nn.Linear)]
    assert sorted([*targets(made), *made.kept]) == sorted(linears)
    assert {path.split(".")[0] for path in made.kept} == {
        *("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
    }
    assert len(targets(made)) == 2 * 14 + 3 * 6


def test_groups_and_segments(flux: FluxTransformer2DModel) -> None:
    made = plan(flux, recipes.load("svdquant-fast"))
    groups = [job.paths for job in made.jobs if len(job.paths) > 1]
    single = "single_transformer_blocks.2."
    assert tuple(single + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")) in groups
    double = "transformer_blocks.1.attn."
    assert tuple(double + name for name in ("to_q", "to_k", "to_v")) in groups
    assert tuple(double + name for name in ("add_q_proj", "add_k_proj", "add_v_proj")) in groups
    assert len(groups) == 2 * 2 + 3
    segments = {job.paths[0]: job.segments for job in made.jobs if len(job.segments) > 1}
    assert segments == {f"single_transformer_blocks.{i}.proj_out": (64, 256) for i in range(3)}


def test_modulation_is_another_scheme(flux: FluxTransformer2DModel) -> None:
    made = plan(flux, recipes.load("svdquant-fast"))
    modulation = [job for job in made.jobs if "norm" in job.paths[0]]
    assert len(modulation) == 2 * 2 + 3
    assert all(job.scheme.rank == 0 and job.scheme.activations == 16 for job in modulation)
    assert all(job.scheme.rank == 32 for job in made.jobs if job not in modulation)


def test_a_group_forms_only_of_equal_schemes(flux: FluxTransformer2DModel) -> None:
    recipe = recipes.load("svdquant-fast").override(
        overrides={"transformer_blocks.0.attn.to_k": {"rank": 8}}, keep=["transformer_blocks.1.attn.to_q"]
    )
    groups = [job.paths for job in plan(flux, recipe).jobs]
    first, second = "transformer_blocks.0.attn.", "transformer_blocks.1.attn."
    assert (first + "to_q", first + "to_v") in groups
    assert (first + "to_k",) in groups
    assert (second + "to_k", second + "to_v") in groups
    assert plan(flux, recipe).kept[second + "to_q"] == "kept by the recipe"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": ["*.to_z"]}, r"keep '\*\.to_z' matches no layer"),
        ({"overrides": {"x_embedder": {"rank": 8}}}, "overrides 'x_embedder' matches no layer"),
        ({"keep": ["*"]}, "keeps every layer"),
        ({"default": {"rank": 65}}, r"transformer_blocks\.0\.\S+: rank 65 for a \d+ x \d+ layer"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    flux: FluxTransformer2DModel, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(flux, recipes.load("svdquant-fast").override(**changes))


def test_adapters_and_foreign_linears_are_refused(flux: FluxTransformer2DModel) -> None:
    class Foreign(nn.Linear):
        """Some other library's linear."""

    block = flux.single_transformer_blocks[0]
    original = block.proj_out
    try:
        block.proj_out = Foreign(320, 64, device="meta")
        with pytest.raises(UserError, match=r"blocks\.0\.proj_out is a Foreign: expected a plain linear"):
            plan(flux, recipes.load("int4"))
        wrapper = nn.Module()
        wrapper.base_layer = nn.Linear(320, 64, device=torch.device("meta"))
        block.proj_out = wrapper
        with pytest.raises(UserError, match=r"blocks\.0\.proj_out wears a LoRA adapter"):
            plan(flux, recipes.load("int4"))
    finally:
        block.proj_out = original


def test_shifts_reach_what_comes_out_of_a_gelu_and_nothing_else(flux: FluxTransformer2DModel) -> None:
    made = plan(flux, recipes.load("svdquant-fast").override(default={"shift": 0.25}))
    shifts = {path: job.scheme.shift for job in made.jobs for path in job.paths if job.scheme.shift}
    double = {f"transformer_blocks.{i}.{name}.net.2": (0.25,) for i in range(2) for name in ("ff", "ff_context")}
    single = {f"single_transformer_blocks.{i}.proj_out": (0.0, 0.25) for i in range(3)}
    assert shifts == double | single
    none = plan(flux, recipes.load("svdquant-fast").override(default={"shift": 0.0}))
    assert not any(job.scheme.shift for job in none.jobs)


def test_the_shift_of_the_recipe_covers_gelu() -> None:
    least = nn.functional.gelu(torch.linspace(-8, 0, 100_001, dtype=torch.float64), approximate="tanh").min()
    assert 0 <= least + recipes.load("svdquant-fast").default.shift < 0.003


@pytest.mark.parametrize(
    ("channels", "group", "expected"),
    # Bits of a tap at 4 a code and 16 a scale: 80 channels need 5 x 80 in groups of 16, 2 x 144 in groups of 32,
    # and so on; of equal costs the larger group counts.
    [(320, 64, 64), (64, 64, 64), (5, 64, 8), (1, 64, 4), (48, 64, 48), (65, 64, 16), (80, 64, 16), (96, 64, 32)],
)
def test_a_group_fits_the_channels_of_a_tap(channels: int, group: int, expected: int) -> None:
    def bits(size: int) -> int:
        return -(-channels // size) * (4 * size + 16)

    got = fitting_group(channels, group)
    assert got == expected
    assert bits(got) <= bits(group)
    assert fitting_group(channels, None) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"overrides": {"*.conv1": {"activations": 8}}},
            r"resnets\.0\.conv1: a 3 x 3 convolution with 8-bit activations: expected 16, as `convolution` says",
        ),
        ({"convolution": {"smoothing": "span"}}, r"conv1: a 3 x 3 convolution with smoothing 'span': expected none"),
        ({"convolution": {"rank": 999}}, r"rank 999 for a \d+ x \d+ layer: expected at most"),
        ({"convolution": {"groupsize": 32}}, r"convolution: unknown key 'groupsize': did you mean 'group_size'"),
        ({"convolution": {"activations": 5}}, r"activations 5: expected"),
        ({"convolution": 3}, r"convolution 3"),
    ],
)
def test_what_a_convolution_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    family = FAMILIES["sd15"]
    with init_empty_weights():
        unet = UNet2DConditionModel(**family.tiny)
    with pytest.raises(UserError, match=message):
        plan(unet, recipes.load("int4").override(**changes))
