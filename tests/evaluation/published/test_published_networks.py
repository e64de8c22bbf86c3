"""LPIPS, FID and ImageReward: the networks by seeded weights beside numbers of the published packages and formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import linalg
from torch import Tensor

from bittern.errors import UserError
from bittern.evaluation import clip
from bittern.evaluation.published import inception, lpips, weights
from bittern.evaluation.published.image_reward import ImageReward


def seeded(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Weights that keep numbers at hand; of normalizations, deviations are positive."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            found[name] = noise * (2 / math.prod(shape[1:])) ** 0.5
        else:
            found[name] = 0.5 + noise.abs() if "var" in name or name.endswith("bn.weight") else 0.1 * noise
    return found


def pictures() -> tuple[Tensor, Tensor]:
    noise = torch.randint(0, 256, (3, 3, 128, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return noise, F.avg_pool2d(noise.float(), 9, 1, 4).to(torch.uint8)


def test_lpips_is_that_of_the_published_package() -> None:
    heads = {name: value.abs() for name, value in seeded(lpips.HEAD_SHAPES, 3).items()}
    measure = lpips.Lpips(seeded(lpips.SHAPES, 2), heads)
    noise, smooth = pictures()
    # What lpips 0.1.4 gives with these weights.
    assert measure(noise, smooth, chunk=2) == pytest.approx([0.225833, 0.224838, 0.227644], abs=2e-6)
    assert measure(noise, noise.flip(0)) == pytest.approx([0.199345, 0.0, 0.199345], abs=2e-6)
    small = noise[..., : lpips.SMALLEST, : lpips.SMALLEST]
    assert all(math.isfinite(each) for each in measure(small, small.flip(0)))


def test_inception_is_that_of_the_published_package() -> None:
    eye = inception.Inception(seeded(inception.shapes(), 1))
    noise, smooth = pictures()
    # What pytorch-fid 0.3.0 gives with these weights.
    for images, first, total in (
        (noise, [8362.882812, 8883.896484, 0.0, 31977.582031], 81578976.0),
        (smooth, [1627.995239, 1763.865112, 0.0, 6789.797363], 16600120.0),
    ):
        found = eye(images, chunk=2)
        assert found.shape == (3, 2048)
        assert found[0, :4].tolist() == pytest.approx(first, rel=1e-4)
        assert float(found.sum()) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("count", [300, 9])
def test_the_distance_of_gaussians_is_that_of_the_formula(count: int) -> None:
    generator = torch.Generator().manual_seed(8)
    one = torch.randn(count, 20, generator=generator)
    other = 1.3 * one[: count - 2] + torch.randn(count - 2, 20, generator=generator) + 0.2
    first, second = (np.cov(each.double().numpy(), rowvar=False) for each in (one, other))
    gap = one.double().mean(0).numpy() - other.double().mean(0).numpy()
    crossed = linalg.sqrtm(first @ second).real.trace()
    expected = gap @ gap + first.trace() + second.trace() - 2 * crossed
    assert inception.frechet_distance(one, other) == pytest.approx(expected, rel=1e-5)
    assert inception.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two pictures"):
        inception.frechet_distance(one, one[:1])


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    shares = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        shares = shares.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (shares.softmax(-1) @ v).transpose(1, 2).flatten(2)


def linear(t: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def norm(t: Mapping[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def reward(t: Mapping[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """ImageReward by the tensors' published names, two heads, written apart from transformers."""
    v, b = "blip.visual_encoder", "blip.text_encoder"
    x = F.conv2d(pixels, t[f"{v}.patch_embed.proj.weight"], t[f"{v}.patch_embed.proj.bias"], 16).flatten(2).mT
    x = torch.cat([t[f"{v}.cls_token"].expand(len(x), -1, -1), x], 1) + t[f"{v}.pos_embed"]
    for i in range(2):
        p = f"{v}.blocks.{i}"
        qkv = linear(t, f"{p}.attn.qkv", norm(t, f"{p}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(t, f"{p}.attn.proj", attend(*qkv, heads=2))
        x = x + linear(t, f"{p}.mlp.fc2", F.gelu(linear(t, f"{p}.mlp.fc1", norm(t, f"{p}.norm2", x, 1e-6))))
    seen = norm(t, f"{v}.norm", x, 1e-6)
    x = t[f"{b}.embeddings.word_embeddings.weight"][tokens]
    x = x + t[f"{b}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(t, f"{b}.embeddings.LayerNorm", x, 1e-12)
    for i in range(2):
        p = f"{b}.encoder.layer.{i}"
        for part, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            source = x if source is None else source
            q, k, w = (
                linear(t, f"{p}.{part}.self.{name}", each)
                for name, each in (("query", x), ("key", source), ("value", source))
            )
            told = linear(t, f"{p}.{part}.output.dense", attend(q, k, w, 2, hidden))
            x = norm(t, f"{p}.{part}.output.LayerNorm", x + told, 1e-12)
        told = linear(t, f"{p}.output.dense", F.gelu(linear(t, f"{p}.intermediate.dense", x)))
        x = norm(t, f"{p}.output.LayerNorm", x + told, 1e-12)
    x = x[:, 0]
    for step in (0, 2, 4, 6, 7):
        x = linear(t, f"mlp.layers.{step}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def reward_shapes(words: int, width: int = 128) -> dict[str, tuple[int, ...]]:
    """The published names, with two layers where there are 24 and 12."""
    v, b, found = "blip.visual_encoder", "blip.text_encoder", {}
    found |= {f"{v}.cls_token": (1, 1, width), f"{v}.pos_embed": (1, 5, width)}
    pairs = {f"{v}.patch_embed.proj": (width, 3, 16, 16), f"{v}.norm": (width,)}
    found |= {f"{b}.embeddings.word_embeddings.weight": (words, width)}
    found |= {f"{b}.embeddings.position_embeddings.weight": (40, width)}
    pairs |= {f"{b}.embeddings.LayerNorm": (width,)}
    for i in range(2):
        p = f"{v}.blocks.{i}"
        pairs |= {f"{p}.norm1": (width,), f"{p}.norm2": (width,), f"{p}.attn.qkv": (3 * width, width)}
        pairs |= {f"{p}.attn.proj": (width, width), f"{p}.mlp.fc1": (96, width), f"{p}.mlp.fc2": (width, 96)}
        p = f"{b}.encoder.layer.{i}"
        for part in ("attention", "crossattention"):
            pairs |= {f"{p}.{part}.self.{name}": (width, width) for name in ("query", "key", "value")}
            pairs |= {f"{p}.{part}.output.dense": (width, width), f"{p}.{part}.output.LayerNorm": (width,)}
        pairs |= {f"{p}.intermediate.dense": (80, width), f"{p}.output.dense": (width, 80)}
        pairs |= {f"{p}.output.LayerNorm": (width,)}
    for step, shape in zip((0, 2, 4, 6, 7), ((64, width), (32, 64), (16, 32), (8, 16), (1, 8)), strict=True):
        pairs[f"mlp.layers.{step}"] = shape
    for name, shape in pairs.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def test_image_reward_is_the_published_network(bert_folder: Path) -> None:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(bert_folder)
    tensors = seeded(reward_shapes(len(tokenizer)), 4)
    judge = ImageReward.of(tensors | {"blip.text_encoder.extra": torch.ones(1)}, Path("w.pt"), tokenizer)
    noise, smooth = pictures()
    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in (*noise, *smooth)]
    prompts = ["a cat", "a", "cat a cat a", "a dog", "dog cat", "a cat " * 30]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.attention_mask.sum(1).tolist() == [4, 3, 6, 4, 4, 35]
    pixels = torch.stack([clip.prepare(image, 32) for image in images])
    expected = reward(tensors, pixels, tokens.input_ids, tokens.attention_mask).tolist()
    assert judge(images, prompts, chunk=4) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({round(each, 4) for each in expected}) == 6
    for name in ("blip.visual_encoder.blocks.1.norm2.bias", "blip.text_encoder.encoder.layer.0.output.dense.weight"):
        lacking = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(UserError, match="lacks 1 tensors"):
            ImageReward.of(lacking, Path("w.pt"), tokenizer)
    with pytest.raises(UserError, match=r"w.pt lacks 'pos_embed'"):
        ImageReward.of({k: v for k, v in tensors.items() if "pos_embed" not in k}, Path("w.pt"), tokenizer)


def test_files_of_weights_are_opened_with_care(tmp_path: Path) -> None:
    good = tmp_path / "plain.pth"
    torch.save({"a": torch.ones(2, dtype=torch.float64), "n": torch.ones(1, dtype=torch.int64)}, good)
    found = weights.read(good)
    assert found["a"].dtype == torch.float32 and found["n"].dtype == torch.int64
    named = tmp_path / "net-00000000.pth"
    named.write_bytes(good.read_bytes())
    with pytest.raises(UserError, match="SHA-256 does not begin with 00000000"):
        weights.read(named)
    torch.save({"a": [1, 2]}, good)
    with pytest.raises(UserError, match="something else than named tensors"):
        weights.read(good)
    torch.save({"a": Image.new("RGB", (2, 2))}, good)
    with pytest.raises(UserError, match="cannot be read as weights"):
        weights.read(good)
    good.write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read as weights"):
        weights.read(good)
    with pytest.raises(UserError, match=r"expected b of shape \(3,\), found \(2,\)"):
        weights.take({"b": torch.ones(2)}, {"b": (3,)}, good)
    with pytest.raises(UserError, match="expected c of shape"):
        weights.take({}, {"c": (3,)}, good)
    with pytest.raises(UserError, match="no such folder"):
        weights.folder(tmp_path / "nowhere")
