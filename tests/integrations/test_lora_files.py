"""LoRA files that load through diffusers, and those that are refused before anything is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

import bittern
from bittern.errors import UserError
from bittern.integrations.lora_files import looks_like
from bittern.pipelines import Lora, load_loras

Q, OUT = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def pipe(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> FluxPipeline:
    """A few-bit pipeline, which every test leaves as it was."""
    pipe = new_tiny_random_pipeline()
    bittern.quantize(pipe, "int4")
    return pipe


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(shapes: Shapes, name: str = "some.safetensors", **tensors: Tensor) -> Path:
        g = torch.Generator().manual_seed(0)
        state = {key: 0.2 * torch.randn(shape, generator=g) for key, shape in shapes.items()}
        # One half, of whatever rank.
        state |= {key: torch.tensor(2.0) for key in shapes if key.endswith(".alpha")}
        save_file({**state, **tensors}, tmp_path / name)
        return tmp_path / name

    return write


def peft(path: str, inputs: int, outputs: int, rank: int = 4, prefix: str = "transformer.") -> Shapes:
    return {f"{prefix}{path}.lora_A.weight": (rank, inputs), f"{prefix}{path}.lora_B.weight": (outputs, rank)}


def wrappers(model: Any) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if hasattr(module, "base_layer")}


GOOD = {**peft(Q, 64, 64), **peft(OUT, 320, 64, 8)}


def test_files_load_by_their_names_with_their_strengths(pipe: FluxPipeline, write: Callable[..., Path]) -> None:
    first, second = write(GOOD, "ink v1.2.safetensors"), write(peft(Q, 64, 64, 2), "pytorch_lora_weights.safetensors")
    try:
        names = bittern.load_loras(pipe, [first, f"{second.parent}:-0.5", Lora(str(first), 0.25)])
        assert names == ["ink_v1_2", second.parent.name, "ink_v1_2_2"]
        assert pipe.get_active_adapters() == names
        worn = wrappers(pipe.transformer)
        assert set(worn) == {Q, OUT}
        assert worn[Q].scaling == dict(zip(names, (1.0, -0.5, 0.25), strict=True))
        assert torch.equal(worn[Q].lora_A[names[0]].weight, worn[Q].lora_A[names[2]].weight)
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors", Lora("a.safetensors", 1.0)),
        ("a.safetensors:0.8", Lora("a.safetensors", 0.8)),
        ("a:b.safetensors", Lora("a:b.safetensors", 1.0)),
        ("a:b.safetensors:-1e-1", Lora("a:b.safetensors", -0.1)),
    ],
)
def test_a_strength_stands_behind_a_colon(text: str, lora: Lora) -> None:
    assert Lora.parse(text) == lora == Lora.parse(str(lora), 3.0)


def kohya(name: str, inputs: int, outputs: int, **others: tuple[int, ...]) -> Shapes:
    factors = {"lora_down.weight": (4, inputs), "lora_up.weight": (outputs, 4), "alpha": ()}
    return {f"lora_unet_{name}.{leaf}": shape for leaf, shape in (factors | others).items()}


def xlabs(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.down.weight": (4, inputs), f"{name}.up.weight": (outputs, 4)}


@pytest.mark.parametrize(
    ("shapes", "layers"),
    [
        (kohya("double_blocks_0_img_attn_qkv", 64, 192), {Q, Q.replace("_q", "_k"), Q.replace("_q", "_v")}),
        (xlabs("double_blocks.0.processor.proj_lora1", 64, 64), {"transformer_blocks.0.attn.to_out.0"}),
        (GOOD, {Q, OUT}),
        ({f"transformer.{Q}.lora.down.weight": (4, 64), f"transformer.{Q}.lora.up.weight": (64, 4)}, {Q}),
        (peft(Q, 48, 64), {Q}),
    ],
    ids=["kohya", "xlabs", "peft", "old names", "fewer inputs"],
)
def test_other_trainers_files_load(
    shapes: Shapes, layers: set[str], pipe: FluxPipeline, write: Callable[..., Path]
) -> None:
    try:
        load_loras(pipe, [write(shapes)])
        assert set(wrappers(pipe.transformer)) == layers
    finally:
        pipe.unload_lora_weights()


def test_text_encoders_take_their_part(pipe: FluxPipeline, write: Callable[..., Path]) -> None:
    path, size = "text_model.encoder.layers.0.self_attn.q_proj", pipe.text_encoder.config.hidden_size
    try:
        load_loras(pipe, [write({**GOOD, **peft(path, size, size, prefix="text_encoder.")})])
        assert set(pipe.get_list_adapters()) == {"transformer", "text_encoder"}
    finally:
        pipe.unload_lora_weights()


def test_convolutions_and_kohyas_names_in_a_unet(unet_folder: Path, write: Callable[..., Path]) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(unet_folder)
    conv = "down_blocks.0.resnets.0.conv1"
    n, c, *kernel = pipe.unet.get_submodule(conv).weight.shape
    convolved = {f"unet.{conv}.lora_A.weight": (4, c, *kernel), f"unet.{conv}.lora_B.weight": (n, 4, 1, 1)}
    to_q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    load_loras(pipe, [write(convolved, "c.safetensors"), write(kohya(to_q, 32, 32), "k.safetensors")])
    assert set(wrappers(pipe.unet)) == {conv, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"}
    flux = r"LoRA .*: 4 of 4 tensors match no layer of this StableDiffusionPipeline.*looks like a LoRA for FLUX.1"
    with pytest.raises(UserError, match=flux):
        load_loras(pipe, [write(GOOD)])


SDXL = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            peft(SDXL[5:], 2048, 64, prefix="unet."),
            r"2 of 2 tensors match no layer.*FluxPipeline, such as 'unet\.down.*for Stable Diffusion XL;",
        ),
        (
            {**GOOD, **peft("transformer_blocks.7.attn.to_q", 64, 64)},
            r"2 of 6 tensors .* such as 'transformer\.transformer_blocks\.7",
        ),
        ({**GOOD, "transformer.foo.weight": (3,)}, r"1 of 5 tensors match no layer"),
        (peft(Q, 3072, 64), r"is for 3072 inputs and the layer has 64: the file is for another size of model"),
        (peft(Q, 64, 3072), r"is for 3072 outputs and the layer has 64"),
        ({**peft(Q, 64, 64), f"transformer.{Q}.lora_B.weight": (64, 3)}, r"lora_A of rank 4 and lora_B of rank 3"),
        ({f"transformer.{Q}.lora_A.weight": (4, 64)}, r"lora_A of rank 4 for .*: expected two factors"),
        (kohya("double_blocks_0_img_attn_proj", 64, 64, dora_scale=(64, 1)), r"DoRA in a form whose scales"),
        (
            kohya("input_blocks_4_1_transformer_blocks_0_attn2_to_k", 768, 64),
            r"none that diffusers can read for FluxPipeline.*for Stable Diffusion 1;",
        ),
        (peft(Q, 64, 64, prefix=""), rf"such as '{Q}.lora_A.weight': expected 'transformer.{Q}.lora_A.weight'; rename"),
        (
            peft(Q, 64, 64, prefix="base_model.model."),
            rf"such as 'base_model.model.{Q}.lora_A.weight': expected 'transformer.{Q}.lora_A.weight'; rename",
        ),
        ({"foo": (3,)}, r"1 of 1 tensors .*looks like no LoRA of a model that bittern knows"),
        ({}, r"0 of 0 tensors"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_whole(
    shapes: Shapes, message: str, pipe: FluxPipeline, write: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_loras(pipe, [write(GOOD, "good.safetensors"), write(shapes)])
    assert "\n" not in str(caught.value)
    assert not wrappers(pipe.transformer) and not pipe.get_active_adapters()


def test_damaged_and_foreign_files(pipe: FluxPipeline, write: Callable[..., Path], tmp_path: Path) -> None:
    data = write(GOOD).read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut.safetensors cannot be read .* damaged or incomplete"):
            load_loras(pipe, [tmp_path / "cut.safetensors"])
    (tmp_path / "lora.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"lora.bin is not safetensors"):
        load_loras(pipe, [tmp_path / "lora.bin"])
    for missing in ("/nowhere/a.safetensors:0.5", str(tmp_path)):
        with pytest.raises(
            UserError, match=r"no LoRA .*: expected a .safetensors file|holds no LoRA: expected pytorch_lora_weights"
        ):
            load_loras(pipe, [missing])
    with pytest.raises(UserError, match="strength nan: expected a finite number"):
        load_loras(pipe, [f"{tmp_path / 'some.safetensors'}:nan"])
    assert not wrappers(pipe.transformer)


def metadata(**settings: Any) -> dict[str, str]:
    said = {"r": 4, "lora_alpha": 4, "target_modules": [Q], **settings}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in said.items()})}


A, B = (f"transformer.{Q}.lora_{ab}.weight" for ab in "AB")
WHOLE = {A: torch.ones(4, 64), B: torch.ones(64, 4)}


@pytest.mark.parametrize(
    ("change", "said", "message"),
    [
        ({A: torch.ones(4, 64).to(torch.int8)}, None, rf"has torch.int8 for '{A}': expected a float type"),
        ({A: torch.ones(4, 64, 1), B: torch.ones(64, 4, 1)}, None, r"has shape \[4, 64, 1\]: expected \[rank, 64\]"),
        ({A: torch.ones(4)}, None, r"has shape \[4\]: expected \[rank, 64\]"),
        ({B: torch.ones(64)}, None, r"has shape \[64\]: expected \[64, rank\]"),
        ({A: torch.ones(0, 64), B: torch.ones(64, 0)}, None, r"lora_A of rank 0 and lora_B of rank 0"),
        ({f"transformer.{Q}.alpha": torch.ones(3)}, None, r"has \[3\] values for .*alpha': expected one"),
        ({B: torch.full((64, 4), torch.nan)}, None, rf"256 of 256 values of '{B}' are NaN or infinite"),
        ({A: torch.tensor([[torch.inf] + [0.0] * 63] * 4)}, None, rf"4 of 256 values of '{A}' are NaN or infinite"),
        ({}, {"lora_adapter_metadata": "[1]"}, "is no JSON mapping"),
        ({}, {"lora_adapter_metadata": "{"}, "is no JSON mapping"),
        ({}, {"lora_adapter_metadata": '{"foo": 1}'}, "has 'foo', which is no setting of peft's"),
        ({}, {"lora_adapter_metadata": "{}"}, "has transformer.r None and .* is of rank 4"),
        ({}, metadata(r=8), f"has transformer.r 8 and 'transformer.{Q}' is of rank 4"),
        ({}, metadata(extra=8), "has 'transformer.extra', which is no setting"),
        # What no check foresees.
        ({}, metadata(rank_pattern={"to_q": 3}), "cannot be loaded by diffusers into this FluxPipeline .*nothing was"),
        ({}, metadata(lora_alpha="4"), "cannot be loaded by diffusers"),
    ],
)
def test_a_file_that_is_wrong_inside_leaves_nothing_loaded(
    change: dict[str, Tensor],
    said: dict[str, str] | None,
    message: str,
    pipe: FluxPipeline,
    write: Callable[..., Path],
    tmp_path: Path,
) -> None:
    save_file({**WHOLE, **change}, tmp_path / "wrong.safetensors", said)
    with pytest.raises(UserError, match=message) as caught:
        load_loras(pipe, [write(GOOD), tmp_path / "wrong.safetensors"])
    assert "\n" not in str(caught.value)
    assert not wrappers(pipe.transformer) and not getattr(pipe.transformer, "peft_config", {})
    # With an adapter that was there before, it counts as it did.
    names = load_loras(pipe, [f"{write(GOOD, 'before.safetensors')}:0.5"])
    try:
        with pytest.raises(UserError):
            load_loras(pipe, [write(GOOD), tmp_path / "wrong.safetensors"])
        assert pipe.get_list_adapters() == {"transformer": names} and pipe.get_active_adapters() == names
        assert {layer.scaling["before"] for layer in wrappers(pipe.transformer).values()} == {0.5}
    finally:
        pipe.unload_lora_weights()


def test_settings_of_a_file_that_fit(pipe: FluxPipeline, tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "right.safetensors", metadata(lora_alpha=2))
    try:
        load_loras(pipe, [tmp_path / "right.safetensors"])
        assert wrappers(pipe.transformer)[Q].scaling == {"right": 0.5}
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize(("leaf", "kind"), [("lokr_w", "LoKr"), ("hada_w", "LoHa")])
@pytest.mark.parametrize("prefix", [f"transformer.{Q}.", "lora_unet_double_blocks_0_img_attn_proj."])
def test_kinds_whose_files_diffusers_does_not_read(
    prefix: str, leaf: str, kind: str, pipe: FluxPipeline, write: Callable[..., Path]
) -> None:
    file = write({f"{prefix}{leaf}1": (8, 8), f"{prefix}{leaf}2": (8, 8)})
    with pytest.raises(UserError, match=rf"is a {kind}, whose files diffusers does not read for FluxPipeline: "):
        load_loras(pipe, [file])
    assert not wrappers(pipe.transformer)


@pytest.mark.parametrize("alpha", [-2.0, float("nan"), float("inf")])
def test_an_alpha_that_diffusers_would_never_come_to_terms_with(
    alpha: float, pipe: FluxPipeline, write: Callable[..., Path]
) -> None:
    name = "lora_unet_double_blocks_0_img_attn_proj.alpha"
    file = write(kohya("double_blocks_0_img_attn_proj", 64, 64), **{name: torch.tensor(alpha)})
    with pytest.raises(UserError, match=rf"has {alpha} for '{name}': expected a finite number"):
        load_loras(pipe, [file])


@pytest.mark.parametrize(
    ("name", "shape", "family"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (4, 64), "FLUX.1 or FLUX.2"),
        ("transformer.double_stream_modulation_img.linear.lora_A.weight", (4, 64), "FLUX.2"),
        ("transformer.transformer_blocks.0.ff_context.net.2.lora_A.weight", (4, 64), "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight", (4, 64), "Qwen-Image"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (4, 64), "Stable Diffusion XL"),
        (f"{SDXL}.lora_A.weight", (4, 768), "Stable Diffusion 1"),
        (f"{SDXL}.lora_A.weight", (4, 1024), "Stable Diffusion 2"),
        (f"{SDXL}.lora_A.weight", (4, 5), "Stable Diffusion 1, 2 or XL"),
        ("diffusion_model.blocks.3.self_attn.q.lora_A.weight", (4, 64), "Wan"),
        ("diffusion_model.layers.3.attention.to_q.lora_A.weight", (4, 64), "Z-Image"),
        ("encoder.layer.0.query.lora_A.weight", (4, 64), None),
    ],
)
def test_families_by_their_names(name: str, shape: tuple[int, ...], family: str | None) -> None:
    assert looks_like({name: shape}) == family
