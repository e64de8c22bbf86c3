"""What a training takes is told to the byte from shapes, and FLUX.1-dev's fits where it is said to fit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bittern import recipes
from bittern.architectures import plan
from bittern.distillation.bank import Bank, Pattern, draw_bank, pattern_of
from bittern.distillation.block_bank import shapes_of
from bittern.distillation.foresight import foreseen
from bittern.distillation.memory import held_bytes, learning_bytes
from bittern.distillation.student import learner, solve
from bittern.distillation.trainer import Trainer
from bittern.layers import swap
from bittern.quantization.jobs import checkpoint_config, empty_layers
from bittern.quantization.stored import blocks_of
from bittern.recipes import Recipe
from bittern.trajectories import State, pack

CPU = torch.device("cpu")
GIB = 2**30
IMAGE, TEXT, STEPS = 4096, 512, 28


def recipe_of(rank: int = 0, **settings: object) -> Recipe:
    return recipes.load("ternary-distilled").override(default={"rank": rank}, distillation=settings)


@pytest.mark.parametrize("mode", ["end-to-end", "scales"])
def test_what_is_foreseen_is_what_is_allocated(new_tiny_random_pipeline: Callable, mode: str) -> None:
    pipe, recipe = new_tiny_random_pipeline(), recipe_of(4, mode=mode, batch=4, checkpointing=mode == "scales")
    teacher, settings = pipe.transformer, recipe.distillation
    assert settings is not None
    bank = draw_bank(pipe, teacher, ["a", "b"], pattern=pattern_of(pipe, teacher, ["a", "b"]))
    deployed = solve(pipe, teacher, recipe)
    told = foreseen(teacher, deployed, bank, settings, torch.float32)
    trainer = Trainer(learner(teacher, deployed, settings), bank, settings, seed=0, dtype=torch.float32)
    trainer.advance(1.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.advance(1.0)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    assert (told.learning, told.models) == (learning_bytes(trainer), held_bytes(trainer))
    assert told.bank == sum(tensor.nbytes for tensor in bank.everything())
    # Beside what a step takes there are the rows of some batches; blocks that run again keep a generator's state.
    assert most - 2**12 <= told.activations < most + 2**17
    assert most > told.learning / 4


def flux(double: int, single: int) -> nn.Module:
    """FLUX.1-dev of so many blocks, on meta."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True, num_layers=double, num_single_layers=single)
    return nn.Module.to(model, torch.bfloat16).requires_grad_(False)


def few_bit(model: nn.Module, recipe: Recipe) -> nn.Module:
    """What a recipe makes of it, on meta."""
    model = copy.deepcopy(model)
    config = checkpoint_config(plan(model, recipe), recipe, seed=0)
    for path, layer in empty_layers(model, config, config.targets).items():
        swap(model, path, layer)
    return model


def call(images: int) -> State:
    """What it is called with for pictures of 1024 x 1024, on meta."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    given = {
        "hidden_states": empty(images, IMAGE, 64), "encoder_hidden_states": empty(images, TEXT, 4096),
        "pooled_projections": empty(images, 768), "timestep": empty(images),
        "guidance": empty(images, dtype=torch.float32), "img_ids": empty(IMAGE, 3), "txt_ids": empty(TEXT, 3),
    }  # fmt: skip
    return State(0, 0, (), given)


@pytest.mark.slow
def test_a_block_of_flux_learns_within_24_gib() -> None:
    recipe = recipe_of(mode="blocks", batch=8)
    teacher, settings = flux(1, 1), recipe.distillation
    assert settings is not None
    deployed = few_bit(teacher, recipe)
    shapes = shapes_of(teacher, blocks_of(teacher, plan(teacher, recipe)), [call(1), call(2)])
    assert list(shapes) == ["transformer_blocks.0", "single_transformer_blocks.0"]
    path = "transformer_blocks.0"
    block = teacher.get_submodule(path)
    # Image and text go in and come out, and the conditioning.
    assert shapes[path].nbytes == 2 * (2 * (IMAGE + TEXT) + 1) * 3072
    states = shapes[path].bank(settings.batch, STEPS, CPU)
    told = foreseen(block, deployed.get_submodule(path), states, settings, torch.bfloat16)
    weights = sum(parameter.numel() for parameter in block.parameters())
    assert (weights, told.learning) == (339831296, 20 * (weights + gains(deployed.get_submodule(path))))
    outside = outside_bytes(teacher)
    assert 10 * GIB < told.total + outside < 24 * GIB


def gains(deployed: nn.Module) -> int:
    """How many scales there are."""
    return sum(buffer.numel() for name, buffer in deployed.named_buffers() if name.endswith("scales"))


def outside_bytes(teacher: nn.Module) -> int:
    """Of what lies outside the blocks and stays on the device."""
    blocks = sum(p.nbytes for name, p in teacher.named_parameters() if "transformer_blocks." in name)
    return sum(p.nbytes for p in teacher.parameters()) - blocks


@pytest.mark.slow
def test_scales_of_flux_learn_within_80_gib() -> None:
    recipe = recipe_of(32, mode="scales", batch=8, checkpointing=True)
    settings = recipe.distillation
    assert settings is not None
    tensors, tree = pack([call(1)])
    fixed = {name: torch.zeros_like(t, device=CPU) for name, t in tensors.items() if len(t) != 1}
    pattern = Pattern(tree, fixed, (), tuple(name for name in tensors if name not in fixed), 1, STEPS, 0, 0)

    class OnHost(Bank):
        device = CPU

    teacher = flux(19, 38)
    states = {name: tensors[name].expand(settings.batch, *tensors[name].shape[1:]) for name in pattern.states}
    targets = torch.empty(settings.batch, IMAGE, 64, dtype=torch.bfloat16, device="meta")
    deployed = few_bit(teacher, recipe)
    told = foreseen(teacher, deployed, OnHost(pattern, {}, states, targets), settings, torch.bfloat16)
    # Teacher and deployed model are there, too, and 8 GiB of the teacher's trajectories.
    others = sum(p.nbytes for p in teacher.parameters()) + sum(t.nbytes for t in deployed.buffers())
    assert 30 * GIB < told.total + others + 8 * GIB < 78 * GIB
    assert told.learning < 4 * GIB
