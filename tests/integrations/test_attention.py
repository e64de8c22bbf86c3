"""Attention backends by name: what runs here, what is refused, and that a model has its own again afterwards."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

import bittern
from bittern.errors import UserError
from bittern.integrations import attention
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


def test_other_models_keep_theirs_and_an_error_takes_nothing_along() -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

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
