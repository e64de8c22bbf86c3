"""ImageReward [Xu et al. 2023, arXiv:2304.05977]: which picture of a prompt people would prefer.

BLIP's text encoder reads the prompt while it looks at the picture; what it makes of the first token goes through five
linear layers. The published weights go into transformers' BLIP under the names it has for them. Scores have mean 0
and deviation 1 over the pictures that people compared; higher is better.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bittern.errors import UserError
from bittern.evaluation import clip, hosted
from bittern.evaluation.published import weights
from bittern.evaluation.published.weights import Absent
from bittern.precision import exact_products

if TYPE_CHECKING:
    from PIL import Image

FILE = "ImageReward.pt"
REPO = "THUDM/ImageReward"
TOKENIZER = "bert-base-uncased"
_TOKENIZER_REPO = f"google-bert/{TOKENIZER}"
_HEAD = 64  # channels of an attention head, in both encoders
_TOKENS = 35
_MEAN, _SPREAD = 0.16717362830052426, 1.0333394966054072
# Of the five linear layers, in a sequence with layers for dropout.
_STEPS = (0, 2, 4, 6, 7)
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class ImageReward:
    """Scores pictures.

    Args:
        eye: transformers' BLIP vision encoder.
        reader: transformers' BLIP text encoder.
        layers: weight and bias of the five linear layers.
        tokenizer: BERT's.
    """

    def __init__(self, eye: Any, reader: Any, layers: Sequence[tuple[Tensor, Tensor]], tokenizer: Any) -> None:
        self._eye, self._reader, self._layers, self._tokenizer = eye, reader, layers, tokenizer
        self._side = eye.config.image_size

    @classmethod
    def load(cls, place: Path, device: str = "cpu") -> ImageReward:
        """The published weights, from a folder, from the package's own cache or the hub's.

        Raises:
            Absent: if they are not here.
            UserError: if they are damaged.
        """
        file, tokenizer = _find(place)
        return cls.of(weights.read(file), file, hosted.load(_tokenizer_class(), tokenizer, weights.OPTION), device)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], file: Path, tokenizer: Any, device: str = "cpu") -> ImageReward:
        """From the published tensors by their own names; sizes are those of the tensors.

        Raises:
            UserError: if some are missing.
        """
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        vision, text = (_below(tensors, f"blip.{part}.") for part in ("visual_encoder", "text_encoder"))
        mlp = _below(tensors, "mlp.layers.")
        try:
            kernel, places = vision["patch_embed.proj.weight"], vision["pos_embed"].shape[1] - 1
            words, positions = text["embeddings.word_embeddings.weight"], text["embeddings.position_embeddings.weight"]
            inner = text["encoder.layer.0.intermediate.dense.weight"].shape[0]
            eye = BlipVisionModel(
                BlipVisionConfig(
                    hidden_size=kernel.shape[0],
                    intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0],
                    num_hidden_layers=_count(vision, r"blocks\.(\d+)\."),
                    num_attention_heads=max(1, kernel.shape[0] // _HEAD),
                    image_size=round(places**0.5) * kernel.shape[-1],
                    patch_size=kernel.shape[-1],
                    layer_norm_eps=1e-6,
                    hidden_act="gelu",
                )
            )
            reader = BlipTextModel(
                BlipTextConfig(
                    vocab_size=words.shape[0],
                    hidden_size=words.shape[1],
                    encoder_hidden_size=kernel.shape[0],
                    intermediate_size=inner,
                    num_hidden_layers=_count(text, r"encoder\.layer\.(\d+)\."),
                    num_attention_heads=max(1, words.shape[1] // _HEAD),
                    max_position_embeddings=positions.shape[0],
                    layer_norm_eps=1e-12,
                    hidden_act="gelu",
                    bos_token_id=None, eos_token_id=None, pad_token_id=0, sep_token_id=None,
                ),
                add_pooling_layer=False,
            )  # fmt: skip
            layers = [(mlp[f"{step}.weight"].to(device), mlp[f"{step}.bias"].to(device)) for step in _STEPS]
        except KeyError as error:
            raise UserError(f"{file} lacks {error}: expected the published {FILE}; fetch it again") from error
        for model, held in ((eye, {_renamed(name): value for name, value in vision.items()}), (reader, text)):
            missing = [name for name in model.state_dict() if name not in held]
            if missing:
                raise UserError(f"{file} lacks {len(missing)} tensors such as {missing[0]}: fetch it again")
            model.load_state_dict({name: held[name] for name in model.state_dict()})
        eye, reader = (model.eval().requires_grad_(False).to(device) for model in (eye, reader))
        return cls(eye, reader, layers, tokenizer)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], *, chunk: int = 16) -> list[float]:
        """The score of each RGB picture for its prompt."""
        found: list[float] = []
        for start in range(0, len(prompts), chunk):
            pixels = torch.stack([clip.prepare(image, self._side) for image in images[start : start + chunk]])
            tokens = self._tokenizer(
                list(prompts[start : start + chunk]), padding="max_length", truncation=True, max_length=_TOKENS,
                return_tensors="pt",
            ).to(self._eye.device)  # fmt: skip
            with exact_products():
                seen = self._eye(pixel_values=pixels.to(self._eye.device)).last_hidden_state
                x = self._reader(
                    input_ids=tokens.input_ids,
                    attention_mask=tokens.attention_mask,
                    encoder_hidden_states=seen,
                    encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
                ).last_hidden_state[:, 0]
                for weight, bias in self._layers:
                    x = F.linear(x, weight, bias)
            found += ((x[:, 0] - _MEAN) / _SPREAD).tolist()
        return found


def _find(place: Path) -> tuple[Path, Path]:
    """The file of weights, and the tokenizer's folder."""
    from huggingface_hub import try_to_load_from_cache

    own = Path.home() / ".cache" / "ImageReward" / FILE
    cached = try_to_load_from_cache(REPO, FILE)
    files = [place / FILE, own, *([Path(cached)] if isinstance(cached, str) else [])]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        raise Absent(f"{REPO} is not here: `hf download {REPO} {FILE}`, or give the file's folder by {weights.OPTION}")
    if (place / TOKENIZER).is_dir():
        return file, place / TOKENIZER
    for repo in (_TOKENIZER_REPO, TOKENIZER):
        vocabulary = try_to_load_from_cache(repo, "vocab.txt")
        if isinstance(vocabulary, str):
            return file, Path(vocabulary).parent
    raise Absent(
        f"its tokenizer {_TOKENIZER_REPO} is not here: `hf download {_TOKENIZER_REPO}`, or put its files into "
        f"{place / TOKENIZER}"
    )


def _tokenizer_class() -> type:
    from transformers import BertTokenizer

    return BertTokenizer


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for match in (re.match(pattern, name) for name in tensors) if match)


def _renamed(name: str) -> str:
    for pattern, replacement in _VISION_NAMES:
        name, changed = re.subn(pattern, replacement, name)
        if changed:
            return name
    return name
