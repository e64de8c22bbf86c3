"""LoRAs as a user has them: through diffusers and peft on a few-bit pipeline, fused into it, and back."""

from __future__ import annotations

import copy
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import bittern
from bittern import recipes
from bittern.errors import UserError
from bittern.integrations import loras
from bittern.layers import QuantLinear, quant_layers
from bittern.quantization import component
from bittern.recipes import Recipe

NewPipeline = Callable[[], FluxPipeline]
# As svdquant, without what takes prompts; W4A16, and others as they are.
SVDQUANT = recipes.load("svdquant-fast").override(name="svdquant-smooth", default={"rank": 16, "smoothing": "span"})
RECIPES: dict[str, str | Recipe] = {
    "svdquant": SVDQUANT,
    "svdquant-fast": "svdquant-fast",
    "ternary": "ternary-fast",
    "int4": "int4",
}
A, B = "a", "b"


@pytest.fixture(scope="module")
def quantized(new_tiny_random_pipeline: NewPipeline) -> Callable[[str], FluxPipeline]:
    """Few-bit pipelines by scheme, each solved once."""
    made: dict[str, FluxPipeline] = {}

    def get(name: str) -> FluxPipeline:
        if name not in made:
            made[name] = new_tiny_random_pipeline()
            bittern.quantize(made[name], RECIPES[name])
        return copy.deepcopy(made[name])

    return get


@pytest.fixture
def pipe(quantized: Callable[[str], FluxPipeline]) -> FluxPipeline:
    return quantized("svdquant-fast")


@pytest.fixture(scope="module")
def unet_pipe(unet_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(unet_folder)
    pipe.set_progress_bar_config(disable=True)
    bittern.quantize(pipe, recipes.load("svdquant-fast").override(name="convolved", convolution={"group_size": 32}))
    return pipe


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    # Peft and diffusers tell of several adapters, and of parts that a LoRA leaves alone.
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def denoiser_paths(model: nn.Module) -> list[str]:
    """Few-bit layers, and those that were kept."""
    kept = [path for path, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    return [*quant_layers(model), *kept]


def lora_state(pipe: Any, seed: int, rank: int = 4, paths: list[str] | None = None) -> dict[str, Tensor]:
    model = component(pipe)
    prefix = "unet" if isinstance(pipe, StableDiffusionPipeline) else "transformer"
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for path in paths or denoiser_paths(model):
        n, *inputs = model.get_submodule(path).weight.shape
        state[f"{prefix}.{path}.lora_A.weight"] = 0.2 * torch.randn(rank, *inputs, generator=g)
        state[f"{prefix}.{path}.lora_B.weight"] = 0.2 * torch.randn(n, rank, *[1 for _ in inputs[1:]], generator=g)
    return state


def load_two(pipe: Any, weights: tuple[float, float] = (0.7, -0.4)) -> None:
    """One adapter on everything, another of another rank on every second few-bit layer."""
    everything, some = denoiser_paths(component(pipe)), list(quant_layers(component(pipe)))[::2]
    states = lora_state(pipe, 1, 4, everything), lora_state(pipe, 2, 16, some)
    for name, state in zip((A, B), states, strict=True):
        pipe.load_lora_weights(state, adapter_name=name)
    pipe.set_adapters([A, B], list(weights))


def input_of(layer: nn.Module, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Conv2d):
        return torch.randn(2, layer.in_channels, 6, 6, generator=g)
    return torch.randn(3, 5, layer.in_features, generator=g)


@torch.no_grad()
def outputs(model: nn.Module, paths: list[str]) -> dict[str, Tensor]:
    """Every layer's output for an input of its own."""
    found: dict[str, Tensor] = {}
    for path in paths:
        layer = model.get_submodule(path)
        found[path] = layer(input_of(getattr(layer, "base_layer", layer)))
    return found


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], relative: float) -> None:
    for path, y in want.items():
        assert float((got[path] - y).norm()) <= relative * float(y.norm()), path


def tensors(model: nn.Module) -> dict[str, Tensor]:
    few = quant_layers(model)
    state = {k: v.clone() for k, v in model.state_dict().items() if k.removesuffix(".weight") not in few}
    return {**state, **{f"{path}.down": layer.parts().down for path, layer in few.items() if layer.scheme.rank}}


def assert_same_tensors(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    after = tensors(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def draw(pipe: Any) -> Tensor:
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    more = {"max_sequence_length": 16, "guidance_scale": 0.0} if isinstance(pipe, FluxPipeline) else {}
    with torch.no_grad():
        return pipe("a red cat", **size, **more, generator=torch.Generator().manual_seed(0)).images.float()


# ---- loaded, not fused


@pytest.mark.parametrize("name", RECIPES)
def test_every_target_gets_the_delta_of_the_16_bit_model(
    name: str, quantized: Callable[[str], FluxPipeline], new_tiny_random_pipeline: NewPipeline
) -> None:
    few, full = quantized(name), new_tiny_random_pipeline()
    state, paths = lora_state(few, 1), denoiser_paths(few.transformer)
    check_deltas(few, full, paths, lambda pipe: pipe.load_lora_weights(dict(state), adapter_name=A))


def test_loaded_adapters_leave_shared_inputs_to_one_operation(
    pipe: FluxPipeline, operations: list[tuple[int, int]]
) -> None:
    draw(pipe)
    bare = list(operations)
    assert len({stop - start for start, stop in bare}) > 2
    pipe.load_lora_weights(lora_state(pipe, 1), adapter_name=A)
    operations.clear()
    draw(pipe)
    assert operations == bare


def test_every_convolution_gets_it_too(unet_pipe: StableDiffusionPipeline, unet_folder: Path) -> None:
    few, full = copy.deepcopy(unet_pipe), StableDiffusionPipeline.from_pretrained(unet_folder)
    paths = denoiser_paths(few.unet)
    assert sum(isinstance(layer, nn.Conv2d) for layer in quant_layers(few.unet).values()) > 10
    state = lora_state(few, 1)
    check_deltas(few, full, paths, lambda pipe: pipe.load_lora_weights(dict(state), adapter_name=A))


def check_deltas(few: Any, full: Any, paths: list[str], load: Callable[[Any], None]) -> None:
    """What loading adds to each layer's output is the same with few bits, with either sign, disabled and unloaded."""
    models = component(few), component(full)
    plain = [outputs(model, paths) for model in models]
    for pipe in (few, full):
        load(pipe)
    worn = [path for path in paths if hasattr(models[1].get_submodule(path), "base_layer")]
    assert worn
    for strength in (1.0, -0.6):
        for pipe in (few, full):
            pipe.set_adapters(A, strength)
        (y_few, y_full) = (outputs(model, worn) for model in models)
        deltas = [{path: y[path] - base[path] for path in worn} for y, base in zip((y_few, y_full), plain, strict=True)]
        assert_close(*deltas, 1e-4)
        assert all(float(delta.norm()) > 0 for delta in deltas[0].values())
    few.disable_lora()
    for path, y in outputs(models[0], worn).items():
        assert torch.equal(y, plain[0][path])
    few.unload_lora_weights()
    assert all(not hasattr(module, "base_layer") for module in models[0].modules())


def kohya(hidden: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    layers = {"double_blocks_0_img_attn_qkv": (1, 3), "double_blocks_0_txt_attn_qkv": (1, 3)}
    layers |= {"double_blocks_0_img_attn_proj": (1, 1), "double_blocks_0_txt_mlp_0": (1, 4)}
    layers |= {"double_blocks_0_img_mod_lin": (1, 6), "single_blocks_0_linear2": (5, 1)}
    layers |= {"single_blocks_0_modulation_lin": (1, 3)}
    for name, (inputs, results) in layers.items():
        state[f"lora_unet_{name}.lora_down.weight"] = 0.2 * torch.randn(4, inputs * hidden, generator=g)
        state[f"lora_unet_{name}.lora_up.weight"] = 0.2 * torch.randn(results * hidden, 4, generator=g)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    return state


def xlabs(hidden: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    layers = {"double_blocks.0.processor.qkv_lora1": 3, "double_blocks.0.processor.proj_lora1": 1}
    layers |= {"double_blocks.0.processor.qkv_lora2": 3, "single_blocks.0.processor.qkv_lora": 3}
    for name, results in layers.items():
        state[f"{name}.down.weight"] = 0.2 * torch.randn(4, hidden, generator=g)
        state[f"{name}.up.weight"] = 0.2 * torch.randn(results * hidden, 4, generator=g)
    return state


def old_names(pipe: Any) -> dict[str, Tensor]:
    names = {"lora_A": "lora.down", "lora_B": "lora.up"}
    return {
        key.replace(old, new): t for key, t in lora_state(pipe, 1).items() for old, new in names.items() if old in key
    }


@pytest.mark.parametrize("form", ["kohya", "xlabs", "old names"])
def test_the_forms_that_diffusers_converts(
    form: str, pipe: FluxPipeline, new_tiny_random_pipeline: NewPipeline
) -> None:
    state = {"kohya": kohya, "xlabs": xlabs}[form](64) if form != "old names" else old_names(pipe)
    full, paths = new_tiny_random_pipeline(), denoiser_paths(pipe.transformer)
    check_deltas(pipe, full, paths, lambda pipe: pipe.load_lora_weights(dict(state), adapter_name=A))


@pytest.mark.parametrize("kind", ["rslora", "biases", "lokr", "loha"])
def test_other_adapters_of_peft(kind: str, pipe: FluxPipeline, new_tiny_random_pipeline: NewPipeline) -> None:
    targets = ["to_q", "proj_out", "ff.net.2", "norm1.linear"]
    configs = {
        "rslora": LoraConfig(r=4, use_rslora=True, target_modules=targets, init_lora_weights=False),
        "biases": LoraConfig(r=4, lora_bias=True, target_modules=targets, init_lora_weights=False),
        "lokr": LoKrConfig(r=4, target_modules=targets, init_weights=False),
        "loha": LoHaConfig(r=4, target_modules=targets, init_weights=False),
    }
    full = new_tiny_random_pipeline()
    paths = [path for path in denoiser_paths(pipe.transformer) if path.endswith(tuple(targets))]
    models = pipe.transformer, full.transformer
    plain = [outputs(model, paths) for model in models]
    for model in models:
        torch.manual_seed(0)
        model.add_adapter(configs[kind], adapter_name=A)
    deltas = [{p: outputs(m, [p])[p] - base[p] for p in paths} for m, base in zip(models, plain, strict=True)]
    assert_close(*deltas, 1e-4)
    if kind == "rslora":
        bittern.fuse_loras(pipe)
        assert_close({p: y - plain[0][p] for p, y in outputs(models[0], paths).items()}, deltas[0], 1e-2)
    else:
        with pytest.raises(UserError, match=r"'a' is a (LoRA with biases|lokr layer|loha layer) at .*leave it loaded"):
            bittern.fuse_loras(pipe)
        assert_close({p: y - plain[0][p] for p, y in outputs(models[0], paths).items()}, deltas[0], 1e-6)


def test_a_dora_works_loaded_and_is_not_fused(pipe: FluxPipeline) -> None:
    """It scales the rows of the weight that the layer applies, which is the dequantized one."""
    path = "transformer_blocks.0.attn.to_q"
    state = lora_state(pipe, 1, paths=[path])
    (down, up) = state.values()
    magnitude = torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.5
    pipe.load_lora_weights({**state, f"transformer.{path}.lora_magnitude_vector": magnitude}, adapter_name=A)
    wrapper = pipe.transformer.get_submodule(path)
    base = wrapper.base_layer
    base.path = "a16"
    weight = base.weight.dequantize().double() + up.double() @ down.double()
    want = input_of(base).double() @ (weight * (magnitude.double() / weight.norm(dim=1))[:, None]).T
    with torch.no_grad():
        got = wrapper(input_of(base)) - base.bias
    assert float((got - want).norm() / want.norm()) < 1e-4
    with pytest.raises(UserError, match=r"'a' is a DoRA at transformer_blocks.0.attn.to_q.*leave it loaded, not fused"):
        bittern.fuse_loras(pipe)


# ---- fused


@pytest.mark.parametrize("name", RECIPES)
def test_fused_and_unfused_agree_and_every_bit_comes_back(name: str, quantized: Callable[[str], FluxPipeline]) -> None:
    check_fusing(quantized(name))


def test_fused_and_unfused_agree_with_convolutions(unet_pipe: StableDiffusionPipeline) -> None:
    check_fusing(copy.deepcopy(unet_pipe))


def check_fusing(pipe: Any) -> None:
    model = component(pipe)
    before, paths, picture = tensors(model), denoiser_paths(model), draw(pipe)
    schemes = {path: layer.scheme for path, layer in quant_layers(model).items()}
    plain = outputs(model, paths)
    load_two(pipe)
    unfused, unfused_picture = outputs(model, paths), draw(pipe)

    told = bittern.fuse_loras(pipe)
    assert told.strengths == {A: 0.7, B: -0.4} and told.error == 0
    assert (told.layers, told.dense) == (len(schemes), len(paths) - len(schemes))
    assert not any(hasattr(module, "base_layer") for module in model.modules())
    for layer in quant_layers(model).values():
        assert layer.scheme.rank % 16 == 0 and 16 <= layer.scheme.rank <= told.rank
    fused = outputs(model, paths)
    assert_close(fused, unfused, 1e-2)
    # Even what the adapters add, alone.
    for path in schemes:
        assert_close({path: fused[path] - plain[path]}, {path: unfused[path] - plain[path]}, 1e-2)
    assert float((draw(pipe) - unfused_picture).abs().max()) < 0.05

    bittern.set_lora_strengths(pipe, {A: -1.2})
    stronger = outputs(model, paths)
    bittern.unfuse_loras(pipe)
    assert pipe.get_active_adapters() == [A, B]
    assert_close(outputs(model, paths), stronger, 1e-2)
    pipe.set_adapters([A, B], [0.7, -0.4])
    for path, y in outputs(model, paths).items():
        assert torch.equal(y, unfused[path])
    pipe.unload_lora_weights()
    assert_same_tensors(model, before)
    assert {path: layer.scheme for path, layer in quant_layers(model).items()} == schemes
    assert torch.equal(draw(pipe), picture)


def test_which_adapters_and_how_strongly(pipe: FluxPipeline) -> None:
    paths = denoiser_paths(pipe.transformer)
    load_two(pipe)
    pipe.set_adapters(B, 0.9)
    want = outputs(pipe.transformer, paths)
    pipe.set_adapters(A)
    assert bittern.fuse_loras(pipe, {B: 0.9}).strengths == {B: 0.9}
    assert_close(outputs(pipe.transformer, paths), want, 1e-2)
    bittern.unfuse_loras(pipe)
    # What was not fused waited, too.
    assert set(pipe.get_list_adapters()["transformer"]) == {A, B}
    pipe.set_adapters(A, 2.0)
    want = outputs(pipe.transformer, paths)
    bittern.fuse_loras(pipe, {A: 0.0})
    bittern.set_lora_strengths(pipe, {A: 2.0})
    assert_close(outputs(pipe.transformer, paths), want, 1e-2)


@pytest.mark.parametrize("strength", [np.float32(0.5), torch.tensor(0.5)], ids=["numpy", "tensor"])
def test_strengths_that_others_worked_out(strength: Any, pipe: FluxPipeline) -> None:
    load_two(pipe)
    assert bittern.fuse_loras(pipe, {A: strength, B: 1}).strengths == {A: 0.5, B: 1.0}
    bittern.set_lora_strengths(pipe, {B: strength})
    bittern.unfuse_loras(pipe)
    assert bittern.fuse_loras(pipe).strengths == {A: 0.5, B: 0.5}


def test_projections_that_share_their_down_share_its_rank(pipe: FluxPipeline) -> None:
    pipe.load_lora_weights(kohya(64), adapter_name=A)
    joint = pipe.transformer.get_submodule("transformer_blocks.0.attn.to_q").base_layer
    own = joint.scheme.rank
    bittern.fuse_loras(pipe)
    assert joint.scheme.rank == -(-(own + 4) // 16) * 16


def test_another_strength_is_quick_and_compiles_nothing(pipe: FluxPipeline) -> None:
    torch._dynamo.reset()
    load_two(pipe)
    bittern.fuse_loras(pipe)
    counter = CompileCounter()
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(kwargs), with_kwargs=True)
    draw(pipe)
    hook.remove()
    pipe.transformer.requires_grad_(False).compile(backend=counter)
    with torch.no_grad():
        first = pipe.transformer(**calls[0])[0]
        frames = counter.frame_count
        assert frames >= 1
        for strengths in ({A: 0.1}, {A: -1.0, B: 2.0}, {B: 0.0}):
            began = time.perf_counter()
            bittern.set_lora_strengths(pipe, strengths)
            # A hundred times what it takes, for a machine that others keep busy.
            assert time.perf_counter() - began < 1
            assert not torch.equal(pipe.transformer(**calls[0])[0], first)
    assert counter.frame_count == frames


def test_copies_are_fused_on_their_own(pipe: FluxPipeline) -> None:
    load_two(pipe)
    bittern.fuse_loras(pipe)
    picture = draw(pipe)
    other = copy.deepcopy(pipe)
    bittern.set_lora_strengths(other, {A: 0.0, B: 0.0})
    assert not torch.equal(draw(other), picture)
    bittern.unfuse_loras(other)
    assert torch.equal(draw(pipe), picture)


def test_text_encoders_stay_with_peft_and_follow(pipe: FluxPipeline) -> None:
    state, size = lora_state(pipe, 1, paths=["x_embedder", "proj_out"]), pipe.text_encoder.config.hidden_size
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    g = torch.Generator().manual_seed(5)
    state[f"{encoder}.lora_A.weight"] = torch.randn(4, size, generator=g)
    state[f"{encoder}.lora_B.weight"] = torch.randn(size, 4, generator=g)
    ids = torch.arange(8)[None]
    plain = pipe.text_encoder(ids).last_hidden_state
    pipe.load_lora_weights(state, adapter_name=A)
    pipe.set_adapters(A, 0.5)
    half = pipe.text_encoder(ids).last_hidden_state
    assert (half - plain).abs().max() > 1e-3
    bittern.fuse_loras(pipe)
    assert torch.equal(pipe.text_encoder(ids).last_hidden_state, half)
    bittern.set_lora_strengths(pipe, {A: 0.0})
    assert torch.equal(pipe.text_encoder(ids).last_hidden_state, plain)
    with pytest.raises(UserError, match="text_encoder wears adapter 'a'"):
        bittern.save_fused(pipe, "nowhere")


def test_a_cut_rank_says_what_it_costs(pipe: FluxPipeline) -> None:
    load_two(pipe, (1.0, 0.5))
    paths = list(quant_layers(pipe.transformer))
    whole = bittern.fuse_loras(pipe)
    want = weights(pipe, paths)
    bittern.set_lora_strengths(pipe, {A: 0.0, B: 0.0})
    plain = weights(pipe, paths)
    bittern.unfuse_loras(pipe)
    pipe.set_adapters([A, B], [1.0, 0.5])
    told = bittern.fuse_loras(pipe, max_rank=8)
    assert told.rank < whole.rank and 0 < told.error < told.worst < 1
    got = weights(pipe, paths)
    lost = sum(float((got[path] - want[path]).square().sum()) for path in paths)
    size = sum(float((want[path] - plain[path]).square().sum()) for path in paths)
    # The figure counts each adapter at strength 1; the sum of two is near.
    assert (lost / size) ** 0.5 == pytest.approx(told.error, rel=0.5)
    bittern.set_lora_strengths(pipe, {B: 0.0})
    one = sum(
        float((weights(pipe, [p])[p] - plain[p] - delta).square().sum()) for p, delta in of_a(pipe, paths).items()
    )
    assert one > 0
    bittern.unfuse_loras(pipe)
    assert bittern.fuse_loras(pipe, max_rank=1024).error == 0


def weights(pipe: Any, paths: list[str]) -> dict[str, Tensor]:
    return {path: pipe.transformer.get_submodule(path).weight.dequantize() for path in paths}


def of_a(pipe: Any, paths: list[str]) -> dict[str, Tensor]:
    state = lora_state(pipe, 1, 4)
    return {p: state[f"transformer.{p}.lora_B.weight"] @ state[f"transformer.{p}.lora_A.weight"] for p in paths}


def with_alphas(pipe: Any, ranks: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """As trainers write them that keep an alpha beside the factors."""
    state: dict[str, Tensor] = {}
    for seed, (path, rank) in enumerate(ranks.items(), 1):
        state |= lora_state(pipe, seed, rank, [path])
        state[f"transformer.{path}.alpha"] = torch.tensor(float(rank) / 2 + seed, dtype=dtype)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alphas_beside_the_factors_are_fused(dtype: torch.dtype, pipe: FluxPipeline) -> None:
    ranks = {"transformer_blocks.0.attn.to_q": 4, "transformer_blocks.0.attn.to_k": 4, "proj_out": 8}
    paths, before = denoiser_paths(pipe.transformer), tensors(pipe.transformer)
    pipe.load_lora_weights(with_alphas(pipe, ranks, dtype), adapter_name=A)
    pipe.set_adapters(A, 0.7)
    loaded = outputs(pipe.transformer, paths)
    assert bittern.fuse_loras(pipe).strengths == {A: 0.7}
    assert_close(outputs(pipe.transformer, paths), loaded, 1e-2)
    bittern.unfuse_loras(pipe)
    # One strength, though the units of q and k are two.
    assert 0 < bittern.fuse_loras(pipe, max_rank=2).error < 1
    bittern.unfuse_loras(pipe)
    pipe.unload_lora_weights()
    assert_same_tensors(pipe.transformer, before)


@pytest.mark.parametrize("place", ["WidenedBranch", "_Merged.write", "swap"])
def test_whatever_goes_wrong_nothing_has_changed(
    place: str, pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_two(pipe)
    pipe.set_adapters(A, 0.7)
    before, loaded, paths = tensors(pipe.transformer), outputs(pipe.transformer, paths_of_few(pipe)), paths_of_few(pipe)
    schemes = {path: layer.scheme for path, layer in quant_layers(pipe.transformer).items()}
    holder, _, name = place.rpartition(".")
    where: Any = getattr(loras, holder) if holder else loras
    real, calls = getattr(where, name), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no memory left")
        return real(*args)

    monkeypatch.setattr(where, name, failing)
    with pytest.raises(torch.OutOfMemoryError):
        bittern.fuse_loras(pipe, {A: 0.2, B: 0.5})
    monkeypatch.undo()
    assert_same_tensors(pipe.transformer, before)
    assert {path: layer.scheme for path, layer in quant_layers(pipe.transformer).items()} == schemes
    assert pipe.get_active_adapters() == [A]
    assert all(torch.equal(y, loaded[path]) for path, y in outputs(pipe.transformer, paths).items())
    bittern.fuse_loras(pipe)
    assert_close(outputs(pipe.transformer, paths), loaded, 1e-2)


def test_diffusers_own_fusing_is_refused_before_it_writes(pipe: FluxPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "few")
    for each in (pipe, copy.deepcopy(pipe), FluxPipeline.from_pretrained(tmp_path / "few")):
        load_two(each)
        before = tensors(each.transformer)
        with pytest.raises(UserError, match=r"read-only.*fuse them with bittern.fuse_loras"):
            each.fuse_lora()
        assert_same_tensors(each.transformer, before)
        assert not any(getattr(module, "merged", False) for module in each.transformer.modules())


def paths_of_few(pipe: Any) -> list[str]:
    return list(quant_layers(pipe.transformer))


# ---- folders


def test_a_fused_model_is_saved_when_it_is_asked_for(pipe: FluxPipeline, tmp_path: Path) -> None:
    load_two(pipe)
    bittern.fuse_loras(pipe)
    picture = draw(pipe)
    with pytest.raises(UserError, match=r"adapters a, b are fused.*bittern.save_fused\(pipe, folder\).*unfuse_loras"):
        pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="save_fused"):
        pipe.transformer.save_pretrained(tmp_path / "plain-model")
    assert not list(tmp_path.iterdir())
    bittern.save_fused(pipe, tmp_path / "fused")
    bittern.save_fused(pipe.transformer, tmp_path / "model")
    again = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), picture)
    ranks = {path: layer.scheme.rank for path, layer in quant_layers(pipe.transformer).items()}
    assert {row.path: row.rank for row in bittern.inspect(tmp_path / "fused").rows} == ranks
    assert bittern.inspect(tmp_path / "model").rows == bittern.inspect(tmp_path / "fused").rows
    # The model is still fused, and still refuses.
    with pytest.raises(UserError, match="save_fused"):
        pipe.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    with pytest.raises(UserError, match="not empty"):
        bittern.save_fused(pipe, tmp_path / "fused")
    bittern.unfuse_loras(pipe)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "plain")
    assert {row.rank for row in bittern.inspect(tmp_path / "plain").rows} == {0, 32}
    # What was saved is a few-bit model like others.
    again.load_lora_weights(lora_state(again, 3), adapter_name="c")
    bittern.fuse_loras(again)
    with pytest.raises(UserError, match="adapters c are fused"):
        again.save_pretrained(tmp_path / "more")


# ---- mistakes


def test_what_cannot_be_fused_says_so(pipe: FluxPipeline, new_tiny_random_pipeline: NewPipeline) -> None:
    for undo in (
        bittern.unfuse_loras,
        lambda p: bittern.set_lora_strengths(p, {A: 1.0}),
        lambda p: bittern.save_fused(p, "x"),
    ):
        with pytest.raises(UserError, match=r"no adapter is fused: expected bittern.fuse_loras\(pipe\) before"):
            undo(pipe)
    with pytest.raises(UserError, match=r"no adapter is active.*load_lora_weights"):
        bittern.fuse_loras(pipe)
    load_two(pipe)
    with pytest.raises(UserError, match=r"no adapter 'aa' is loaded: .*a, b"):
        bittern.fuse_loras(pipe, {"aa": 1.0})
    for strengths, message in (({A: float("nan")}, "finite"), ({}, "strengths is empty")):
        with pytest.raises(UserError, match=message):
            bittern.fuse_loras(pipe, strengths)
    for rank in (0, 1.5, "8", True):
        with pytest.raises(UserError, match=re.escape(f"max_rank {rank!r}: expected a whole number, 1 or more")):
            bittern.fuse_loras(pipe, max_rank=rank)
    pipe.disable_lora()
    with pytest.raises(UserError, match="enable_lora"):
        bittern.fuse_loras(pipe)
    bittern.fuse_loras(pipe, {A: 1.0})
    with pytest.raises(UserError, match=r"adapters a are fused already.*unfuse_loras.*set_lora_strengths"):
        bittern.fuse_loras(pipe)
    with pytest.raises(UserError, match="no adapter 'b' is fused: "):
        bittern.set_lora_strengths(pipe, {B: 1.0})
    with pytest.raises(UserError, match="strength of 'a' is inf: expected a finite number"):
        bittern.set_lora_strengths(pipe, {A: float("inf")})
    for wrong in ("1", [0.5, 0.5], torch.ones(2), None):
        with pytest.raises(UserError, match=r"strength of 'a' is .*: expected a finite number"):
            bittern.set_lora_strengths(pipe, {A: wrong})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="FluxTransformer2DModel has no few-bit layers"):
        bittern.fuse_loras(new_tiny_random_pipeline())


def test_adapters_that_come_later_wear_on_top_and_go_first(pipe: FluxPipeline) -> None:
    paths = denoiser_paths(pipe.transformer)
    load_two(pipe)
    pipe.set_adapters([A, B], [1.0, 0.5])
    both = outputs(pipe.transformer, paths)
    pipe.delete_adapters(B)
    bittern.fuse_loras(pipe)
    pipe.load_lora_weights(lora_state(pipe, 2, 16, list(quant_layers(pipe.transformer))[::2]), adapter_name=B)
    pipe.set_adapters(B, 0.5)
    assert_close(outputs(pipe.transformer, paths), both, 1e-2)
    with pytest.raises(UserError, match="adapters b were loaded after others were fused: take them off first"):
        bittern.unfuse_loras(pipe)
    pipe.delete_adapters(B)
    pipe.unload_lora_weights()
    bittern.unfuse_loras(pipe)
    assert pipe.get_active_adapters() == [A]


def test_offloaded_layers(pipe: FluxPipeline) -> None:
    import accelerate

    load_two(pipe)
    cpu = torch.device("cpu")
    unfused = draw(pipe)
    grouped = copy.deepcopy(pipe)
    grouped.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    bittern.fuse_loras(grouped)
    assert float((draw(grouped) - unfused).abs().max()) < 0.05
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu", offload_buffers=True)
    with pytest.raises(UserError, match="offloaded one by one"):
        bittern.fuse_loras(pipe)
    assert torch.equal(draw(pipe), unfused)


def test_a_member_alone_keeps_its_group(pipe: FluxPipeline) -> None:
    """An adapter on one of several layers that read one tensor: they run as one again once it is fused."""
    attn = pipe.transformer.transformer_blocks[0].attn
    pipe.load_lora_weights(lora_state(pipe, 1, paths=["transformer_blocks.0.attn.to_k"]), adapter_name=A)
    assert not isinstance(attn.to_k, QuantLinear)
    bittern.fuse_loras(pipe)
    assert isinstance(attn.to_k, QuantLinear) and attn.to_k.group is attn.to_q.group
    x = input_of(attn.to_q)
    before = attn.to_q(x)
    bittern.set_lora_strengths(pipe, {A: 5.0})
    assert torch.equal(attn.to_q(x), before)
