"""From logits to detections, and the real code path on random networks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bittern.errors import UserError
from bittern.evaluation import hosted
from bittern.evaluation.clip import Clip, scores
from bittern.evaluation.geneval.colors import ColorNamer, cut_out
from bittern.evaluation.geneval.detector import Detector, instances, known_labels, label_names
from bittern.evaluation.geneval.metadata import COLORS, OBJECTS
from bittern.evaluation.geneval.rules import Detection

NAMES = dict(enumerate(OBJECTS))
# CLIP's own, of its training pictures.
MEAN = (0.48145466, 0.4578275, 0.40821073)
SPREAD = (0.26862954, 0.26130258, 0.27577711)
RGB = {"red": (1.0, 0.0, 0.0), "orange": (1.0, 0.5, 0.0), "yellow": (1.0, 1.0, 0.0), "black": (0.02, 0.02, 0.02)}


def logits(*scores: dict[int, float]) -> torch.Tensor:
    """A row a query: the given probabilities, the rest for "no object"."""
    rows = torch.full((len(scores), 81), 1e-9)
    for row, each in zip(rows, scores, strict=True):
        for label, share in each.items():
            row[label] = share
        row[-1] = 1 - sum(each.values())
    return rows.log()


def blocks(*places: tuple[int, int, int, int]) -> torch.Tensor:
    """A mask of 16 x 16 a query, positive inside left, top, right, bottom."""
    masks = torch.full((len(places), 16, 16), -20.0)
    for mask, (left, top, right, bottom) in zip(masks, places, strict=True):
        mask[top:bottom, left:right] = 20.0
    return masks


def find(classes: torch.Tensor, masks: torch.Tensor, **sizes: tuple[int, int]) -> list[Detection]:
    plain = {"padded": (16, 16), "inside": (16, 16), "size": (16, 16)}
    return instances(classes, masks, NAMES, **(plain | sizes))


def test_a_query_becomes_an_object_with_its_box_and_mask() -> None:
    (one,) = find(logits({16: 0.8}, {0: 0.2}), blocks((2, 3, 7, 5), (0, 0, 16, 16)))
    assert one.name == "dog" and one.box == (2, 3, 7, 5)
    assert one.score == pytest.approx(0.8, abs=1e-5)
    assert one.mask is not None and one.mask.dtype == bool and one.mask.sum() == 10 and one.mask[3:5, 2:7].all()


def test_one_query_may_be_several_classes_and_several_queries_one() -> None:
    found = find(logits({16: 0.5, 15: 0.4}, {16: 0.9}), blocks((0, 0, 4, 4), (1, 1, 5, 5)))
    assert sorted((one.name, round(one.score, 3)) for one in found) == [("cat", 0.4), ("dog", 0.5), ("dog", 0.9)]


def test_the_score_is_the_class_times_the_mean_of_the_mask() -> None:
    masks = torch.full((1, 16, 16), -5.0)
    masks[0, 4, 4:8] = torch.tensor([0.2, 1.0, 2.0, 0.7])
    (one,) = find(logits({2: 0.9}), masks)
    mean = sum(1 / (1 + math.exp(-v)) for v in (0.2, 1.0, 2.0, 0.7)) / 4
    assert one.score == pytest.approx(0.9 * mean, rel=1e-5)
    # .4 times a mean of a half is below the threshold.
    faint = torch.full((1, 16, 16), -5.0)
    faint[0, 4, 4] = 1e-3
    assert find(logits({2: 0.4}), faint) == [] and len(find(logits({2: 0.7}), faint)) == 1


def test_a_mask_without_a_pixel_is_no_object() -> None:
    assert find(logits({2: 0.9}), torch.full((1, 16, 16), -1.0)) == []


def test_padding_is_cut_off_before_masks_take_the_pictures_size() -> None:
    # The network saw 64 x 64 of which 32 rows are the picture; the picture has 8 rows and 16 columns.
    classes, masks = logits({16: 0.9}, {15: 0.9}), blocks((0, 0, 16, 8), (0, 8, 16, 16))
    found = find(classes, masks, padded=(64, 64), inside=(32, 64), size=(8, 16))
    dog = next(one for one in found if one.name == "dog")
    assert dog.box == (0, 0, 16, 8) and dog.mask is not None and dog.mask.shape == (8, 16)
    # The other mask lies in the padding but for what interpolation spreads.
    assert all(one.box[1] >= 7 for one in found if one.name == "cat")


def test_the_network_is_read_as_the_definition_says(detector_folder: Path) -> None:
    detector = Detector.load(detector_folder)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    found = {(one.name, one.box): one.score for one in detector(image)}
    assert found
    # Written apart: 64 is the shorter side, so 64 x 90; padded to multiples of 32.
    resized = torch.from_numpy(np.array(image.resize((90, 64), Image.Resampling.BILINEAR), np.float32))
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = torch.zeros(1, 3, 64, 96)
    pixels[0, :, :, :90] = ((resized / 255 - mean) / spread).permute(2, 0, 1)
    with torch.inference_mode():
        out = detector.network(pixel_values=pixels)
    resize = torch.nn.functional.interpolate
    masks = resize(resize(out.masks_queries_logits, (64, 96), mode="bilinear")[..., :90], (40, 56), mode="bilinear")[0]
    shares = out.class_queries_logits[0].softmax(1)
    expected = {}
    best = sorted(((float(shares[q, c]), q, c) for q in range(12) for c in range(80)), reverse=True)[:100]
    for share, query, label in best:
        on = masks[query] > 0
        if on.any() and (score := share * float(masks[query][on].sigmoid().mean())) > 0.3:
            ys, xs = on.nonzero().T
            expected[OBJECTS[label], (xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1)] = (
                score
            )
    assert found == pytest.approx(expected, rel=1e-4)


def test_pictures_are_seen_together_as_one_by_one(detector_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector.load(detector_folder)
    rng = np.random.default_rng(2)
    shapes = [(40, 56), (64, 64), (40, 56), (20, 28), (64, 60)]
    images = [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    alone = [detector(image) for image in images]
    batches: list[int] = []
    forward = detector.network.forward
    monkeypatch.setattr(
        detector.network, "forward", lambda pixel_values: batches.append(len(pixel_values)) or forward(pixel_values)
    )
    together = detector.find(images)
    # 40 x 56 and 20 x 28 are both 64 x 90 at the detector's size; 64 x 60 is padded to 96 x 64.
    assert sorted(batches) == [1, 1, 3]
    assert all(together) and [len(found) for found in together] == [len(found) for found in alone]
    for found, expected in zip(together, alone, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert (one.name, one.box) == (other.name, other.box)
            assert one.score == pytest.approx(other.score, rel=1e-4)
            assert one.mask is not None and other.mask is not None and (one.mask == other.mask).mean() > 0.999


def test_labels_by_place_and_by_name() -> None:
    assert label_names({i: f"LABEL_{i}" for i in range(80)}, "m") == NAMES
    assert label_names({0: "LABEL_0", 1: "LABEL_1"}, "m") == {0: "person", 1: "bicycle"}
    coco = dict(enumerate(OBJECTS)) | {3: "motorbike", 64: "mouse"}
    assert label_names(coco, "m") == NAMES
    panoptic = {i + 5: name for i, name in NAMES.items()} | {69: "mouse", 70: "remote", 71: "keyboard", 0: "sky"}
    panoptic = {i: panoptic.get(i, "stuff") for i in range(90)}
    assert label_names(panoptic, "m") == {i + 5: name for i, name in NAMES.items()}
    with pytest.raises(UserError, match=r"does not know 78 of COCO's 80 things, such as 'person'"):
        label_names({0: "dog", 1: "cat"}, "m")


def test_detectors_that_are_none(clip_folder: Path, detector_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a 'clip': expected a mask2former"):
        known_labels(clip_folder)
    with pytest.raises(UserError, match=r"expected a folder with config\.json"):
        hosted.locate(str(tmp_path), "--detector")
    with pytest.raises(UserError, match="there is no such folder"):
        hosted.locate("./nowhere", "--detector")
    broken = tmp_path / "broken"
    shutil.copytree(detector_folder, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"--detector .*broken cannot be loaded"):
        Detector.load(broken)


def test_a_model_that_is_nowhere_says_how_to_bring_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(UserError, match=r"weights of a/b are not here.*no route.*hf download a/b .*--clip FOLDER"):
        hosted.locate("a/b", "--clip")


def test_weights_that_lack_a_tensor_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors such as visual_projection\.weight"):
        Clip.load(folder)


def test_an_object_is_cut_out_onto_grey() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:9, 10:14] = True
    mask[5, 10] = False
    cut = np.asarray(cut_out(Image.fromarray(pixels), Detection("dog", (10, 5, 15, 9), 0.9, mask)))
    assert cut.shape == (4, 5, 3)
    expected = pixels[5:9, 10:15].copy()
    expected[:, 4] = expected[0, 0] = 0x99
    assert np.array_equal(cut, expected)
    whole = np.asarray(cut_out(Image.fromarray(pixels), Detection("dog", (10, 5, 15, 9), 0.9)))
    assert np.array_equal(whole, pixels[5:9, 10:15])


def test_colours_are_the_nearest_of_ten_mean_directions(clip_folder: Path) -> None:
    clip = Clip.load(clip_folder)
    namer = ColorNamer(clip)
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (48, 32, 3), dtype=np.uint8))
    ones = [Detection("hot dog", (0, 0, 32, 48), 0.9), Detection("hot dog", (4, 8, 20, 31), 0.9)]
    told = namer(image, "hot dog", ones)
    unit = torch.nn.functional.normalize
    with torch.inference_mode():
        directions = []
        for color in COLORS:
            sentences = [
                f"a photo of a {color} hot dog",
                f"a photo of a {color}-colored hot dog",
                f"a photo of a {color} object",
            ]
            vectors = []
            for sentence in sentences:
                tokens = clip.tokenizer(sentence, return_tensors="pt", truncation=True, max_length=40)
                found = clip.network.get_text_features(**{k: tokens[k] for k in ("input_ids", "attention_mask")})
                vectors.append(unit(found.pooler_output[0], dim=0))
            directions.append(unit(torch.stack(vectors).mean(0), dim=0))
        torch.testing.assert_close(namer.directions("hot dog"), torch.stack(directions), atol=1e-5, rtol=0)
        for one, color in zip(ones, told, strict=True):
            crop = image.crop(tuple(map(int, one.box)))
            scale = 32 / min(crop.size)
            crop = crop.resize((int(crop.width * scale), int(crop.height * scale)), Image.Resampling.BICUBIC)
            left, top = round((crop.width - 32) / 2), round((crop.height - 32) / 2)
            pixels = np.asarray(crop.crop((left, top, left + 32, top + 32)), np.float32) / 255
            pixels = (pixels - MEAN) / SPREAD
            seen = clip.network.get_image_features(
                pixel_values=torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
            )
            nearness = torch.stack(directions) @ unit(seen.pooler_output[0], dim=0)
            assert COLORS[int(nearness.argmax())] == color


def test_clip_scores_are_cosines_of_what_is_seen_and_said(clip_folder: Path) -> None:
    clip = Clip.load(clip_folder)
    rng = np.random.default_rng(4)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(5)]
    prompts = ["a dog", "two cats on a mat", "b", "a red bird", "nothing at all"]
    assert scores(clip, images, prompts) == [0.0] * 5  # this random one sees nothing of what it reads
    clip.network.text_projection.weight.neg_()
    seen, said = clip.see(images).double(), clip.read(prompts).double()
    assert torch.allclose(seen.norm(dim=1), torch.ones(5).double(), atol=1e-6)
    expected = [100 * max(0.0, float(a @ b)) for a, b in zip(seen, said, strict=True)]
    assert scores(clip, images, prompts, chunk=2) == pytest.approx(expected, abs=1e-3)
    assert min(expected) > 1 and len(set(expected)) == 5
    # Texts beyond CLIP's length are cut off, and batches change nothing.
    assert torch.allclose(clip.read(["a " * 300]), clip.read(["a " * 39]), atol=1e-5)
    assert torch.allclose(clip.read(prompts)[2:3], clip.read(["b"]), atol=1e-5)


class Eye:
    """A network that sees the mean colour of a picture and reads colours from the words of a sentence."""

    def __init__(self) -> None:
        from types import SimpleNamespace

        self.device = torch.device("cpu")
        self.config = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=8), text_config=SimpleNamespace(max_position_embeddings=77)
        )

    def parameters(self) -> list[torch.Tensor]:
        return []

    buffers = parameters

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        mean, spread = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        return pixel_values.mean((2, 3)) * spread + mean

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.tensor([RGB.get(COLORS[int(i)], (-1.0, -1.0, -1.0)) for i in input_ids[:, 0]])


class Reader:
    pad_token = "."

    def __call__(self, texts: list[str], **_: object):
        from transformers import BatchEncoding

        ids = [[next(i for i, color in enumerate(COLORS) if f" {color}" in text)] for text in texts]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), 1)})


@pytest.mark.parametrize(
    ("rgb", "color"),
    [((255, 60, 0), "red"), ((255, 68, 0), "orange"), ((255, 190, 0), "yellow"), ((255, 180, 0), "orange")],
)
def test_colours_near_each_other_fall_to_the_nearer(rgb: tuple[int, int, int], color: str) -> None:
    # Between red and orange the angle's middle is 13.3 degrees, between orange and yellow 35.8.
    picture = Image.new("RGB", (20, 20), rgb)
    assert ColorNamer(Clip(Eye(), Reader()))(picture, "dog", [Detection("dog", (0, 0, 20, 20), 0.9)]) == [color]


def test_preprocessing_follows_the_folder_or_the_published_configuration(detector_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(detector_folder, folder)
    (folder / "preprocessor_config.json").unlink()
    pixels, inside = Detector.load(folder)._prepare(Image.new("RGB", (1024, 1024)))
    assert pixels.shape == (3, 800, 800) and inside == (800, 800)
    pixels, inside = Detector.load(folder)._prepare(Image.new("RGB", (1000, 500)))
    assert inside == (667, 1333) and pixels.shape == (3, 672, 1344)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32, "longest_edge": 64}}))
    assert Detector.load(folder)._prepare(Image.new("RGB", (100, 100)))[1] == (32, 32)
