"""Our 8-bit attention among diffusers' attention backends, by a name like any other.

Diffusers keeps its backends in a registry whose keys are the members of an enumeration, with no entry point for those
of others. So we add a member, and a function to the registry. After that `model.set_attention_backend(NAME)` and the
context `attention_backend(NAME)` know it, for models of 16 bits and of few. This file is the only one that knows;
`tests/integrations/test_canary.py` fails when diffusers moves any of it, and until then a diffusers without these
registries is one without our backend: its import must not fail.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_dispatch

from bittern.errors import UserError

NAME = "bittern_fp8"
MEMBER = "BITTERN_FP8"


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """Attention of [b, l, h, d] in 8 bits, with the arguments of diffusers' backends.

    Raises:
        UserError: for anything but attention of all queries to all keys, as diffusers' flash and sage backends do; and
            as `bittern.ops.attention_8bit`.
    """
    asked = {
        "a mask": attn_mask is not None,
        "dropout": dropout_p > 0.0,
        "a causal order": is_causal,
        "queries that share keys": enable_gqa and query.shape[2] != key.shape[2],
        "log-sums (return_lse)": return_lse,
        "context parallelism": _parallel_config is not None,
    }
    unknown = [name for name, wanted in asked.items() if wanted]
    if unknown:
        raise UserError(
            f"attention {NAME!r} does not know {' and '.join(unknown)}, which this model asks for: "
            "choose another, such as 'native'"
        )
    from bittern.ops import attention_8bit

    return attention_8bit(query, key, value, scale)


def register() -> None:
    """Adds the backend, once."""
    names: Any = getattr(attention_dispatch, "AttentionBackendName", None)
    registry: Any = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    if names is None or not hasattr(registry, "register") or NAME in names._value2member_map_:
        return
    # What the enumeration itself does for each of its members.
    member = str.__new__(names, NAME)
    member._name_, member._value_ = MEMBER, NAME
    member.__objclass__, member._sort_order_ = names, len(names._member_names_)
    type.__setattr__(names, MEMBER, member)
    names._member_names_.append(MEMBER)
    names._member_map_[MEMBER] = names._value2member_map_[NAME] = member
    registry.register(member)(attend)


register()
