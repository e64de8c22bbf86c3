"""Models without weights, made of a diffusers class and a config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bittern.errors import UserError


def model_on_meta(class_name: str, config: Mapping[str, Any], dtype: torch.dtype, where: str) -> nn.Module:
    """A model of a diffusers class on the meta device, in the dtypes it would be loaded in.

    Args:
        class_name: The diffusers class.
        config: Its config.
        dtype: What its files hold.
        where: What a message calls the config.

    Raises:
        UserError: for a class that diffusers has not, or a config that is not the class's.
    """
    import diffusers
    from accelerate import init_empty_weights

    model_class: Any = getattr(diffusers, class_name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        # There are hundreds: a listing of them all would bury what is wrong.
        near = difflib.get_close_matches(class_name, [name for name in dir(diffusers) if name.endswith("Model")], n=1)
        mend = f"did you mean {near[0]!r}?" if near else "expected the name of one of its models"
        raise UserError(f"diffusers has no model class {class_name!r}, as {where} says: {mend}")
    try:
        with init_empty_weights():
            model = model_class.from_config(dict(config))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{where} makes no {class_name}: {error}") from None
    return _cast(model.eval(), dtype)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as diffusers loads it: what is in the files in a dtype, but for what it keeps in float32."""
    in_fp32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_floating_point() or name in module._non_persistent_buffers_set:
                    continue
                wide = in_fp32 & {*path.split("."), name}
                cast = tensor.data.to(device="meta", dtype=torch.float32 if wide else dtype)
                held[name] = nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast
    return model
