"""The caches of diffusers over few-bit models: the numbers that they give over plain few-bit layers, and the skips."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, hooks
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bittern
from bittern import tiny_flux
from bittern.architectures import flux_forward, grouped_attention
from bittern.layers import is_unhooked
from families import FAMILIES, Family, run

TIMES = (900, 600, 500, 400)
BLOCKS = ("blocks", "layers")
BATCHED = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")


class Steps:
    """Runs a model as a pipeline does, by and by nearer to the picture.

    Attributes:
        time: Of the step that runs.
        few_bit: How many few-bit operations every step took.
    """

    def __init__(self) -> None:
        self.time = TIMES[0]
        self.few_bit: list[int] = []

    @torch.no_grad()
    def run(self, model: Any, family: Family) -> list[Tensor]:
        return [self._step(model, family, index) for index in range(len(TIMES))]

    def _step(self, model: Any, family: Family, index: int) -> Tensor:
        self.time, given = TIMES[index], family.call()
        name = next(iter(given))
        scaled = [(1 + 0.1 * index) * x for x in given[name]]
        given[name] = scaled if isinstance(given[name], list) else torch.stack(scaled)
        call = functools.partial(model, **given, return_dict=False)
        with Count() as count:
            if hasattr(model, "cache_context"):
                with model.cache_context("cond", step_index=index, num_inference_steps=4, sigma=self.time / 1000):
                    (out, *_) = call()
            else:
                (out, *_) = call()
        self.few_bit.append(count.few_bit)
        return torch.cat([part.flatten() for part in out])


class Count(TorchDispatchMode):
    """Counts few-bit operations."""

    few_bit = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.few_bit += func._schema.name == "bittern::few_bit_linear"
        return func(*args, **(kwargs or {}))


def first_block(steps: Steps, model: Any) -> None:
    model.enable_cache(hooks.FirstBlockCacheConfig(threshold=1e9))


def mag(steps: Steps, model: Any) -> None:
    config = {"num_inference_steps": 4, "threshold": 1e9, "retention_ratio": 0.25}
    model.enable_cache(hooks.MagCacheConfig(mag_ratios=FLUX_MAG_RATIOS, **config))


def sea(steps: Steps, model: Any) -> None:
    vision = torch.ones(4, 1, 8, 8)
    model.enable_cache(hooks.SeaCacheConfig(threshold=1e9, raw_vision_callback=lambda *_: [vision]))


def pyramid(steps: Steps, model: Any) -> None:
    config: dict[str, Any] = {}
    for kind in ("spatial", "cross"):
        config |= {f"{kind}_attention_block_skip_range": 2, f"{kind}_attention_block_identifiers": BLOCKS}
    config["current_timestep_callback"] = lambda: steps.time
    model.enable_cache(hooks.PyramidAttentionBroadcastConfig(**config))


def faster(steps: Steps, model: Any, **more: Any) -> None:
    config = {"spatial_attention_block_skip_range": 3, "attention_weight_callback": lambda _: 0.5, **more}
    config["spatial_attention_block_identifiers"] = BLOCKS
    config["_unconditional_conditional_input_kwargs_identifiers"] = BATCHED
    model.enable_cache(hooks.FasterCacheConfig(current_timestep_callback=lambda: steps.time, **config))


def taylor(steps: Steps, model: Any, **more: Any) -> None:
    config = {"cache_interval": 2, "disable_cache_before_step": 1, "taylor_factors_dtype": torch.float32}
    model.enable_cache(hooks.TaylorSeerCacheConfig(**config, **more))


def skip(steps: Steps, model: Any, **more: Any) -> None:
    apply_layer_skip(model, hooks.LayerSkipConfig(indices=[1], **more))


CACHES: dict[str, Callable[[Steps, Any], None]] = {
    "first-block": first_block,
    "mag": mag,
    "sea": sea,
    "pyramid": pyramid,
    "faster": functools.partial(faster, is_guidance_distilled=True),
    "faster-two-prompts": faster,
    "taylor-attention": functools.partial(taylor, cache_identifiers=[r".*attn\d?"]),
    "taylor-layers": functools.partial(taylor, cache_identifiers=[r".*to_k", r".*act_mlp", r".*blocks.*proj_out"]),
    "taylor-lite": functools.partial(taylor, use_lite_mode=True),
    "text-kv": lambda _, model: model.enable_cache(hooks.TextKVCacheConfig()),
    "skipped-blocks": skip,
    "skipped-attention": functools.partial(skip, skip_ff=False),
    "skipped-scores": functools.partial(skip, skip_attention=False, skip_attention_scores=True, skip_ff=False),
}

CACHED = {"flux", "flux2", "qwen_image", "wan", "ltx"}
WORK = dict.fromkeys(CACHES, CACHED)
WORK |= {
    # Some of diffusers' own blocks fail in some of its caches.
    "first-block": CACHED - {"flux2"},
    "faster-two-prompts": {"wan"},
    "skipped-blocks": CACHED | {"pixart"},
    "skipped-attention": {"pixart", "z_image"},
    "skipped-scores": {"pixart", "z_image", "qwen_image"},
}
"""The families on which a cache works in 16 bits."""

IDLE = {("flux2", "sea")}
"""Where diffusers has all computed, in 16 bits as well."""


def apart(model: nn.Module) -> nn.Module:
    """A copy that runs diffusers' own code, layer by layer."""
    model = copy.deepcopy(model)
    theirs = {ours: base for base, ours in grouped_attention.GROUPED.items()}
    theirs[flux_forward.GroupedAttention] = flux_forward.FluxAttnProcessor
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if type(processor) in theirs:
            processor.__class__ = theirs[type(processor)]
        if type(module) in (flux_forward.FluxSingleTransformerBlock, flux_forward.GELU):
            module.__class__ = type(module).__base__
    return model


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def full(name: str) -> nn.Module:
    return FAMILIES[name].build()


@pytest.fixture(scope="module")
def few(full: nn.Module) -> nn.Module:
    few = copy.deepcopy(full)
    bittern.quantize(few, "int4")
    return few


def cached(model: nn.Module, family: Family, cache: str) -> tuple[list[Tensor], list[int]]:
    """What a model computes under a cache, and in how many few-bit operations a step."""
    steps = Steps()
    CACHES[cache](steps, model)
    return steps.run(model, family), steps.few_bit


@pytest.mark.covering
@pytest.mark.parametrize("cache", CACHES)
def test_what_works_in_16_bits_works_in_few(name: str, full: nn.Module, few: nn.Module, cache: str) -> None:
    family = FAMILIES[name]
    try:
        cached(copy.deepcopy(full), family, cache)
    except Exception:
        # Whatever diffusers fails with.
        assert name not in WORK[cache]
        with pytest.raises(Exception):  # noqa: B017
            cached(copy.deepcopy(few), family, cache)
        return
    model, other = copy.deepcopy(few), apart(few)
    found, operations = cached(model, family, cache)
    expected, singly = cached(other, family, cache)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    plain = Steps()
    uncached = plain.run(copy.deepcopy(few), family)
    acts = cache != "text-kv" and (name, cache) not in IDLE
    assert any(not torch.equal(a, b) for a, b in zip(found, uncached, strict=True)) == acts
    alone = Steps()
    alone.run(apart(few), family)
    assert any(a < b for a, b in zip(singly, alone.few_bit, strict=True)) == (acts and cache != "skipped-scores")
    # At the same steps; and groups save operations beside those that the cache saves.
    assert [count < max(operations) for count in operations] == [count < max(singly) for count in singly]
    assert all(a <= b for a, b in zip(operations, singly, strict=True))
    if cache != "taylor-layers":
        assert sum(operations) < sum(singly)
    if cache.startswith("skipped"):
        return
    model.disable_cache()
    again = Steps()
    assert all(torch.equal(a, b) for a, b in zip(again.run(model, family), uncached, strict=True))
    assert again.few_bit == plain.few_bit
    assert all(map(is_unhooked, model.modules()))


@pytest.fixture
def flux() -> Any:
    return FAMILIES["flux"].build()


def operations(model: Any) -> list[int]:
    steps = Steps()
    steps.run(model, FAMILIES["flux"])
    return steps.few_bit


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_all_blocks_but_the_first_are_skipped(flux: Any, way: Callable[[Any], Any]) -> None:
    bittern.quantize(flux, "svdquant-fast")
    model = way(flux)
    first_block(Steps(), model)
    # Two double blocks of 10 operations, two single ones of 3.
    assert operations(model) == [26, 10, 10, 10]
    model.disable_cache()
    assert operations(way(model)) == operations(model) == [26] * 4


def test_tiny_flux_draws_under_a_cache() -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_flux.path())
    pipe.set_progress_bar_config(disable=True)
    bittern.quantize(pipe, "int4")

    def drawn(model: nn.Module) -> tuple[Tensor, int]:
        pipe.transformer = model
        given = {
            "height": 32,
            "width": 32,
            "num_inference_steps": 4,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "pt",
        }
        with Count() as count:
            return pipe("a red circle", **given).images, count.few_bit

    ours, theirs = pipe.transformer, apart(pipe.transformer)
    plain, all_of_it = drawn(ours)
    for model in (ours, theirs):
        model.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.3))
    (fast, some), (expected, _) = drawn(ours), drawn(theirs)
    assert some < all_of_it and not torch.equal(fast, plain)
    assert (fast - expected).norm() <= 1e-4 * expected.norm()
    ours.disable_cache()
    found, count = drawn(ours)
    assert torch.equal(found, plain) and count == all_of_it


def test_caches_of_the_full_model_leave_nothing_in_the_few_bit_one(flux: Any) -> None:
    for cache in (first_block, pyramid):
        cache(Steps(), flux)
        flux.disable_cache()
    block = flux.single_transformer_blocks[0]
    assert "forward" in vars(block)
    bittern.quantize(flux, "int4")
    assert operations(flux) == [26] * 4
    assert all(map(is_unhooked, flux.modules()))


def test_a_hooked_activation_is_called(flux: Any) -> None:
    bittern.quantize(flux, "int4")
    act, seen = flux.single_transformer_blocks[0].act_mlp, []
    plain = act.forward
    act.forward = lambda x: (seen.append(x.shape), plain(x))[1]
    assert operations(flux) == [27] * 4 and len(seen) == 4
    act.forward = plain
    assert operations(flux) == [26] * 4 and len(seen) == 4


def test_compiles_without_a_break_after_a_cache(flux: Any) -> None:
    bittern.quantize(flux, "int4")
    expected = run(flux, FAMILIES["flux"])
    pyramid(Steps(), flux)
    flux.disable_cache()
    torch._dynamo.reset()
    flux.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(flux, FAMILIES["flux"]), expected, rtol=1e-4, atol=1e-5)
