"""Bittern as a quantization method of diffusers: `from_pretrained` and `save_pretrained` of few-bit models.

Diffusers' `ModelMixin.from_pretrained` calls a quantizer's hooks in this order: `validate_environment`,
`maybe_update_loaded_keys`, `preprocess_model` (modules on meta), then `check_if_quantized_param` and
`create_quantized_param` for every tensor of the files, and `postprocess_model`. This file is the only one that
knows; `tests/integrations/test_canary.py` fails when diffusers moves any of it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from bittern.errors import BitternError, UserError
from bittern.integrations import nunchaku_lite

# Everything of our own that is heavy is imported where it is used: registering must cost nothing.
if TYPE_CHECKING:
    from bittern.architectures import Job, Plan
    from bittern.checkpoints import CheckpointConfig
    from bittern.checkpoints.nunchaku import Incoming
    from bittern.recipes import Recipe

OLDEST_DIFFUSERS = (0, 40)
HOOKS = (
    "validate_environment",
    "maybe_update_loaded_keys",
    "preprocess_model",
    "check_if_quantized_param",
    "create_quantized_param",
    "postprocess_model",
    "get_state_dict_and_metadata",
    "get_cuda_warm_up_factor",
    "is_serializable",
    "is_trainable",
    "is_compileable",
    "supports_parallel_loading",
)
"""What we override, and diffusers must therefore call."""
LITE_HOOKS = ("maybe_update_loaded_keys", "maybe_update_state_dict", "update_torch_dtype")
"""What Nunchaku Lite folders need; a diffusers without one of them reads ours all the same."""


class Method(StrEnum):
    """Our `quant_method`; diffusers reads its `.value`, so a plain string would not do."""

    BITTERN = "bittern"


class QuantizationConfig(QuantizationConfigMixin):
    """What `quantization_config=` takes: a recipe to apply while loading, or a checkpoint's own description.

    >>> FluxTransformer2DModel.from_pretrained(repo, quantization_config=QuantizationConfig("svdquant-fast"))

    Args:
        recipe: The name of a recipe, the path of a YAML file, or a `Recipe`.
        seed: The solver's seed.

    Raises:
        UserError: for an unknown recipe.
    """

    def __init__(self, recipe: str | Path | Recipe | Mapping[str, Any], *, seed: int = 0) -> None:
        from bittern import recipes

        self.quant_method = Method.BITTERN
        self.seed = seed
        self.checkpoint: CheckpointConfig | None = None
        self.lite: Mapping[str, Any] | None = None
        if isinstance(recipe, Mapping):
            self.recipe = recipes.validated(recipes.Recipe, recipe, "quantization_config.recipe")
        else:
            self.recipe = recipe if isinstance(recipe, recipes.Recipe) else recipes.load(recipe)

    @classmethod
    def of_checkpoint(cls, checkpoint: CheckpointConfig) -> QuantizationConfig:
        """The config of a model that is quantized."""
        config = cls.__new__(cls)
        config.quant_method, config.seed, config.checkpoint = Method.BITTERN, checkpoint.seed, checkpoint
        config.recipe, config.lite = checkpoint.recipe, None
        return config

    @classmethod
    def of_lite(cls, quantization: Mapping[str, Any]) -> QuantizationConfig:
        """The config of a Nunchaku Lite folder: its own, until the model is there.

        Raises:
            UserError: for a description that contradicts itself.
        """
        from bittern.checkpoints.nunchaku import lite

        lite(quantization, "config.json")
        config = cls.__new__(cls)
        config.quant_method, config.seed, config.checkpoint = Method.BITTERN, 0, None
        config.recipe, config.lite = {"name": "nunchaku-lite"}, dict(quantization)
        return config

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> QuantizationConfig:
        """From `config.json`, or from the dictionary a user gives in place of a `QuantizationConfig`.

        Raises:
            UserError: for a newer format, an unknown key, or anything that contradicts itself.
        """
        from bittern.checkpoints import CheckpointConfig

        if set(config_dict) <= {"quant_method", "recipe", "seed"} and "recipe" in config_dict:
            return cls(config_dict["recipe"], seed=config_dict.get("seed", 0))
        return cls.of_checkpoint(CheckpointConfig.parse(config_dict))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; of a quantized model everything `config.json` needs."""
        if self.checkpoint is not None:
            return self.checkpoint.dump()
        if self.lite is not None:
            return dict(self.lite)
        return {"quant_method": Method.BITTERN.value, "recipe": self.recipe.dump(), "seed": self.seed}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing in it is a default that a later version might change."""
        return self.to_dict()

    def __repr__(self) -> str:
        if self.lite is not None:
            return "QuantizationConfig(a Nunchaku Lite folder)"
        if self.checkpoint is None:
            return f"QuantizationConfig(recipe={self.recipe.name!r}, seed={self.seed})"
        return f"QuantizationConfig({self.recipe.get('name')!r}, {len(self.checkpoint.targets)} targets)"


class BitternQuantizer(DiffusersQuantizer):
    """Loads and saves few-bit models; quantizes 16-bit ones while they are loaded."""

    quantization_config: QuantizationConfig

    # Without it diffusers would load the layers that a family keeps in float32 (Wan's norms) in 16 bits.
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[Path] = []
        self._keys: list[str] = []
        self._incoming: Incoming | None = None
        self._unread: Incoming | None = None
        self._plan: Plan | None = None
        self._waiting: dict[str, Job] = {}
        self._magnitudes: dict[str, Tensor] = {}
        self._errors: dict[str, float] = {}
        self._hidden: Any = None
        self._model: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_hidden": None}

    def attach(self, model: Any) -> None:
        """Makes diffusers see a model that was quantized in memory as one that was loaded."""
        model.is_quantized = True
        model.quantization_method = Method.BITTERN
        model.hf_quantizer = self
        model.register_to_config(quantization_config=self.quantization_config)
        # Before peft merges into the 16-bit layers, which come first.
        model.fuse_lora = _refuse_fusing
        self._model = weakref.ref(model)

    # ---- loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what the layers cannot do."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UserError("device_map puts few-bit layers on disk: expected a GPU or the CPU; give more memory")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Called before any module is touched: remembers the files, to validate them."""
        self._files, self._keys = [Path(file) for file in checkpoint_files], loaded_keys
        return loaded_keys

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """What the model is loaded in; a Nunchaku Lite folder says it if the user does not."""
        if torch_dtype is None and self.quantization_config.lite is not None:
            return nunchaku_lite.compute_dtype(self.quantization_config.lite)
        return torch_dtype

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Called for every file: that of a Nunchaku Lite folder is converted, all at once with the first."""
        if self._incoming is None:
            return state_dict
        found, self._unread = self._unread, None
        return nunchaku_lite.tensors(found) if found is not None else {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from bittern import architectures

        if self.pre_quantized:
            self._build(model)
        else:
            self._prepare(model)
        # Before diffusers hooks the blocks to move tensors between devices.
        architectures.install(model)

    def _build(self, model: nn.Module) -> None:
        """Empty few-bit layers in the model on meta, once the files are known to fill them."""
        from bittern.checkpoints import check_headers, check_values, read_headers
        from bittern.layers import swap
        from bittern.quantization import check_targets, empty_layers, other_shapes

        if self.quantization_config.lite is not None:
            found = nunchaku_lite.prepare(model, self.quantization_config.lite, self._files)
            self.quantization_config = QuantizationConfig.of_checkpoint(found.config)
            self._incoming = self._unread = found
            # Diffusers looks for the names that the files have.
            self._keys[:] = found.specs()
        config = self._checkpoint()
        check_targets(model, config)
        if self._incoming is None:
            headers = read_headers(self._files)
            check_headers(headers, config, other_shapes(model, config))
            check_values(headers, config)
        layers = empty_layers(model, config, config.targets)
        for path, layer in layers.items():
            swap(model, path, layer)

        # No file holds the logical weights, so diffusers must not wait for them.
        def hide(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
            for path in config.targets:
                state.pop(f"{prefix}{path}.weight", None)

        self._hidden = model.register_state_dict_post_hook(hide)
        # Diffusers asks every key's size here, and a group's members have their tensors in the first one's.
        model.get_buffer = model.state_dict().__getitem__

    def _prepare(self, model: nn.Module) -> None:
        """The plan of a model that is to be quantized while its weights arrive."""
        from bittern.architectures import modulated_magnitudes, plan
        from bittern.checkpoints import read_headers, read_tensor
        from bittern.quantization import check_seed, refuse_training

        check_seed(self.quantization_config.seed)
        refuse_training(self.quantization_config.recipe)
        self._plan = plan(model, self.quantization_config.recipe)
        headers = functools.cache(lambda: read_headers(self._files))
        # The modulation may lie behind the layers it smooths, in the files' order.
        self._magnitudes = modulated_magnitudes(
            self._plan, model, lambda name: read_tensor(headers(), name).to(model.get_parameter(name).dtype)
        )
        self._waiting = {path: job for job in self._plan.jobs for path in job.paths}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether `create_quantized_param` takes this tensor."""
        path, _, leaf = param_name.rpartition(".")
        if self.pre_quantized:
            return leaf != "bias" and path in self._checkpoint().targets
        return leaf == "weight" and path in self._waiting

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Puts one tensor of a few-bit layer in its place, or solves the layers whose weights are complete."""
        path, _, leaf = param_name.rpartition(".")
        if self.pre_quantized:
            from bittern.checkpoints import from_disk

            # `param_value` was cast to the model's dtype; scales and branch keep the one of the file.
            stored = from_disk(state_dict[param_name], leaf, path, self._checkpoint())
            model.get_submodule(path).load(leaf, stored.to(target_device))
        else:
            self._receive(model, path, param_value.to(target_device))

    def _receive(self, model: nn.Module, path: str, weight: Tensor) -> None:
        from bittern.layers import swap
        from bittern.quantization import check_weight, solve_job

        check_weight(path, weight)
        model.get_submodule(path).weight = nn.Parameter(weight, requires_grad=False)
        job = self._waiting.pop(path)
        if any(mate in self._waiting for mate in job.paths):
            return
        layers, errors, _ = solve_job(
            job,
            [model.get_submodule(mate) for mate in job.paths],
            self.quantization_config.seed,
            magnitudes=self._magnitudes.get(job.paths[0]),
        )
        for mate, layer, error in zip(job.paths, layers, errors, strict=True):
            swap(model, mate, layer)
            self._errors[mate] = error

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from bittern.quantization import checkpoint_config

        if self._hidden is not None:
            self._hidden.remove()
            self._hidden = None
            del model.get_buffer
        if self._plan is not None:
            if self._waiting:
                missing = next(iter(self._waiting))
                raise UserError(f"tensor '{missing}.weight' is missing from the checkpoint: fetch it again")
            config = self.quantization_config
            checkpoint = checkpoint_config(self._plan, config.recipe, config.seed, self._errors)
            self.quantization_config = QuantizationConfig.of_checkpoint(checkpoint)
            self.pre_quantized, self._plan = True, None
        self.attach(model)

    def get_cuda_warm_up_factor(self) -> int:
        """Diffusers reserves elements / factor values of the model's 16-bit dtype before it loads."""
        # Codes are one element a byte; a 16-bit model that we quantize shrinks to about a quarter.
        return 2 if self.pre_quantized else 4

    @property
    def supports_parallel_loading(self) -> bool:
        """Threads would fill the shared buffer of a group at the same time."""
        return False

    # ---- saving

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors to write."""
        from bittern.checkpoints import to_disk

        if not safe_serialization:
            raise UserError("safe_serialization=False: bittern writes safetensors only; leave it out")
        return to_disk(state_dict, self._checkpoint()), {}

    @property
    def is_serializable(self) -> bool:
        """True. Diffusers asks before it writes `config.json`: the moment to forget where the model came from.

        Diffusers would write that path as `_name_or_path`, and equal models would differ in their bytes.
        """
        model = self._model() if self._model else None
        if model is not None and "_name_or_path" in model.config:
            model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "_name_or_path"})
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the few-bit weights themselves can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Every operation has a fake implementation."""
        return True

    def _checkpoint(self) -> CheckpointConfig:
        checkpoint = self.quantization_config.checkpoint
        if checkpoint is None:
            raise BitternError("the model is not quantized yet")
        return checkpoint


def _refuse_fusing(*args: Any, **kwargs: Any) -> NoReturn:
    from bittern.layers.facade import refuse_writing

    refuse_writing()


def register() -> None:
    """Adds bittern to diffusers' registry of quantization methods. Doing it again changes nothing.

    Raises:
        BitternError: if this diffusers is too old, or has moved what we rely on.
    """
    import diffusers
    from diffusers.quantizers import auto

    found = f"diffusers {diffusers.__version__}"
    if tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < OLDEST_DIFFUSERS:
        oldest = ".".join(map(str, OLDEST_DIFFUSERS))
        raise BitternError(f"{found} is too old for bittern: pip install 'diffusers>={oldest}'")
    missing = [hook for hook in HOOKS if not hasattr(DiffusersQuantizer, hook)]
    missing += [
        name for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING") if not hasattr(auto, name)
    ]
    if missing:
        raise BitternError(f"{found} has moved {', '.join(missing)}: install a newer bittern or an older diffusers")
    auto.AUTO_QUANTIZER_MAPPING[Method.BITTERN.value] = BitternQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.BITTERN.value] = QuantizationConfig
    if all(hasattr(DiffusersQuantizer, hook) for hook in LITE_HOOKS):
        nunchaku_lite.register()


register()
