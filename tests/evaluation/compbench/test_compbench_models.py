"""The real code path on random networks, against what the definitions say, written apart."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bittern.errors import UserError
from bittern.evaluation.clip import Clip
from bittern.evaluation.compbench import depth, detector, phrases
from bittern.evaluation.compbench.blip import Blip
from bittern.evaluation.compbench.depth import Depth
from bittern.evaluation.compbench.detector import NamedDetector, distinct
from bittern.evaluation.geneval.rules import Detection

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
SPREAD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tensor(image: Image.Image, side: int, how: Image.Resampling, mean: Any = MEAN, spread: Any = SPREAD) -> Any:
    values = torch.from_numpy(np.array(image.resize((side, side), how), np.float32)).permute(2, 0, 1) / 255
    return ((values - mean) / spread)[None]


def test_yes_is_weighed_against_no_as_the_first_word_of_the_answer(blip_folder: Path) -> None:
    blip, image = Blip.load(blip_folder), noise(40, 24)
    asked = ["a red bee?", "a very long question about a blue and shiny key?", "bee?"]
    found = blip.yes(image, asked)
    network, vocab = blip.network, blip.tokenizer.get_vocab()
    seen = network.vision_model(pixel_values=tensor(image, 32, Image.Resampling.BICUBIC)).last_hidden_state
    for question, share in zip(asked, found, strict=True):
        # [ENC] in place of [CLS]; letters are tokens; at most 35 of all.
        pieces = [[word[0], *(f"##{letter}" for letter in word[1:])] for word in question.removesuffix("?").split(" ")]
        letters = [vocab[piece] for piece in [*itertools.chain(*pieces), "?"]]
        ids = torch.tensor([[len(vocab) + 1, *letters[:33], vocab["[SEP]"]]])
        state = network.text_encoder(input_ids=ids, encoder_hidden_states=seen)[0]
        begin = torch.tensor([[len(vocab)]])
        logits = network.text_decoder(input_ids=begin, encoder_hidden_states=state).logits[0, 0].double()
        yes, no = (torch.exp(logits[vocab[word]]) for word in ("yes", "no"))
        assert share == pytest.approx(float(yes / (yes + no)), abs=1e-5)
    assert len({round(share, 4) for share in found}) == 3
    assert blip.yes(image, []) == []


def test_blips_vocabulary_must_have_its_words(blip_folder: Path) -> None:
    blip = Blip.load(blip_folder)
    lacking = SimpleNamespace(convert_tokens_to_ids=lambda words: [6, 1], unk_token_id=1)
    with pytest.raises(UserError, match=r"no 'yes', 'no' or \[ENC\]"):
        Blip(blip.network, lacking)


def test_objects_are_looked_for_by_name(owl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "_DUPLICATE", 1.0)
    monkeypatch.setattr(detector, "THRESHOLD", 0.49)
    owl, image, names = NamedDetector.load(owl_folder), noise(20, 50, 3), ["bee", "key", "bird", "bee"]
    found = owl(image, names)
    # A square of grey with the picture in its upper left corner, at the network's size.
    square = Image.new("RGB", (50, 50), (128, 128, 128))
    square.paste(image, (0, 0))
    tokens = owl.tokenizer([f"a photo of a {name}" for name in names[:3]], padding="max_length", max_length=32)
    with torch.inference_mode():
        seen = owl.network(
            input_ids=torch.tensor(tokens["input_ids"]),
            attention_mask=torch.tensor(tokens["attention_mask"]),
            pixel_values=tensor(square, 32, Image.Resampling.BILINEAR),
        )
    expected = []
    for logits, (x, y, w, h) in zip(seen.logits[0].tolist(), seen.pred_boxes[0].tolist(), strict=True):
        score = 1 / (1 + np.exp(-max(logits)))
        if score > 0.49:
            box = [50 * (x - w / 2), 50 * (y - h / 2), 50 * (x + w / 2), 50 * (y + h / 2)]
            limits = [50, 20, 50, 20]
            kept = [min(max(edge, 0), limit) for edge, limit in zip(box, limits, strict=True)]
            expected.append((names[int(np.argmax(logits))], score, kept))
    expected.sort(key=lambda one: -one[1])
    assert [one.name for one in found] == [name for name, _, _ in expected]
    assert len({one.name for one in found}) > 1 and len(found) < 16
    for one, (_, score, box) in zip(found, expected, strict=True):
        assert one.score == pytest.approx(score, abs=1e-5) and one.box == pytest.approx(tuple(box), abs=1e-3)


def test_of_boxes_of_a_name_that_overlap_by_more_than_half_one_is_kept() -> None:
    one, other = Detection("bee", (0, 0, 10, 10), 0.9), Detection("bee", (0, 0, 10, 5.1), 0.8)
    half, cup = Detection("bee", (0, 0, 10, 5), 0.7), Detection("cup", (0, 0, 10, 10), 0.6)
    assert distinct([one, other, half, cup]) == [one, half, cup]


def test_nearness_has_the_pictures_size(depth_folder: Path) -> None:
    model, image = Depth.load(depth_folder), noise(24, 40)
    near = model(image)
    mean, spread = (torch.tensor(values).view(3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    with torch.inference_mode():
        pixels = tensor(image, 28, Image.Resampling.BICUBIC, mean, spread)
        small = model.network(pixel_values=pixels).predicted_depth
    expected = torch.nn.functional.interpolate(small[None], (24, 40), mode="bilinear")[0, 0].numpy()
    assert near.shape == (24, 40) and near.std() > 0
    np.testing.assert_allclose(near, expected, atol=1e-5)


def test_a_dpt_is_taken_as_well(saved: Callable[..., Path]) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, readout_type="project",
    )  # fmt: skip
    folder = saved("dpt", lambda: DPTForDepthEstimation(config), preprocessor_config={"size": 32})
    assert Depth.load(folder)(noise(10, 12)).shape == (10, 12)


def test_depth_in_metres_is_refused(depth_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    metres = tmp_path / "metres"
    shutil.copytree(depth_folder, metres)
    config = json.loads((metres / "config.json").read_text())
    (metres / "config.json").write_text(json.dumps(config | {"depth_estimation_type": "metric"}))
    with pytest.raises(UserError, match=r"--depth .*metres tells metric depth: expected nearness"):
        Depth.load(metres)
    with pytest.raises(UserError, match=r"is a 'clip': expected a depth_anything or dpt such as depth-anything/"):
        depth.check_kind(clip_folder)


def test_weights_that_are_no_safetensors_are_not_opened(blip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(blip_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"--blip .*pickled cannot be loaded: it has no \.safetensors"):
        Blip.load(tmp_path / "pickled")


def test_other_models_are_not_taken_for_blip_or_owl(clip_folder: Path) -> None:
    for kind in (Blip, NamedDetector):
        with pytest.raises(UserError, match=r"lacks|cannot be loaded"):
            kind.load(clip_folder)
    assert Clip.load(clip_folder)


def test_spacy_documents_become_words_and_phrases() -> None:
    def word(text: str, part: str) -> SimpleNamespace:
        return SimpleNamespace(text=text, pos_=part)

    class Document(list):  # type: ignore[type-arg]
        noun_chunks = (SimpleNamespace(text="a bee"),)

    class Pipeline:
        meta = {"lang": "en", "name": "core_web_sm", "version": "3.8.0"}  # noqa: RUF012

        def __call__(self, prompt: str) -> Document:
            assert prompt == "a bee"
            return Document([word("a", "DET"), word("bee", "NOUN")])

    parser = phrases.SpacyParser(Pipeline())
    assert parser("a bee") == phrases.Parsed((("a", "DET"), ("bee", "NOUN")), ("a bee",))
    assert parser.identity == "en_core_web_sm 3.8.0"


@pytest.mark.parametrize("missing", ["package", "pipeline"])
def test_a_parser_that_is_not_installed_says_how_to_bring_it(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"[E050] Can't find model '{name}'")

    module = None if missing == "package" else SimpleNamespace(load=load)
    monkeypatch.setitem(__import__("sys").modules, "spacy", module)
    with pytest.raises(UserError, match=r'pip install "bittern\[compbench\]".*spacy download en_core_web_sm.*wheel'):
        phrases.load()
