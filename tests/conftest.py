"""A complete random FluxPipeline, small enough to build and to draw with in a second."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from covering import slow_beyond

# A deadline measures the other processes of a busy machine, and the first call's caches.
settings.register_profile("bittern", deadline=None)
settings.load_profile("bittern")

# Shapes and dtypes in signatures are checked at run time; not in what torch.compile traces, nor where a wrong type
# is the user's and has a message of its own.
CHECKED = {
    "formats": ("coding", "dtypes", "int4", "packing", "registry", "ternary"),
    "ops": ("reference",),
    "solvers": ("lowrank", "smooth", "solution", "solve"),
}
install_import_hook(
    [f"bittern.{room}.{module}" for room, modules in CHECKED.items() for module in modules], "beartype.beartype"
)

if TYPE_CHECKING:
    from diffusers import FluxPipeline

HIDDEN = 64
TEXT = 32
TOKENS = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows that each operation of a few-bit linear layer computes, from now on."""
    from bittern.layers import QuantLinear

    found: list[tuple[int, int]] = []
    run = QuantLinear.linear_rows

    def noted(self: QuantLinear, x: Any, start: int, stop: int, *rest: Any) -> Any:
        found.append((start, stop))
        return run(self, x, start, stop, *rest)

    monkeypatch.setattr(QuantLinear, "linear_rows", noted)
    return found


@pytest.fixture(scope="session")
def new_tiny_random_pipeline() -> Callable[[], FluxPipeline]:
    """Gives equal pipelines that share nothing: float32, on the CPU, in eval mode, drawing 32x32."""
    original = _build()
    return lambda: copy.deepcopy(original)


@pytest.fixture
def tiny_random_pipeline(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> FluxPipeline:
    """A pipeline of the test's own."""
    return new_tiny_random_pipeline()


@pytest.fixture(scope="session")
def tiny_random_folder(
    new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same pipeline as a folder, not to be written to."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-random"
    new_tiny_random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unet_folder(new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline with guidance, concatenated skip inputs and convolutions; not to be written to."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    flux = new_tiny_random_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 48),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT,
            attention_head_dim=4,
            norm_num_groups=16,
        ).eval()
    pipe = StableDiffusionPipeline(
        vae=flux.vae,
        text_encoder=flux.text_encoder,
        tokenizer=flux.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-unet"
    pipe.save_pretrained(folder)
    return folder


def _build() -> FluxPipeline:
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    letters = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(letters)}, merges=[], model_max_length=TOKENS
    )
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    tokenizer_2 = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=TOKENS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT,
                intermediate_size=2 * TEXT,
                projection_dim=TEXT,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer_2), d_model=TEXT, d_kv=16, d_ff=2 * TEXT, num_layers=1, num_heads=2)
        )
        vae = AutoencoderKL(
            sample_size=32,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=1.0,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=HIDDEN // 2,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
    for module in (text_encoder, text_encoder_2, vae, transformer):
        module.eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs a GPU, or a browser, where there is none; of tests with very many cases some are slow."""
    slow_beyond(items)
    absent = [marker for marker, here in (("gpu", _gpu), ("browser", _browser)) if not _have(items, marker, here)]
    out = [item for item in items if any(item.get_closest_marker(marker) for marker in absent)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def _have(items: list[pytest.Item], marker: str, here: Callable[[], bool]) -> bool:
    """Whether a thing is here; not looked for where no test needs it."""
    return not any(item.get_closest_marker(marker) for item in items) or here()


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _browser() -> bool:
    return shutil.which("chromium") is not None and importlib.util.find_spec("playwright") is not None
