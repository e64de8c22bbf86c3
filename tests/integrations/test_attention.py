"""Attention backends by name: what runs here, what is refused, and that a model has its own again afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)

import bittern
from bittern.errors import UserError
from bittern.integrations import attention
from bittern.integrations.attention_backend import NAME
from families import FAMILIES, run


def test_every_backend_of_diffusers_is_listed() -> None:
    assert set(attention.names()) == {backend.value for backend in AttentionBackendName}
    assert attention.refusal("native", "cpu") is None
    assert attention.refusal("_native_math", "cpu", torch.float32) is None


def test_what_does_not_run_here_has_a_reason() -> None:
    assert "flash-attn" in str(attention.refusal("flash", "cpu"))
    assert "sageattention" in str(attention.refusal("sage", "cpu"))
    # Torch has no cuDNN attention on a CPU; nothing but trying tells.
    assert attention.refusal("_native_cudnn", "cpu")


def test_code_from_the_hub_is_not_fetched_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("diffusers.models.attention_dispatch._maybe_download_kernel_for_backend", fetch)
    assert "kernels" in str(attention.refusal("flash_hub", "cpu"))
    assert attention.is_fetched("flash_hub") and not attention.is_fetched("flash")


@pytest.mark.parametrize("recipe", [None, "svdquant-fast"])
def test_a_model_attends_by_the_backend_and_has_its_own_again(
    recipe: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["flux"]
    model = family.build()
    if recipe:
        bittern.quantize(model, recipe)
    plain = run(model, family)
    asked: list[object] = []

    def dispatch(*args: object, **kwargs: object) -> torch.Tensor:
        asked.append(kwargs.get("backend"))
        return dispatch_attention_fn(*args, **kwargs)

    for place in ("diffusers.models.transformers.transformer_flux", "bittern.architectures.flux_forward"):
        monkeypatch.setattr(f"{place}.dispatch_attention_fn", dispatch)
    with attention.using(model, "_native_math"):
        assert attention.chosen(model) == "_native_math"
        assert torch.allclose(run(model, family), plain, rtol=1e-3, atol=1e-4)
    assert asked == [AttentionBackendName._NATIVE_MATH] * 4
    asked.clear()
    assert attention.chosen(model) == "native"
    assert torch.equal(run(model, family), plain)
    assert asked == [None] * 4


@pytest.mark.parametrize("recipe", [None, "svdquant-fast"])
def test_eight_bits_are_one_of_them(recipe: str | None) -> None:
    """On a CPU the reference computes them; a compiled model asks for the same."""
    family = FAMILIES["flux"]
    model = family.build()
    if recipe:
        bittern.quantize(model, recipe)
    plain = run(model, family)
    with attention.using(model, NAME):
        assert attention.chosen(model) == NAME
        eight = run(model, family)
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        assert torch.allclose(run(model, family), eight, rtol=1e-3, atol=1e-4)
        del model.forward
    assert 1e-4 < (eight - plain).norm() / plain.norm() < 0.02
    assert torch.equal(run(model, family), plain)
    model.set_attention_backend(NAME)
    assert torch.equal(run(model, family), eight)
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"attn_mask": torch.ones(1, 4, dtype=torch.bool)}, "a mask"),
        ({"is_causal": True, "dropout_p": 0.1}, "dropout and a causal order"),
        ({"enable_gqa": True}, "queries that share keys"),
        ({"attention_kwargs": {"return_lse": True}}, "log-sums"),
        ({"parallel_config": object()}, "context parallelism"),
    ],
)
def test_eight_bits_know_all_keys_only(asked: dict[str, Any], named: str) -> None:
    q, k = torch.ones(1, 4, 2, 16), torch.ones(1, 4, 1 if "enable_gqa" in asked else 2, 16)
    with pytest.raises(UserError, match=f"attention 'bittern_fp8' does not know {named}.* such as 'native'"):
        dispatch_attention_fn(q, k, k, backend=AttentionBackendName(NAME), **asked)


def test_eight_bits_say_why_they_do_not_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("8-bit attention needs compute capability 9.0 or more (Hopper), not 8.9")

    monkeypatch.setattr("bittern.ops.attention_8bit", refuse)
    assert attention.refusal(NAME, "cpu") == "8-bit attention needs compute capability 9.0 or more (Hopper), not 8.9"


def test_what_diffusers_sets_for_all_models_is_told_of_each() -> None:
    first, second = FAMILIES["flux"].build(), FAMILIES["flux"].build()
    with attention_backend("native"):
        first.set_attention_backend("_native_math")
        assert attention.chosen(first) == attention.chosen(second) == "_native_math"
        second.set_attention_backend("native")
        assert (attention.chosen(first), attention.chosen(second)) == ("_native_math", "native")
    assert attention.active() == "native"


def test_other_models_keep_theirs_and_an_error_takes_nothing_along() -> None:
    before = _AttentionBackendRegistry.get_active_backend()[0]
    model = FAMILIES["flux"].build()
    model.set_attention_backend("_native_flash")
    with attention_backend(before.value), pytest.raises(RuntimeError), attention.using(model, "_native_math"):
        raise RuntimeError
    assert attention.chosen(model) == "_native_flash"
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.parametrize(
    ("family", "name", "parts"),
    [
        ("flux", "_native_cuddn", ["'_native_cuddn'", "did you mean '_native_cudnn'"]),
        ("flux", "flash", ["'flash' does not run on cpu", "flash-attn", "usable here: ", "native"]),
        ("pixart", "_native_math", ["PixArtTransformer2DModel", "calls torch directly", "leave --attention out"]),
    ],
)
def test_refusals_say_what_can_be_done(family: str, name: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as refused, attention.using(FAMILIES[family].build(), name):
        pass
    assert all(part in str(refused.value) for part in parts), refused.value
    assert attention.chosen(FAMILIES["pixart"].build()) == "torch"
