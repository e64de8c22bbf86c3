"""Few-bit models with fused adapters as folders: `save_pretrained` refuses, lest one is published by accident."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bittern.errors import UserError
from bittern.integrations.loras import Fused, Target, denoiser, forget, fused_record, other_components, remember
from bittern.integrations.peft_layers import adapters_of, peft_layers
from bittern.layers import quant_layers
from bittern.outputs import new_folder

if TYPE_CHECKING:
    from bittern.checkpoints import CheckpointConfig


def save_fused(pipe: Target, folder: str | Path, *, force: bool = False) -> None:
    """Writes a model with its fused adapters in it, as an ordinary few-bit folder: all of it, or nothing.

    What is written has wider branches and no memory of the adapters; the model itself stays as it is, and can be
    unfused.

    Args:
        pipe: What was given to `fuse_loras`.
        folder: Where to write.
        force: Whether to replace a model that is there.

    Raises:
        UserError: if nothing is fused, another component wears adapters, or as `new_folder` does.
    """
    model = denoiser(pipe)
    record = fused_record(model, "pipe.save_pretrained(folder) writes it")
    for name, other in other_components(pipe, model):
        if worn := sorted({adapter for _, layer in peft_layers(other) for adapter in adapters_of(layer)}):
            raise UserError(
                f"{name} wears adapter {worn[0]!r}, which is not fused and would be lost: fuse what its LoRA does to "
                f"{name} with pipe.fuse_lora(components=[{name!r}]) and unload it, or save the LoRA by itself"
            )
    with new_folder(folder, force=force) as fresh, _as_few_bit(model, record):
        pipe.save_pretrained(fresh)


@contextmanager
def _as_few_bit(model: Any, record: Fused) -> Iterator[None]:
    """Within the block a model with fused adapters is a few-bit model that happens to have such branches."""
    quantizer = model.hf_quantizer
    before = quantizer.quantization_config
    config = type(before).of_checkpoint(_widened(before.checkpoint, model, record))
    forget(model)
    try:
        quantizer.quantization_config = config
        model.register_to_config(quantization_config=config)
        yield
    finally:
        quantizer.quantization_config = before
        model.register_to_config(quantization_config=before)
        remember(model, record)


def _widened(config: CheckpointConfig, model: nn.Module, record: Fused) -> CheckpointConfig:
    """A checkpoint's config with the ranks that the layers have now."""
    from bittern.checkpoints import CheckpointConfig

    dumped = config.dump()
    schemes = {path: layer.scheme.to_dict() for path, layer in quant_layers(model).items()}
    unique = list({repr(scheme): scheme for scheme in schemes.values()}.values())
    targets = {path: {**target, "scheme": unique.index(schemes[path])} for path, target in dumped["targets"].items()}
    recipe = {**dumped["recipe"], "fused_loras": record.strengths}
    return CheckpointConfig.parse({**dumped, "schemes": unique, "targets": targets, "recipe": recipe})
