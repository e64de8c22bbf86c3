"""Fails loudly when diffusers moves what `bittern.integrations.diffusers` relies on.

Read that file's docstring first; then compare diffusers' `ModelMixin.from_pretrained` and `save_pretrained`.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, ModelMixin
from diffusers.quantizers import DiffusersAutoQuantizer, auto
from diffusers.quantizers.base import DiffusersQuantizer

import bittern
from bittern.errors import BitternError
from bittern.integrations import diffusers as integration
from bittern.integrations import nunchaku_lite
from bittern.integrations.diffusers import HOOKS, LITE_HOOKS, BitternQuantizer, Method, QuantizationConfig


def test_the_registry_is_where_it_was() -> None:
    assert auto.AUTO_QUANTIZER_MAPPING["bittern"] is BitternQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bittern"] is QuantizationConfig
    config = DiffusersAutoQuantizer.from_dict({"quant_method": "bittern", "recipe": "int4"})
    assert isinstance(config, QuantizationConfig)
    assert config.quant_method is Method.BITTERN
    assert isinstance(DiffusersAutoQuantizer.from_config(config, pre_quantized=False), BitternQuantizer)


def test_lite_folders_go_through_the_registry() -> None:
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[nunchaku_lite.METHOD] is nunchaku_lite.LiteConfig
    # It is theirs that decides whether it can, and it says so before anything is loaded.
    assert "validate_environment" in vars(auto.AUTO_QUANTIZER_MAPPING[nunchaku_lite.METHOD])


def test_attention_backends_are_where_they_were() -> None:
    """What `bittern.integrations.attention_backend` relies on."""
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    from bittern.integrations import attention_backend

    member: Any = AttentionBackendName(attention_backend.NAME)
    assert isinstance(member, AttentionBackendName) and member in list(AttentionBackendName)
    assert member is AttentionBackendName.__members__[attention_backend.MEMBER]
    assert member is getattr(AttentionBackendName, attention_backend.MEMBER)
    assert (member.name, member.value, member) == (attention_backend.MEMBER, attention_backend.NAME, "bittern_fp8")
    # It is like those of diffusers in every attribute.
    assert set(vars(member)) == set(vars(AttentionBackendName.NATIVE))
    assert copy.deepcopy(member) is member is pickle.loads(pickle.dumps(member))
    assert _AttentionBackendRegistry._backends[member] is attention_backend.attend
    theirs, ours = (
        list(inspect.signature(function).parameters)
        for function in (_AttentionBackendRegistry._backends[AttentionBackendName.NATIVE], attention_backend.attend)
    )
    assert theirs == ours
    count = len(AttentionBackendName)
    attention_backend.register()
    assert len(AttentionBackendName) == count == len(_AttentionBackendRegistry._backends)
    # Neither does something else for names that it does not know.
    attention_dispatch._check_attention_backend_requirements(member)
    attention_dispatch._maybe_download_kernel_for_backend(member)


def test_every_override_overrides_something() -> None:
    # What is our own, and what diffusers calls.
    own = {"attach", "quantization_config", "use_keep_in_fp32_modules"}
    # An attribute that no base class has, but that diffusers asks for.
    assert '"use_keep_in_fp32_modules"' in inspect.getsource(ModelMixin.from_pretrained)
    public = {name for name in vars(BitternQuantizer) if not name.startswith("_")}
    for name in public - own:
        assert hasattr(DiffusersQuantizer, name), f"diffusers no longer has the hook {name}"
    assert public - own == (set(HOOKS) | set(LITE_HOOKS)) - {"preprocess_model", "postprocess_model"}
    abstract = {"_process_model_before_weight_loading", "_process_model_after_weight_loading"}
    assert abstract <= DiffusersQuantizer.__abstractmethods__
    parameters = list(inspect.signature(DiffusersQuantizer.get_state_dict_and_metadata).parameters)
    assert parameters == ["self", "state_dict", "safe_serialization"]


def test_the_hooks_are_called_in_the_documented_order(
    new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_tiny_random_pipeline().transformer
    bittern.quantize(model, "svdquant-fast")
    calls: list[str] = []

    def spied(name: str) -> Callable[..., Any]:
        real = getattr(BitternQuantizer, name)

        def hook(self: BitternQuantizer, *args: Any, **kwargs: Any) -> Any:
            if not calls or calls[-1] != name:
                calls.append(name)
            return real(self, *args, **kwargs)

        return hook

    for name in HOOKS:
        if callable(getattr(BitternQuantizer, name)):
            monkeypatch.setattr(BitternQuantizer, name, spied(name))
    model.save_pretrained(tmp_path)
    assert calls == ["get_state_dict_and_metadata"]
    calls.clear()
    FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    firsts = list(dict.fromkeys(calls))
    assert firsts == [
        "validate_environment",
        "maybe_update_loaded_keys",
        "preprocess_model",
        "check_if_quantized_param",
        "create_quantized_param",
        "postprocess_model",
    ]


def test_every_stored_tensor_arrives_uncast(
    new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_tiny_random_pipeline().transformer
    bittern.quantize(model, "svdquant-fast")
    model.save_pretrained(tmp_path)
    seen: dict[str, torch.dtype] = {}
    real = BitternQuantizer.create_quantized_param

    def spy(
        self: BitternQuantizer, model: Any, value: Any, name: str, device: Any, state: Any, *a: Any, **k: Any
    ) -> None:
        seen[name] = state[name].dtype
        real(self, model, value, name, device, state, *a, **k)

    monkeypatch.setattr(BitternQuantizer, "create_quantized_param", spy)
    FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert set(seen.values()) == {torch.uint8, torch.bfloat16}
    # Codes and scales of all, ups of all but the modulation, one down a group, one smooth a modulated group.
    assert len(seen) == 20 * 2 + 17 + 10 + 5


def test_moved_internals_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "HOOKS", (*HOOKS, "hook_that_moved"))
    with pytest.raises(BitternError, match="has moved hook_that_moved: install a newer bittern or an older diffusers"):
        integration.register()
    monkeypatch.undo()
    monkeypatch.delattr(auto, "AUTO_QUANTIZER_MAPPING")
    with pytest.raises(BitternError, match="has moved AUTO_QUANTIZER_MAPPING"):
        integration.register()
    monkeypatch.undo()
    integration.register()
