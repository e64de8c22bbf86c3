"""Random models of every kind that the suite asks, prompts in the official forms, and their parses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bittern.evaluation.compbench.judge import Models
from bittern.evaluation.compbench.phrases import Parsed
from bittern.evaluation.compbench.suite import evaluate
from bittern.evaluation.drawing import Settings

QUICK = Settings(seed=3, steps=1, batch_size=5)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Prompts in the official forms and their words, taken apart by hand: noun phrases, and parts of speech for complex.
PROMPTS = {
    "color": ["a red bee and a blue key", "a tan cup"],
    "shape": ["a round egg and a cubic box", "a long pen"],
    "texture": ["a wooden toy", "rubber shoes and a metal jar"],
    "spatial": ["a bee near a key", "a boy on the left of a cup"],
    "3d_spatial": ["a dog in front of a cat", "a car hidden by a bus"],
    "numeracy": ["two bees", "one cup, three birds and two toys"],
    "non_spatial": ["A man is reading.", "A cat sleeps."],
    "complex": ["The red hat was next to the old box.", "The white dog ran on."],
}
PHRASES = {
    "a red bee and a blue key": ("a red bee", "a blue key"),
    "a tan cup": ("a tan cup",),
    "a round egg and a cubic box": ("a round egg", "a cubic box"),
    "a long pen": ("a long pen",),
    "a wooden toy": ("a wooden toy",),
    "rubber shoes and a metal jar": ("rubber shoes", "a metal jar"),
    "The red hat was next to the old box.": ("The red hat", "the old box"),
    "The white dog ran on.": ("The white dog",),
}
PARTS = {"red": "ADJ", "old": "ADJ", "white": "ADJ", "hat": "NOUN", "box": "NOUN", "dog": "NOUN", ".": "PUNCT"}


class GivenParser:
    """Knows the prompts above and no English."""

    identity = "by hand 1"

    def __call__(self, prompt: str) -> Parsed:
        words = prompt.replace(".", " .").split()
        return Parsed(tuple((word, PARTS.get(word, "X")) for word in words), PHRASES[prompt])


@pytest.fixture(scope="session")
def parser() -> GivenParser:
    return GivenParser()


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of each category, with the line ends of the official files."""
    folder = tmp_path_factory.mktemp("prompts")
    for category, prompts in PROMPTS.items():
        (folder / f"{category}_val.txt").write_text("\r\n".join(prompts), newline="")
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a model, drawn with a seed of its own, and its tokenizer into a folder."""
    import torch

    def save(name: str, make: Callable[[], Any], tokenizer: Any = None, **files: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp("compbench") / name
        with torch.random.fork_rng():
            torch.manual_seed(1)
            make().eval().save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for file, value in files.items():
            (folder / f"{file}.json").write_text(json.dumps(value))
        return folder

    return save


@pytest.fixture(scope="session")
def blip_folder(saved: Callable[..., Path]) -> Path:
    """BLIP whose tokenizer knows letters, "yes" and "no"."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", "yes", "no"]
    words += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(words) + 2,
        "encoder_hidden_size": 16,
        "max_position_embeddings": 64,
        "bos_token_id": len(words),
        "pad_token_id": 0,
        "sep_token_id": 3,
        "initializer_range": 0.5,
    }
    vision = small | {"image_size": 32, "patch_size": 8, "initializer_range": 0.5}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    return saved(
        "blip",
        lambda: BlipForQuestionAnswering(config),
        BertTokenizer(vocab={word: index for index, word in enumerate(words)}),
    )


@pytest.fixture(scope="session")
def owl_folder(saved: Callable[..., Path]) -> Path:
    """OWLv2 whose tokenizer knows letters, so sure of itself that some boxes pass the threshold."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection

    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=32)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Owlv2Config(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)

    def make() -> Any:
        model = Owlv2ForObjectDetection(config)
        heads = (model.class_head.logit_shift, model.class_head.logit_scale, model.box_head.dense2)
        loud = [*(layer.weight for layer in heads), *model.owlv2.text_model.parameters()]
        for weight in loud:
            if weight.ndim == 2:
                weight.data.normal_()
        model.box_head.dense2.weight.data.mul_(0.3)
        return model

    return saved("owl", make, tokenizer)


@pytest.fixture(scope="session")
def depth_folder(saved: Callable[..., Path]) -> Path:
    """Depth Anything on a DINOv2 of two layers."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, patch_size=14, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8,
    )  # fmt: skip
    prepare = {"size": {"height": 28, "width": 28}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    return saved("depth", lambda: DepthAnythingForDepthEstimation(config), preprocessor_config=prepare)


@pytest.fixture(scope="session")
def models(blip_folder: Path, clip_folder: Path, owl_folder: Path, depth_folder: Path) -> Models:
    return Models(str(blip_folder), str(clip_folder), str(owl_folder), str(depth_folder))


@pytest.fixture
def run(
    tiny_random_folder: Path, prompt_files: Path, models: Models, parser: Any, tmp_path: Path
) -> Callable[..., Any]:
    """The suite on the random pipeline; options override."""

    def go(out: str = "out", **options: Any) -> Any:
        given = {"model": str(tiny_random_folder), "prompts": prompt_files, "images_per_prompt": 2, "settings": QUICK}
        chosen = given | {"models": models, "parser": parser} | options
        return evaluate(chosen.pop("model"), chosen.pop("prompts"), tmp_path / out, **chosen)

    return go


@pytest.fixture(scope="session")
def finished(
    tiny_random_folder: Path, prompt_files: Path, models: Models, parser: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A finished run's folder, not to be written to, and what was told of it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    found = evaluate(
        str(tiny_random_folder), prompt_files, out, images_per_prompt=2, models=models, parser=parser, settings=QUICK
    )
    return out, json.loads(json.dumps(found.to_dict(), allow_nan=False))
