"""Which linears of a model read one tensor, found by watching a forward pass.

The pass runs on fake tensors: a second model is made from the first one's config, with shapes and no values, and so
neither weights nor memory are needed. Its inputs are made from the names of the forward's parameters and from the
config. Where that fails, nothing is known, and the reason is said.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS, FRAMES = 2, 8, 2
"""Images or videos, tokens of text and of each side of an image, and frames, in the recorded pass."""


@dataclass(frozen=True)
class Reading:
    """What linears were seen to read.

    Attributes:
        inputs: For every linear that ran, what identifies its input.
        per_image: The linears that saw rows, but no more of them than images.
    """

    inputs: Mapping[str, tuple[Any, ...]]
    per_image: frozenset[str]


def read_inputs(model: nn.Module, call: Callable[[], object], images: int) -> Reading:
    """Watches the inputs of all linears during a call of the model.

    Args:
        model: Whose linears.
        call: Runs the model.
        images: The batch size of the call.
    """
    inputs: dict[str, tuple[Any, ...]] = {}
    rows: dict[str, int] = {}
    # A tensor that is freed may lend its address to another one.
    alive: list[Tensor] = []

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(x := args[0], Tensor):
                alive.append(x)
                where = (x.untyped_storage()._cdata, x.storage_offset(), *x.shape, *x.stride(), x._version)
                # Tensors without numbers may all lie in one place.
                inputs[path] = where if x.numel() else (path,)
                rows[path] = x.numel() // max(1, x.shape[-1])

        return hook

    handles = [
        module.register_forward_pre_hook(watch(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return Reading(inputs, frozenset(path for path, count in rows.items() if 0 < count <= images))


def record(model: nn.Module) -> Reading | str:
    """What the linears of a diffusers model read, without its weights; or why that cannot be found out."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "from_config"):
        return "it has no config from which to make a second model"
    problems: list[str] = []
    for sample in _samples(model, config):
        arguments = _arguments(model, config, sample)
        if isinstance(arguments, str):
            return arguments
        try:
            return _watch_twin(model, config, arguments)
        # Whatever a foreign forward may raise, on inputs that are a guess.
        except Exception as error:
            text = " ".join(str(error).split())[:120]
            problems.append(f"a pass on inputs made up from its config failed: {type(error).__name__}: {text}")
    return problems[0] if problems else "its config does not say how many channels its latents have"


def _watch_twin(model: nn.Module, config: Mapping[str, Any], arguments: Mapping[str, Callable[[], object]]) -> Reading:
    from torch._subclasses.fake_tensor import FakeTensorMode

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # A pass that draws random numbers must leave no trace in the global state.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # It prints a trace for every pass that fails.
        stack.callback(logger.setLevel, level)
        logger.setLevel(logging.CRITICAL)
        twin = type(model).from_config(dict(config)).eval()
        made = {name: make() for name, make in arguments.items()}
        return read_inputs(twin, lambda: twin(**made), BATCH)


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these values that is a whole number."""
    return next((value for key in keys if isinstance(value := config.get(key), int)), None)


def _samples(model: nn.Module, config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Shapes that the latents may have: an image, tokens, a video, a video with its frames before the channels."""
    channels = _first(config, "in_channels", "num_channels", "latent_channels", "input_dim")
    if channels is None:
        return []
    side = _first(config, "sample_size") or 4 * TOKENS
    images, tokens = [(BATCH, channels, side, side)], [(BATCH, TOKENS**2, channels)]
    videos = [(BATCH, channels, FRAMES, side, side), (BATCH, FRAMES, channels, side, side)]
    if "3D" in type(model).__name__:
        return [*videos, *tokens, *images]
    return [*images, *tokens, *videos] if "sample_size" in config else [*tokens, *images, *videos]


def _arguments(
    model: nn.Module, config: Mapping[str, Any], sample: tuple[int, ...]
) -> dict[str, Callable[[], object]] | str:
    """A way to make each argument that the forward needs; or the name of one that is unknown."""
    text = _first(
        config,
        *("joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim", "cross_attention_dim"),
        *("context_in_dim", "encoder_hidden_size", "text_states_dim", "caption_projection_dim", "cap_feat_dim"),
    )
    pooled = _first(config, "pooled_projection_dim", "pooled_projection_size", "text_embed_2_dim")
    axes = config.get("axes_dims_rope") or config.get("axes_dim") or (0, 0, 0)
    shapes: dict[str, tuple[int, ...] | None] = {
        **dict.fromkeys(("hidden_states", "sample", "x"), sample),
        **dict.fromkeys(("timestep", "timesteps", "t", "guidance"), (BATCH,)),
        **dict.fromkeys(("encoder_hidden_states", "context"), None if text is None else (BATCH, TOKENS, text)),
        "pooled_projections": None if pooled is None else (BATCH, pooled),
        "img_ids": (TOKENS**2, len(axes)),
        "txt_ids": (TOKENS, len(axes)),
        "encoder_attention_mask": (BATCH, TOKENS),
    }
    known: dict[str, Callable[[], object]] = {name: _ones(shape) for name, shape in shapes.items() if shape is not None}
    known |= {name: lambda: TOKENS for name in ("height", "width")} | {"num_frames": lambda: 1}
    wanted = inspect.signature(type(model).forward).parameters
    made: dict[str, Callable[[], object]] = {}
    for name, parameter in list(wanted.items())[1:]:
        needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        unguided = name == "guidance" and config.get("guidance_embeds") is False
        if name in known and (needed or not (unguided or name == "encoder_attention_mask")):
            made[name] = known[name]
        elif needed:
            return f"no input is known for its parameter {name!r}"
    return made


def _ones(shape: tuple[int, ...]) -> Callable[[], object]:
    return lambda: torch.ones(shape)
