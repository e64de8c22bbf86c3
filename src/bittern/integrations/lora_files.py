"""LoRA files: loaded through diffusers, once it is known that all of a file fits the pipeline.

Diffusers converts the names of many trainers, loads what it then finds in the model and warns about the rest, or about
everything. Here a file that does not fit as a whole is refused before the pipeline is touched, with the names that
match nothing and the model that the file seems to be for.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern.checkpoints import read_headers, read_tensor
from bittern.errors import UserError
from bittern.integrations.peft_layers import delete_adapters, rolled_back
from bittern.layers import FewBitLayer
from bittern.quantization.report import COMPONENTS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_DEFAULT_NAME = "pytorch_lora_weights.safetensors"

# In this order: the first whose pattern is in any of a file's names.
_FAMILIES = (
    (r"double_stream_modulation|single_stream_modulation", "FLUX.2"),
    (r"single_transformer_blocks|single_blocks|double_blocks", "FLUX.1 or FLUX.2"),
    (r"joint_blocks|ff_context", "Stable Diffusion 3"),
    (r"img_mlp|txt_mlp", "Qwen-Image"),
    (r"adaln_single|caption_projection", "PixArt or SANA"),
    (r"cap_embedder|context_refiner|layers[._]\d+[._]attention[._]to_q", "Z-Image"),
    (r"blocks[._]\d+[._](self|cross)_attn|blocks[._]\d+[._]attn2[._].*ffn", "Wan"),
    (r"lora_te2_|text_encoder_2", "Stable Diffusion XL"),
    (r"down_blocks|up_blocks|input_blocks|output_blocks|mid_block", "Stable Diffusion 1, 2 or XL"),
    (r"transformer_blocks[._]\d+[._]attn2", "LTX-Video, PixArt or SANA"),
)

# Of an UNet's cross-attention: the width of its text.
_TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}

_PEFTS_OWN = "base_model.model."

_TAKE_LOKR = ("Flux2LoraLoaderMixin", "ZImageLoraLoaderMixin")
"""Whose LoKr files diffusers reads."""

_FACTOR = re.compile(
    r"^(?P<path>.+?)\.(?:lora_(?P<ab>[AB])\.(?P<leaf>weight|bias)|lora_magnitude_vector(?:\.weight)?)$"
)


@dataclass(frozen=True)
class Lora:
    """A LoRA and how strongly it counts.

    Attributes:
        file: A safetensors file, the folder that diffusers saved one in, or an embedded LoRA's name.
        strength: Of either sign; 0 loads it and turns it off.
    """

    file: str
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str, default: float = 1.0) -> Lora:
        """From FILE, which has the default strength, or FILE:STRENGTH.

        Raises:
            UserError: for a strength that is not finite.
        """
        file, colon, tail = text.rpartition(":")
        try:
            strength = float(tail) if colon else default
        except ValueError:
            # A colon that belongs to the name.
            return cls(text, default)
        if not math.isfinite(strength):
            raise UserError(f"LoRA {text!r} has the strength {tail}: expected a finite number")
        return cls(file if colon else text, strength)

    def __str__(self) -> str:
        return f"{self.file}:{self.strength:g}"


def load_files(pipe: DiffusionPipeline, loras: Sequence[tuple[Path, float]]) -> list[str]:
    """Loads LoRA files into a pipeline, few-bit or not, and makes them the active adapters.

    Args:
        pipe: The pipeline.
        loras: Files, or folders that diffusers saved one in, and how strongly they count.

    Returns:
        The adapters' names, made of the files'.

    Raises:
        UserError: for a file that is damaged, or does not fit the pipeline as a whole; nothing is loaded then.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{type(pipe).__name__} takes no LoRAs in this version of diffusers: leave them out")
    files = [_in_folder(file) for file, _ in loras]
    for file in files:
        check_lora(pipe, file)
    names: list[str] = []
    taken = {name for adapters in _any(pipe).get_list_adapters().values() for name in adapters}
    models = [part for part in _parts(pipe).values() if isinstance(part, nn.Module)]
    with rolled_back(models) as undo:
        for model in models:
            undo.callback(delete_adapters, model, names)
        for file in files:
            names.append(_name(file, taken))
            taken.add(names[-1])
            _load(pipe, file, names[-1])
        if names:
            _any(pipe).set_adapters(names, [strength for _, strength in loras])
    return names


def _load(pipe: DiffusionPipeline, file: Path, name: str) -> None:
    try:
        with _quiet():
            _any(pipe).load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    # Whatever diffusers and peft stumble over that the checks below have not seen.
    except Exception as error:
        raise UserError(
            f"LoRA {str(file)!r} cannot be loaded by diffusers into this {type(pipe).__name__} ({_said(error)}); "
            "nothing was loaded"
        ) from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _parts(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The components that LoRAs of this pipeline are for."""
    return {name: getattr(pipe, name, None) for name in _any(pipe)._lora_loadable_modules}


def check_lora(pipe: DiffusionPipeline, file: Path) -> None:
    """Refuses a LoRA file that does not fit a pipeline as a whole; loads nothing.

    Raises:
        UserError: for a file that is damaged or no LoRA, names that match no layer, shapes, ranks and settings that do
            not fit, numbers that are not finite, and scales that diffusers would leave out.
    """
    headers = read_headers([file])
    shapes = {name: spec.shape for name, (_, spec) in headers.items()}
    if any("dora_scale" in name for name in shapes):
        raise UserError(
            f"LoRA {str(file)!r} is a DoRA in a form whose scales diffusers leaves out: convert it to peft's"
        )
    _check_kind(pipe, file, shapes)
    _check_prefix(pipe, file, shapes)
    settings = _settings(file)
    for name in shapes:
        if not name.endswith(".alpha"):
            continue
        if math.prod(shapes[name]) != 1:
            raise UserError(f"LoRA {str(file)!r} has {list(shapes[name])} values for {name!r}: expected one")
        alpha = float(read_tensor(headers, name))
        # Diffusers halves until a product is positive, which it never is.
        if not 0 <= alpha < math.inf:
            raise UserError(
                f"LoRA {str(file)!r} has {alpha} for {name!r}: expected a finite number, 0 or more; fetch it again"
            )
    try:
        with _quiet():
            state = _converted(pipe, file)
    # Whatever the converters of diffusers stumble over.
    except Exception as error:
        raise UserError(
            f"LoRA {str(file)!r} is none that diffusers can read for {type(pipe).__name__} ({_said(error)}): "
            f"{_for(shapes)}"
        ) from error
    parts = _parts(pipe)
    unmatched = [key for key in state if _layer(parts, key) is None]
    if unmatched or not state:
        example = f", such as {unmatched[0]!r}" if unmatched else ""
        raise UserError(
            f"LoRA {str(file)!r}: {len(unmatched)} of {len(state)} tensors match no layer of this {type(pipe).__name__}"
            f"{example}: {_for(shapes)}"
        )
    ranks: dict[str, dict[str, int]] = {}
    for key, tensor in state.items():
        _check_numbers(file, key, tensor)
        factor = _FACTOR.match(key)
        if factor is None or factor["leaf"] != "weight":
            continue
        layer = _layer(parts, key)
        assert layer is not None
        _check_shape(file, key, tensor, layer, is_down=factor["ab"] == "A", shapes=shapes, widens=_widens(pipe))
        ranks.setdefault(factor["path"], {})[factor["ab"]] = tensor.shape[0 if factor["ab"] == "A" else 1]
    for path, found in ranks.items():
        if found.get("A") != found.get("B") or not found.get("A"):
            has = " and ".join(f"lora_{ab} of rank {rank}" for ab, rank in sorted(found.items()))
            raise UserError(
                f"LoRA {str(file)!r} has {has} for {path!r}: expected two factors of one rank; fetch it again"
            )
    if settings is not None:
        _check_settings(file, settings, {path: found["A"] for path, found in ranks.items()})


def _check_kind(pipe: DiffusionPipeline, file: Path, names: Iterable[str]) -> None:
    """Refuses adapters that diffusers does not read from files; peft may compute them nevertheless."""
    takes_lokr = any(base.__name__ in _TAKE_LOKR for base in type(pipe).__mro__)
    for name in names:
        kind = "LoHa" if ".hada_" in name else "LoKr" if ".lokr_" in name and not takes_lokr else None
        if kind:
            raise UserError(
                f"LoRA {str(file)!r} is a {kind}, whose files diffusers does not read for {type(pipe).__name__}: give "
                f"a LoRA, or wear it through peft, with add_adapter({kind}Config(...)) of the model"
            )


def _check_prefix(pipe: DiffusionPipeline, file: Path, names: Iterable[str]) -> None:
    """Refuses the names that peft itself writes, of which diffusers makes others that are in no file."""
    parts = _parts(pipe)
    part = next((name for name in COMPONENTS if name in parts), "")
    for name in names:
        bare = name.removeprefix(_PEFTS_OWN)
        if _FACTOR.match(bare) and bare.partition(".")[0] not in parts and _layer(parts, f"{part}.{bare}") is not None:
            raise UserError(
                f"LoRA {str(file)!r} has names without the model's, such as {name!r}: expected '{part}.{bare}'; rename "
                "its tensors"
            )


def _check_numbers(file: Path, key: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise UserError(f"LoRA {str(file)!r} has {tensor.dtype} for {key!r}: expected a float type")
    bad = int((~torch.isfinite(tensor.float())).sum())
    if bad:
        raise UserError(
            f"LoRA {str(file)!r}: {bad} of {tensor.numel()} values of {key!r} are NaN or infinite; fetch it again"
        )


def _settings(file: Path) -> dict[str, Any] | None:
    """What a file says of its adapter in peft's words."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        text = (handle.metadata() or {}).get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise UserError(f"lora_adapter_metadata of LoRA {str(file)!r} is no JSON mapping; fetch it again")
    return said


def _check_settings(file: Path, said: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """Refuses settings that peft does not have, and ranks that are not those of the factors."""
    from peft import LoraConfig

    where = f"lora_adapter_metadata of LoRA {str(file)!r}"
    known = {setting.name for setting in fields(LoraConfig)}
    by_part: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        part, _, setting = str(key).partition(".")
        if setting not in known:
            raise UserError(f"{where} has {key!r}, which is no setting of peft's: expected names as 'transformer.r'")
        by_part.setdefault(part, {})[setting] = value
    for path, rank in ranks.items():
        part = path.partition(".")[0]
        settings = by_part.get(part, {})
        pattern = settings.get("rank_pattern") or {}
        allowed = [settings.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
        if rank not in allowed:
            raise UserError(
                f"{where} has {part}.r {settings.get('r')!r} and {path!r} is of rank {rank}: fetch it again"
            )


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The model family that a LoRA's names, and if they say too little its shapes, point to; None if they do not."""
    matching = (family for pattern, family in _FAMILIES if any(re.search(pattern, name) for name in shapes))
    family = next(matching, None)
    if family is not None and family.startswith("Stable Diffusion 1"):
        widths = {
            shape[1]
            for name, shape in shapes.items()
            if re.search(r"attn2.*to_k.*(down|lora_A)", name) and len(shape) > 1
        }
        family = next((_TEXT_WIDTHS[width] for width in widths if width in _TEXT_WIDTHS), family)
    return family


def _for(shapes: Mapping[str, tuple[int, ...]]) -> str:
    family = looks_like(shapes)
    if family:
        return f"it looks like a LoRA for {family}; give one that was trained for this model"
    return "it looks like no LoRA of a model that bittern knows; give one that was trained for this model"


def _in_folder(file: Path) -> Path:
    if not file.is_dir():
        return file
    if not (file / _DEFAULT_NAME).is_file():
        raise UserError(f"folder {str(file)!r} holds no LoRA: expected {_DEFAULT_NAME} in it; name the file")
    return file / _DEFAULT_NAME


def _name(file: Path, taken: set[str]) -> str:
    """An adapter's name: peft makes it a part of a module's path, which allows no dots."""
    stem = file.parent.name if file.name == _DEFAULT_NAME else file.stem
    name = re.sub(r"\W+", "_", stem).strip("_") or "lora"
    return next(candidate for candidate in (name, *(f"{name}_{i}" for i in range(2, 10**6))) if candidate not in taken)


def _converted(pipe: DiffusionPipeline, file: Path) -> dict[str, Tensor]:
    """The file's tensors by the names that diffusers gives them."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    unet = getattr(pipe, "unet", None)
    options = {"unet_config": unet.config} if unet is not None else {}
    found = _any(pipe).lora_state_dict(str(file.parent), weight_name=file.name, **options)
    state: dict[str, Tensor] = found[0] if isinstance(found, tuple) else found
    by_part: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        part, dot, rest = key.partition(".")
        if key.endswith(".alpha"):
            continue
        by_part.setdefault(part + dot, {})[rest] = tensor
    converted: dict[str, Tensor] = {}
    for part, tensors in by_part.items():
        if not any("lora_A" in name for name in tensors):
            convert = convert_state_dict_to_peft if part.startswith("text_encoder") else convert_unet_state_dict_to_peft
            tensors = convert(tensors)
        converted.update({part + name: tensor for name, tensor in tensors.items()})
    return converted


def _layer(parts: Mapping[str, Any], key: str) -> nn.Module | None:
    """The layer that a tensor is for; of a tensor that is no factor, such as a norm's, the module that has it."""
    part, _, rest = key.partition(".")
    model = parts.get(part)
    if not isinstance(model, nn.Module):
        return None
    factor = _FACTOR.match(rest)
    path = factor["path"] if factor else rest.split(".lokr_")[0] if ".lokr_" in rest else rest.rpartition(".")[0]
    # Text encoders have lost a level of their names since the files were made.
    for candidate in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        return _any(module).base_layer if hasattr(module, "base_layer") else module
    return None


def _check_shape(
    file: Path,
    key: str,
    factor: Tensor,
    layer: nn.Module,
    *,
    is_down: bool,
    shapes: Mapping[str, tuple[int, ...]],
    widens: bool,
) -> None:
    shape = tuple(_any(layer).weight.shape)
    taps = shape[2:] if is_down else (1,) * len(shape[2:])
    if factor.shape[2:] != taps or factor.ndim != len(shape):
        sizes = ["rank", *shape[1:]] if is_down else [shape[0], "rank", *taps]
        expected = ", ".join(map(str, sizes))
        raise UserError(f"LoRA {str(file)!r}: {key!r} has shape {list(factor.shape)}: expected [{expected}]")
    has, wants = (factor.shape[1], shape[1]) if is_down else (factor.shape[0], shape[0])
    # FLUX: a LoRA may leave inputs out, and those of control models bring some more to the first layer.
    if has == wants or (widens and is_down and (has < wants or not isinstance(layer, FewBitLayer))):
        return
    what = "inputs" if is_down else "outputs"
    raise UserError(
        f"LoRA {str(file)!r}: {key!r} is for {has} {what} and the layer has {wants}: the file is for another size of "
        f"model; {_for(shapes)}"
    )


def _widens(pipe: DiffusionPipeline) -> bool:
    return hasattr(pipe, "_maybe_expand_lora_state_dict")


@contextmanager
def _quiet() -> Iterator[None]:
    """Diffusers warns of parts that a LoRA does not have, transformers of weights that are not in it."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _any(value: object) -> Any:
    return value
