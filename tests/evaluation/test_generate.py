from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from bittern import pipelines, threads
from bittern.errors import BitternError, UserError
from bittern.evaluation import generate as gen

PROMPTS = ["a red star", "two green triangles", "a blue ring above a pink heart"]


def first_latents(pipe: FluxPipeline, batch_size: int, seed: int) -> Tensor:
    """What the transformer is shown before its first step, one row a prompt."""
    seen: list[Tensor] = []

    def record(_module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["hidden_states"].detach().clone())

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        gen.generate(pipe, PROMPTS, seed=seed, steps=1, batch_size=batch_size)
    finally:
        handle.remove()
    return torch.cat(seen)


def test_noise_depends_on_the_prompts_seed_alone(tiny_random_pipeline: FluxPipeline) -> None:
    pipe = tiny_random_pipeline
    together = first_latents(pipe, 3, seed=7)
    for batch_size in (1, 2):
        assert torch.equal(first_latents(pipe, batch_size, seed=7), together)
    assert torch.equal(first_latents(pipe, 2, seed=8)[:2], together[1:])
    channels = pipe.transformer.config.in_channels // 4
    side = 2 * int(together.shape[1] ** 0.5)
    for index, row in enumerate(together):
        noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(7 + index))
        packed = pipe._pack_latents(noise, 1, channels, side, side)[0]
        # 16-bit models see the same noise, rounded.
        torch.testing.assert_close(row.float(), packed, rtol=2**-7, atol=1e-2)
        assert torch.corrcoef(torch.stack([row.float().flatten(), packed.flatten()]))[0, 1] > 0.999


def test_pictures_are_those_of_the_pipeline_itself(tiny_random_pipeline: FluxPipeline) -> None:
    pipe = tiny_random_pipeline
    images = gen.generate(pipe, PROMPTS[:2], seed=3, steps=2)
    call = pipelines.defaults(pipe)
    stock = pipe(
        prompt=PROMPTS[:2],
        generator=[torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)],
        num_inference_steps=2,
        height=call.height,
        width=call.width,
        guidance_scale=call.guidance,
        max_sequence_length=call.max_sequence_length,
    ).images
    assert images.dtype == torch.uint8 and images.shape == (2, 3, call.height, call.width)
    for image, picture in zip(images, stock, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture))


def test_batch_size_moves_a_picture_by_rounding_at_most(tiny_random_pipeline: FluxPipeline) -> None:
    one, three = (gen.generate(tiny_random_pipeline, PROMPTS, seed=1, steps=2, batch_size=b).int() for b in (1, 3))
    assert (one - three).abs().float().mean() < 1.0


def test_progress_runs_up_to_the_number_of_pictures(tiny_random_pipeline: FluxPipeline) -> None:
    calls: list[tuple[str, float, float]] = []
    gen.generate(tiny_random_pipeline, PROMPTS, steps=2, batch_size=2, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == [1.0, 2.0, 2.5, 3.0]
    assert {total for _, _, total in calls} == {3}


def test_the_pipelines_own_bar_is_left_as_it_was(tiny_random_pipeline: FluxPipeline) -> None:
    tiny_random_pipeline.set_progress_bar_config(desc="mine", disable=False)
    gen.generate(tiny_random_pipeline, PROMPTS[:1], steps=1)
    assert tiny_random_pipeline._progress_bar_config == {"desc": "mine", "disable": False}


def test_a_picture_that_is_not_a_number_is_an_error(
    tiny_random_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = tiny_random_pipeline.vae.decode

    def overflow(latents: Tensor, **options: Any) -> Any:
        (images,) = decode(latents, return_dict=False)
        images[-1, 0, 0, 0] = float("nan")
        return (images,)

    monkeypatch.setattr(tiny_random_pipeline.vae, "decode", overflow)
    with pytest.raises(BitternError, match=r"two green triangles.*not finite"):
        gen.generate(tiny_random_pipeline, PROMPTS[:2], steps=1)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        (["a", "  "], {}, "prompt 2 is empty"),
        (["a"], {"steps": 0}, "steps is 0"),
        (["a"], {"batch_size": -1}, "batch size is -1"),
        (["a"], {"seed": -1}, "seed is -1"),
        (["a"], {"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_requests_that_make_no_sense(
    prompts: list[str], options: dict[str, int], message: str, tiny_random_pipeline: FluxPipeline
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        gen.generate(tiny_random_pipeline, prompts, **options)


@pytest.mark.parametrize(("pixels", "expected"), [(128 * 128, 16), (1024 * 1024, 1), (16 * 16, 128)])
def test_default_batch_size_follows_a_budget(pixels: int, expected: int, tiny_random_pipeline: FluxPipeline) -> None:
    assert gen.default_batch_size(tiny_random_pipeline, pixels) == expected


def test_png_keeps_every_pixel_and_its_making(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    metadata = {"prompt": 'zwei grüne Dreiecke, "☆"\nneue Zeile', "seed": 7, "path": "a8-int8+a16"}
    file = tmp_path / "new" / "a.png"
    gen.save_png(image, file, metadata)
    assert gen.read_metadata(file) == {key: str(value) for key, value in metadata.items()}
    with Image.open(file) as picture:
        assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())
    gen.save_png(255 - image, file, {})
    assert gen.read_metadata(file) == {}
    assert [f.name for f in file.parent.iterdir()] == ["a.png"]


def test_unwritable_place_is_the_users_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match="cannot write"):
        gen.save_png(image, tmp_path / "file" / "a.png", {})
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder\.png"):
        gen.save_png(image, tmp_path / "folder.png", {})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize(("limit", "expected"), [(2**25, 1), (0, 2)])
def test_small_models_are_drawn_by_one_thread(
    tiny_random_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    seen: set[int] = set()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(threads, "SMALL_MODEL", limit)
        tiny_random_pipeline.transformer.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
        gen.generate(tiny_random_pipeline, PROMPTS[:1], steps=1)
        assert seen == {expected}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
