from __future__ import annotations

import functools
import itertools
import json
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bittern import trajectories
from bittern.errors import UserError
from bittern.trajectories.sampler import STEPS_PER_PROMPT

if TYPE_CHECKING:
    from diffusers import FluxPipeline


@pytest.mark.parametrize(
    ("prompts", "steps", "samples"), [(256, 24, 128), (256, 28, 256), (3, 4, 9), (1, 24, 500), (40, 1, 7), (5, 24, 1)]
)
def test_chosen_pairs_are_as_many_as_asked_for_and_spread(prompts: int, steps: int, samples: int) -> None:
    chosen = trajectories.choose(prompts, steps, samples, seed=3)
    pairs = [(prompt, step) for prompt, kept in chosen.items() for step in kept]
    assert len(set(pairs)) == len(pairs) == min(samples, prompts * steps)
    assert all(0 <= prompt < prompts and 0 <= step < steps for prompt, step in pairs)
    assert all(list(kept) == sorted(kept) for kept in chosen.values())
    for kept in chosen.values():
        # One of each stretch: none lies two stretches away from its neighbour.
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert max(gaps, default=0) <= 2 * -(-steps // len(kept))
    assert chosen == trajectories.choose(prompts, steps, samples, seed=3)


def test_early_and_late_steps_are_met_equally_often() -> None:
    chosen = trajectories.choose(600, 24, 4800, seed=0)
    counts = torch.bincount(torch.tensor([step for kept in chosen.values() for step in kept]), minlength=24)
    assert all(len(kept) == STEPS_PER_PROMPT for kept in chosen.values())
    assert (counts - 200).abs().max() < 5 * 200**0.5


@pytest.fixture
def calls(tiny_random_pipeline: FluxPipeline) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    tiny_random_pipeline.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append((kwargs["timestep"].clone(), kwargs["hidden_states"].clone())),
        with_kwargs=True,
    )
    return seen


def test_states_are_those_of_the_undisturbed_run(
    tiny_random_pipeline: FluxPipeline, calls: list[tuple[Any, ...]]
) -> None:
    pipe, prompts = tiny_random_pipeline, ["a red circle", "two stars", "a cat"]
    states = trajectories.sample(pipe, pipe.transformer, prompts, 11, seed=5)
    ran = len(calls)
    steps = trajectories.defaults(pipe).steps
    chosen = trajectories.choose(len(prompts), steps, 11, seed=5)
    assert [(state.prompt, state.step) for state in states] == [(p, s) for p, kept in chosen.items() for s in kept]
    # A trajectory ends with the last step that anybody wants.
    assert ran == sum(kept[-1] + 1 for kept in chosen.values()) < steps * len(chosen)
    for state in states:
        calls.clear()
        generator = torch.Generator("cpu").manual_seed((5 << 20) + state.prompt)
        pipe(prompts[state.prompt], generator=generator, output_type="latent", **trajectories.defaults(pipe).options())
        timestep, latents = calls[state.step]
        assert torch.equal(state.kwargs["timestep"], timestep)
        assert torch.equal(state.kwargs["hidden_states"], latents)
        assert state.nbytes >= latents.nbytes


def test_both_branches_of_guidance_are_seen(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> None:
    pipe = new_tiny_random_pipeline()
    call = trajectories.defaults(pipe)
    original = type(pipe).__call__

    class Guided(type(pipe)):  # type: ignore[misc]
        @functools.wraps(original)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, negative_prompt="blue", true_cfg_scale=2.0, **kwargs)

    pipe.__class__ = Guided
    pipe.set_progress_bar_config(disable=True)
    states = trajectories.sample(pipe, pipe.transformer, ["a red circle"], 2)
    assert call.steps > 2
    assert [state.step for state in states] == sorted([*{state.step for state in states}] * 2)
    first, second = states[:2]
    assert torch.equal(first.kwargs["hidden_states"], second.kwargs["hidden_states"])
    assert not torch.equal(first.kwargs["encoder_hidden_states"], second.kwargs["encoder_hidden_states"])


def test_a_model_that_overflows_is_named_with_prompt_and_step(tiny_random_pipeline: FluxPipeline) -> None:
    tiny_random_pipeline.transformer.proj_out.bias.data.fill_(torch.inf)
    with pytest.raises(UserError, match="NaN or infinity at step 1 of 'a red circle', first in proj_out:"):
        trajectories.sample(tiny_random_pipeline, tiny_random_pipeline.transformer, ["a red circle"], 2)


def test_states_are_packed_and_unpacked_and_shared_tensors_stay_shared(tiny_random_pipeline: FluxPipeline) -> None:
    pipe = tiny_random_pipeline
    states = trajectories.sample(pipe, pipe.transformer, ["a red circle"], 3)
    tensors, tree = trajectories.pack(states)
    again = trajectories.unpack(tensors, json.loads(json.dumps(tree)))
    for state, copy in zip(states, again, strict=True):
        assert (state.prompt, state.step, state.args) == (copy.prompt, copy.step, copy.args)
        assert state.kwargs.keys() == copy.kwargs.keys()
        for name, value in state.kwargs.items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(value, copy.kwargs[name])
    assert again[0].kwargs["encoder_hidden_states"] is again[1].kwargs["encoder_hidden_states"]
    assert again[0].kwargs["hidden_states"] is not again[1].kwargs["hidden_states"]
    assert trajectories.states_bytes(states) < sum(state.nbytes for state in states)
    nested = trajectories.State(0, 0, ([1.5, (None, "x")], torch.ones(2)), {"more": {"a": [torch.zeros(1)]}})
    tensors, tree = trajectories.pack([nested])
    (copy,) = trajectories.unpack(tensors, json.loads(json.dumps(tree)))
    assert copy.args[0] == [1.5, (None, "x")] and torch.equal(copy.kwargs["more"]["a"][0], torch.zeros(1))
    with pytest.raises(TypeError, match="a set cannot be kept"):
        trajectories.pack([trajectories.State(0, 0, ({1},), {})])
