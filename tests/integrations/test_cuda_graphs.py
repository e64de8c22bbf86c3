"""Calls that are replayed: the same numbers as without, whatever is changed between them. On a CPU by `tape`."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tape
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bittern
from bittern.integrations import cuda_graphs
from bittern.integrations.cuda_graphs import CudaGraphs
from bittern.integrations.watch import Watch
from bittern.layers import set_path
from families import FAMILIES, run

FLUX, UNET = FAMILIES["flux"], FAMILIES["sdxl"]


@pytest.fixture(autouse=True)
def _on_tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tape.Recorder, "fails", None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield


@pytest.fixture(scope="module")
def solved() -> Callable[[Any], nn.Module]:
    """Few-bit models of the test's own, each solved once."""
    made: dict[str, nn.Module] = {}

    def get(family: Any) -> nn.Module:
        if family.class_name not in made:
            made[family.class_name] = model = family.build().requires_grad_(False)
            bittern.quantize(model, "svdquant-fast" if family is FLUX else "ternary-fast")
        return copy.deepcopy(made[family.class_name])

    return get


@pytest.fixture
def flux(solved: Callable[[Any], nn.Module]) -> Any:
    return solved(FLUX)


@pytest.fixture
def unet(solved: Callable[[Any], nn.Module]) -> Any:
    return solved(UNET)


def taped(model: Any) -> CudaGraphs:
    model._compiled_call_impl = graphs = CudaGraphs(model, tape.Recorder, "cpu")
    return graphs


def fresh(family: Any, seed: int) -> dict[str, Any]:
    """Other numbers of the same shapes."""
    g = torch.Generator().manual_seed(seed)

    def other(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: other(value) for key, value in x.items()}
        if not isinstance(x, Tensor):
            return x
        return torch.rand(x.shape, generator=g) if x.is_floating_point() else x

    return other(family.call()) | {"return_dict": False}


def check(model: Any, family: Any = FLUX, calls: int = 3, **more: Any) -> int:
    """Several calls, each against an ordinary one; how many of them were replays."""
    before = model._compiled_call_impl.replayed
    kept = []
    for seed in range(calls):
        given = fresh(family, seed) | more
        kept.append((model(**given)[0], model._call_impl(**given)[0]))
    # Afterwards: results of earlier calls must outlive later ones.
    assert all(torch.equal(got, want) for got, want in kept)
    return model._compiled_call_impl.replayed - before


@pytest.mark.parametrize("family", [FLUX, UNET], ids=["flux", "sdxl"])
def test_the_third_call_is_a_replay_and_numbers_are_the_same(family: Any, solved: Callable[[Any], nn.Module]) -> None:
    model: Any = solved(family)
    graphs = taped(model)
    assert check(model, family, calls=5) == 3
    assert (graphs.recorded, graphs.replayed, graphs.why_not) == (1, 3, None)
    given = fresh(family, 7)
    del given["return_dict"]
    # Another argument is another kind of call, with an output of another class.
    found = [model(**given) for _ in range(4)][-1]
    assert type(found) is type(model._call_impl(**given)) and graphs.recorded == 2
    assert torch.equal(found.sample, model._call_impl(**given).sample)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_replayed(name: str) -> None:
    # Nothing of what a forward keeps between calls (tables of positions) may look like a change of the model.
    model: Any = FAMILIES[name].build().requires_grad_(False)
    taped(model)
    given = FAMILIES[name].call() | {"return_dict": False}
    want = _flat(model(**given))
    for _ in range(3):
        assert torch.equal(_flat(model(**given)), want)
    assert model._compiled_call_impl.replayed == 2


def _flat(sample: Any) -> Tensor:
    return torch.cat([part.flatten() for part in tree_leaves(sample)])


def test_a_stale_replay_would_be_caught_by_its_numbers(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taped(flux)
    assert check(flux) == 1
    monkeypatch.setattr(Watch, "holds", lambda self: True)
    set_path(flux, "a4")
    with pytest.raises(AssertionError):
        check(flux)


def _processor(flux: Any) -> None:
    flux.transformer_blocks[0].attn.set_processor(_Doubling())


class _Doubling(FluxAttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * part for part in super().__call__(*args, **kwargs))


def _storage(flux: Any) -> None:
    flux.x_embedder.weight.data = 2 * flux.x_embedder.weight.data


def _buffer(flux: Any) -> None:
    layer = flux.transformer_blocks[0].ff.net[2]
    layer.scales = 2 * layer.scales


def _module(flux: Any) -> None:
    other = copy.deepcopy(flux.proj_out)
    other.weight.mul_(2)
    flux.proj_out = other


def _class(flux: Any) -> None:
    flux.proj_out.__class__ = _Negated


class _Negated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def _round_trip(flux: Any) -> None:
    # To another device and back, where others have taken the place meanwhile. Diffusers' own refuses.
    before = [tensor.detach() for tensor in (*flux.parameters(), *flux.buffers())]
    nn.Module.float(nn.Module.double(flux))
    del before


CHANGES: dict[str, Callable[[Any], object]] = {
    "path": lambda flux: set_path(flux, "a4"),
    "processor": _processor,
    "storage": _storage,
    "buffer": _buffer,
    "module": _module,
    "class": _class,
    "moved": _round_trip,
    "attribute": lambda flux: setattr(flux.norm_out.norm, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_nothing_stale_is_replayed(flux: Any, change: str) -> None:
    graphs = taped(flux)
    assert check(flux) == 1
    CHANGES[change](flux)
    assert check(flux) == 1 and graphs.recorded == 2


def test_adapters_of_peft(flux: Any) -> None:
    graphs = taped(flux)
    assert check(flux) == 1
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "proj_mlp", "proj_out", "linear"], init_lora_weights=False)

    def then(change: Callable[[], object]) -> None:
        before = graphs.recorded
        change()
        assert check(flux) == 1 and graphs.recorded == before + 1

    then(lambda: flux.add_adapter(config, "a"))
    then(lambda: flux.add_adapter(config, "b"))
    then(lambda: flux.set_adapters(["a", "b"], [0.5, -1.0]))
    then(lambda: flux.set_adapters(["a", "b"], [0.25, -1.0]))
    then(lambda: flux.set_adapters(["a"], [0.25]))
    then(flux.disable_adapters)
    then(flux.enable_adapters)
    # The forward multiplies strengths and divides them again: what is equal is the same.
    assert check(flux, joint_attention_kwargs={"scale": 0.5}) == 1
    then(lambda: flux.delete_adapters(["b"]))
    then(flux.unload_lora)


def test_strengths_of_fused_loras_are_replayed_anew(flux: Any) -> None:
    graphs = taped(flux)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "proj_mlp", "x_embedder"], init_lora_weights=False)
    flux.add_adapter(config, "a")
    bittern.fuse_loras(flux)
    assert check(flux) == 1
    first = flux(**fresh(FLUX, 0))[0]
    bittern.set_lora_strengths(flux, {"a": -0.5})
    assert check(flux) == 3 and graphs.recorded == 1
    assert not torch.equal(first, flux(**fresh(FLUX, 0))[0])
    bittern.unfuse_loras(flux)
    assert check(flux) == 1


def test_what_is_set_outside_belongs_to_the_call(flux: Any) -> None:
    graphs = taped(flux)
    assert check(flux) == 1
    with bittern.use_backend("torch"):
        assert check(flux) == 1
    assert check(flux) == 3
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert check(flux) == 1
    with torch.inference_mode():
        assert check(flux) == 3
    assert check(flux) == 3 and graphs.recorded == 3


def test_the_attention_backend_and_processors_of_a_unet(unet: Any, flux: Any) -> None:
    taped(unet), taped(flux)
    assert check(unet, UNET) == 1
    unet.set_attn_processor(AttnProcessor())
    assert check(unet, UNET) == 1
    unet.set_attn_processor(AttnProcessor2_0())
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert check(unet, UNET) == 1
    assert check(flux) == 1
    flux.set_attention_backend("_native_math")
    assert check(flux) == 1
    flux.reset_attention_backend()
    assert check(flux) == 1


def test_shapes_strides_and_values_are_kinds_of_calls(flux: Any) -> None:
    graphs = taped(flux)
    text = fresh(FLUX, 0)["encoder_hidden_states"]
    longer = {"encoder_hidden_states": torch.cat([text, text], dim=1), "txt_ids": torch.zeros(10, 3)}
    one = {
        name: fresh(FLUX, 3)[name][:1]
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    }
    assert check(flux) == 1
    assert check(flux, **longer) == 1
    assert check(flux, **one) == 1
    assert check(flux, timestep=torch.tensor(0.5).expand(2)) == 1
    assert check(flux) == 3 and graphs.recorded == 4
    # No more are kept, and the one that waited longest goes.
    transposed = text.transpose(1, 2).contiguous().transpose(1, 2)
    assert check(flux, encoder_hidden_states=transposed) == 1
    assert check(flux) == 3
    assert check(flux, **longer) == 1
    assert len(graphs._recordings) == cuda_graphs.MOST


def test_numbers_that_change_in_every_call_record_nothing() -> None:
    class Timed(nn.Linear):
        def forward(self, x: Tensor, time: float) -> Tensor:
            return super().forward(x) * time

    model: Any = Timed(3, 3).requires_grad_(False)
    graphs, x = taped(model), torch.ones(3)

    def right(times: list[float]) -> bool:
        return all(torch.equal(model(x, time), model._call_impl(x, time)) for time in times)

    circle = [float(time) for time in range(cuda_graphs.MOST + 1)]
    assert right(3 * circle) and graphs.recorded == 0
    # A circle that can be kept is.
    assert right(4 * [7, 8]) and (graphs.recorded, graphs.replayed) == (2, 4)
    assert right(3 * [7.0]) and graphs.recorded == 3


def test_gradients_are_the_ordinary_ones(flux: Any) -> None:
    graphs = taped(flux)
    assert check(flux) == 1
    given = fresh(FLUX, 0)
    given["hidden_states"].requires_grad_()
    with torch.enable_grad():
        flux(**given)[0].sum().backward()
        assert given["hidden_states"].grad is not None and graphs.why_not == "gradients are wanted"
        flux.proj_out.weight.requires_grad_()
        assert flux(**fresh(FLUX, 0))[0].requires_grad
        flux.requires_grad_(False)
        assert check(flux) == 3


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "cache", "global"])
def test_hooks_see_every_call(flux: Any, how: str) -> None:
    graphs, seen = taped(flux), []
    assert check(flux) == 1
    block = flux.transformer_blocks[1]
    if how == "cache":
        flux.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        with pytest.warns(UserWarning, match="hooks"), flux.cache_context("c"):
            flux(**fresh(FLUX, 0))
        flux.disable_cache()
    elif how == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        flux(**fresh(FLUX, 0))
        handle.remove()
        assert seen and graphs.why_not is not None
    else:
        plain = block.forward
        if how == "forward":
            block.forward = lambda *args, **kwargs: (seen.append(1), plain(*args, **kwargs))[1]
        else:
            register = block.register_forward_hook if how == "hook" else block.register_forward_pre_hook
            handle = register(lambda *_: seen.append(1))
        with pytest.warns(UserWarning, match=r"transformer_blocks\.1 has hooks"):
            flux(**fresh(FLUX, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            flux(**fresh(FLUX, 0)), flux(**fresh(FLUX, 0))
        assert len(seen) == 3
        if how == "forward":
            del block.forward
        else:
            handle.remove()
    assert check(flux) >= 1


def test_a_recording_that_fails_is_told_of_once(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = taped(flux)
    monkeypatch.setattr(tape.Recorder, "fails", RuntimeError("out of memory\nand more"))
    with pytest.warns(UserWarning, match="recording failed: out of memory$") as told:
        assert check(flux) == 0
    assert len(told) == 1 and "out of memory" in str(graphs)
    monkeypatch.setattr(tape.Recorder, "fails", None)
    # The same kind is not tried again, another is.
    assert check(flux) == 0
    assert check(flux, timestep=torch.tensor(0.5).expand(2)) == 1


@pytest.mark.parametrize("wrong", ["far", "nan", "near"])
def test_a_replay_that_gives_other_numbers_is_refused(flux: Any, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = tape.Tape.replay

    def off(self: tape.Tape) -> None:
        replay(self)
        last = next(t for t in tree_leaves(self.steps[-1][-1]) if isinstance(t, Tensor))
        if wrong == "nan":
            last[0, 0] = float("nan")
        else:
            last.mul_(1 + (1e-2 if wrong == "far" else 1e-5))

    monkeypatch.setattr(tape.Tape, "replay", off)
    graphs, calls = taped(flux), [fresh(FLUX, seed) for seed in range(4)]
    if wrong == "near":
        answers = [flux(**call)[0] for call in calls]
        assert graphs.recorded == 1 and graphs.replayed == 2
    else:
        with pytest.warns(UserWarning, match="recording failed: a replay gave other numbers than the call"):
            answers = [flux(**call)[0] for call in calls]
        assert graphs.recorded == graphs.replayed == 0
    flux._compiled_call_impl = None
    for answer, call in zip(answers, calls, strict=True):
        assert torch.allclose(answer, flux(**call)[0], rtol=1e-4 if wrong == "near" else 0, atol=0)


def test_memory_is_given_up_for_a_call_that_needs_it(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, plain, tried = taped(flux), flux._call_impl, []
    assert check(flux) == 1

    def short(*args: Any, **kwargs: Any) -> Any:
        tried.append(len(graphs._recordings))
        if graphs._recordings:
            raise torch.OutOfMemoryError("out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(flux, "_call_impl", short)
    given = fresh(FLUX, 0) | {"timestep": torch.tensor(0.5).expand(2)}
    flux._compiled_call_impl._watch = Watch(flux)
    found = flux(**given)[0]
    assert tried == [1, 0] and torch.equal(found, plain(**given)[0])


def test_a_model_that_notes_something_in_each_call_is_never_recorded() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    model: Any = Counting(3, 3).requires_grad_(False)
    graphs = taped(model)
    x = torch.ones(3)
    want = model.weight.sum(1) + model.bias
    for call in range(1, 6):
        assert torch.allclose(model(x), call * want)
    assert graphs.recorded == 0


def test_on_a_cpu_calls_are_ordinary_and_it_is_said_once(flux: Any) -> None:
    graphs = bittern.enable_cuda_graphs(flux)
    assert bittern.enable_cuda_graphs(flux) is graphs
    with pytest.warns(UserWarning, match="tensors lie on cpu: expected one cuda device") as told:
        assert check(flux) == 0
    assert len(told) == 1
    bittern.disable_cuda_graphs(flux)
    bittern.disable_cuda_graphs(flux)
    assert flux._compiled_call_impl is None and "_compiled_call_impl" in vars(flux)


def test_for_a_while(flux: Any) -> None:
    with cuda_graphs.using(flux, False):
        assert flux._compiled_call_impl is None
    with cuda_graphs.using(flux):
        mine = flux._compiled_call_impl
        assert isinstance(mine, CudaGraphs)
        with cuda_graphs.using(flux):
            assert flux._compiled_call_impl is mine
        assert flux._compiled_call_impl is mine
    assert flux._compiled_call_impl is None


def test_copies_pickles_and_folders_are_without(flux: Any, tmp_path: Any) -> None:
    taped(flux)
    assert check(flux) == 1
    want = run(flux, FLUX)
    flux.save_pretrained(tmp_path)
    loaded = type(flux).from_pretrained(tmp_path)
    for other in (copy.deepcopy(flux), pickle.loads(pickle.dumps(flux)), loaded):
        assert other._compiled_call_impl is None and torch.equal(run(other, FLUX), want)
    # What diffusers writes into the config of a model that it saves counts as a change.
    assert check(flux) >= 1


def test_a_whole_pipeline(new_tiny_random_pipeline: Callable[[], Any]) -> None:
    pipe = new_tiny_random_pipeline()
    bittern.quantize(pipe, "svdquant-fast")

    def drawn() -> Any:
        return pipe(
            "a",
            height=32,
            width=32,
            num_inference_steps=5,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images

    want = drawn()
    graphs = taped(pipe.transformer)
    assert torch.equal(drawn(), want) and graphs.replayed == 3
    assert torch.equal(drawn(), want) and graphs.replayed == 8


def test_a_compiled_model_is_left_alone(flux: Any) -> None:
    compiled = torch.compile(flux, backend="eager")
    with pytest.warns(UserWarning, match="compiled as a whole"):
        assert bittern.enable_cuda_graphs(compiled) is None
    assert flux._compiled_call_impl is None
    small: Any = nn.Linear(3, 3).requires_grad_(False)
    graphs = taped(small)
    around, x = torch.compile(small, backend="eager", fullgraph=True), torch.ones(3)
    for _ in range(4):
        assert torch.equal(around(x), small._call_impl(x))
    assert graphs.recorded == graphs.replayed == 0
    bittern.disable_cuda_graphs(around)
    assert small._compiled_call_impl is None
    small.compile(backend="eager")
    with pytest.warns(UserWarning, match="compiled as a whole"):
        assert bittern.enable_cuda_graphs(small) is None


def test_models_with_compiled_blocks_are_recorded() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    graphs = bittern.enable_cuda_graphs(model)
    assert graphs is model._compiled_call_impl
    graphs, x = taped(model), torch.ones(3)
    for _ in range(3):
        assert torch.equal(model(x), model._call_impl(x))
    model[1].compile(backend="eager")
    for _ in range(3):
        assert torch.equal(model(x), model._call_impl(x))
    assert (graphs.recorded, graphs.replayed) == (2, 2)


def test_nothing_of_the_model_is_kept_alive_by_the_watch(flux: Any) -> None:
    import weakref

    taped(flux)
    flux(**fresh(FLUX, 0))
    layer = flux.transformer_blocks[0].ff.net[2]
    buffer, parameter = weakref.ref(layer.codes), flux.x_embedder.weight.untyped_storage().data_ptr()
    nn.Module.double(flux)
    assert buffer() is None and flux.x_embedder.weight.untyped_storage().data_ptr() != parameter


def test_the_fingerprint_of_57_blocks_is_cheap() -> None:
    model = nn.ModuleList(FLUX.build() for _ in range(14))  # 56 blocks, and embedders in each
    watch = Watch(model)
    took, walked = [], []
    for _ in range(20):
        began = time.perf_counter()
        assert watch.holds()
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
        assert all(model.modules())
        walked.append(time.perf_counter() - began)
    # Beside a bare walk over all modules, since machines differ and do other things, too: 1.5 to 2 times as long.
    assert min(took) < 4 * min(walked)
