"""Few-bit models as Nunchaku's files and Lite folders, and these back: the same layers, or the reason why not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import bittern
import nunchaku_files as files
from bittern import recipes
from bittern.checkpoints.nunchaku import describe
from bittern.conversion import export_checkpoint, import_checkpoint
from bittern.errors import UserError
from converted import agree, inputs, layer, load, their_model
from families import FAMILIES

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = {**files.SMALL, "num_single_layers": 1}
SINGLE, DOUBLE = "single_transformer_blocks.0", "transformer_blocks.0"


def quantized(folder: Path, recipe: recipes.Recipe | str = "svdquant-fast", config: dict[str, Any] = CONFIG) -> Path:
    """A few-bit model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel.from_config(config).to(torch.bfloat16).eval()
    bittern.quantize(model, recipe)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("few-bit") / "model", svdquant())


@pytest.fixture(scope="module")
def lite(few_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lite") / "model"
    export_checkpoint(few_bit, folder, "nunchaku-lite")
    return folder


def test_a_lite_folder_passes_diffusers_own_check(lite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, model, count = their_model(monkeypatch, lite, FluxTransformer2DModel)
    assert count == 14 + 6
    stored = load_file(lite / WEIGHTS)
    del stored[f"{DOUBLE}.attn.to_q.smooth_factor"]
    with pytest.raises(ValueError, match="smooth_factor"):
        reader.check_strict_state_dict_match(model, stored)


def test_lite_layers_mean_what_ours_compute(few_bit: Path, lite: Path) -> None:
    model, stored = load(few_bit), load_file(lite / WEIGHTS)
    config = json.loads((lite / "config.json").read_text())["quantization_config"]
    assert {path.rpartition(".")[2] for path in config["awq_w4a16"]["targets"]} == {"linear"}
    for path in config["svdq_w4a4"]["targets"]:
        own = layer(model, path)
        x = inputs(own.in_features)
        agree(own(x), files.meaning(files.of_layer(stored, path), own.out_features, own.in_features)(x))
    for path in config["awq_w4a16"]["targets"]:
        own = layer(model, path)
        x = inputs(own.in_features)
        agree(own(x), files.awq_meaning(files.of_layer(stored, path), 1)(x))


def test_original_layers_mean_what_ours_compute(few_bit: Path, tmp_path: Path) -> None:
    written = export_checkpoint(few_bit, tmp_path / "f.safetensors", "nunchaku")
    model, stored = load(few_bit), load_file(tmp_path / "f.safetensors")
    assert (written.layers, written.rank) == (20, 32)

    def packed(name: str, n: int, k: int, shift: float = 0.0) -> Callable[[Tensor], Tensor]:
        return files.meaning(files.of_layer(stored, name), n, k, shift=shift)

    x, wide = inputs(128), inputs(512)
    for block in (SINGLE, DOUBLE):
        qkv = [layer(model, f"{block}.attn.{name}")(x) for name in ("to_q", "to_k", "to_v")]
        agree(torch.cat(qkv, dim=-1), packed(f"{block}.qkv_proj", 384, 128)(x))
    # Biases that lose a correction of their own size are rounded to 16 bits behind it.
    y = layer(model, f"{DOUBLE}.ff_context.net.2")(wide)
    expected = packed(f"{DOUBLE}.mlp_context_fc2", 128, 512, files.SHIFT)(wide)
    assert float((y.detach().double() - expected).norm() / expected.norm()) < 2e-3
    y = layer(model, f"{SINGLE}.proj_out")([x, wide])
    expected = packed(f"{SINGLE}.out_proj", 128, 128)(x) + packed(f"{SINGLE}.mlp_fc2", 128, 512, files.SHIFT)(wide)
    assert float((y.detach().double() - expected).norm() / expected.norm()) < 2e-3
    own = layer(model, f"{DOUBLE}.norm1.linear")(x)
    expected = files.awq_meaning(files.of_layer(stored, f"{DOUBLE}.norm1.linear"), 6)(x)
    assert float((own.detach().double() - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_original_files_come_back_bit_for_bit(tmp_path: Path, symmetric: bool, dtype: torch.dtype) -> None:
    file = tmp_path / "f.safetensors"
    before = files.write_flux(file, symmetric=symmetric, dtype=dtype)
    # Of two biases that are added only the sum is known.
    before["single_transformer_blocks.0.out_proj.bias"].zero_()
    before["single_transformer_blocks.1.out_proj.bias"] = torch.zeros(128, dtype=dtype)
    save_file(before, file, files.metadata(files.SMALL))
    import_checkpoint(file, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again.safetensors", "nunchaku")
    after = load_file(tmp_path / "again.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if name.endswith("fc2.bias"):
            # In between it had a correction of 0.1 to 10 added, in float32.
            assert torch.allclose(after[name].float(), tensor.float(), rtol=0, atol=1e-6), name
        elif not name.endswith("smooth_orig"):
            assert torch.equal(after[name], tensor), name
    with safe_open(tmp_path / "again.safetensors", "pt") as handle:
        said = handle.metadata()
    assert json.loads(said["quantization_config"])["rank"] == 32
    comfy = json.loads(said["comfy_config"])
    assert comfy["model_class"] == "FluxSchnell" and comfy["model_config"]["hidden_size"] == 128
    assert comfy["model_config"]["depth"] == 1 and comfy["model_config"]["depth_single_blocks"] == 2
    import_checkpoint(tmp_path / "again.safetensors", tmp_path / "ours again")
    ours, again = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "ours again"))
    assert ours.keys() == again.keys()
    for name, tensor in ours.items():
        assert torch.allclose(again[name].float(), tensor.float(), rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("changes", "name", "channels"),
    [({}, "Flux", 16), ({"guidance_embeds": False}, "FluxSchnell", 16), ({"in_channels": 384}, "Flux", 96)],
)
def test_what_nodes_for_comfyui_are_told(changes: dict[str, Any], name: str, channels: int) -> None:
    """FLUX.1's sizes under the keys of the configs that Nunchaku publishes."""
    config = {key: value for key, value in {**files.FULL, **changes}.items() if key != "axes_dims_rope"}
    config["out_channels"] = 64
    defaults = {"axes_dims_rope": (16, 56, 56), "in_channels": 1}
    said = describe("FluxTransformer2DModel", config, "int4", 32, defaults)
    assert json.loads(said["comfy_config"]) == {
        "model_class": name,
        "model_config": {
            "image_model": "flux",
            "in_channels": channels,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "depth": 19,
            "depth_single_blocks": 38,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": name == "Flux",
            "disable_unet_model_creation": True,
        },
    }


def test_from_pretrained_takes_a_lite_folder(few_bit: Path, lite: Path, tmp_path: Path) -> None:
    import_checkpoint(lite, tmp_path / "converted")
    direct, converted, original = load(lite), load(tmp_path / "converted"), load(few_bit)
    for (name, tensor), other in zip(direct.state_dict().items(), converted.state_dict().values(), strict=True):
        assert name.endswith(".weight") or torch.equal(tensor, other), name
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        images = [model(**given).sample for model in (direct, original)]
    assert torch.equal(*images)
    # q, k and v have one smoothing and one first factor in the file, and so they are a group again.
    attn = direct.transformer_blocks[0].attn
    assert attn.to_q.group is attn.to_v.group is not None
    direct.save_pretrained(tmp_path / "saved")
    assert bittern.inspect(tmp_path / "saved").recipe == "nunchaku-lite-int4"


def test_a_lite_pipeline_draws_as_the_manual_loads_it(tiny_random_folder: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = FluxTransformer2DModel.load_config(tiny_random_folder / "transformer")
        model = FluxTransformer2DModel.from_config({**own, "num_attention_heads": 4})
    pipe = diffusers.FluxPipeline.from_pretrained(tiny_random_folder, transformer=model)
    bittern.quantize(pipe, svdquant())
    pipe.save_pretrained(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "lite", "nunchaku-lite")
    manual = (Path(__file__).parents[1] / "docs" / "engines.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", manual, re.S)
    found: dict[str, Any] = {}
    exec(example.replace("a-nunchaku-lite-folder", str(tmp_path / "lite")), found)
    again: Any = found["pipe"]
    again.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16, "guidance_scale": 0.0}
    assert torch.isfinite(again("a red cat", **size, output_type="pt").images).all()


def test_a_lite_folder_in_shards(lite: Path, tmp_path: Path) -> None:
    tensors = load_file(lite / WEIGHTS)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, tmp_path / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((lite / "config.json").read_text())
    for (name, tensor), other in zip(
        load(tmp_path).state_dict().items(), load(lite).state_dict().values(), strict=True
    ):
        assert name.endswith(".weight") or torch.equal(tensor, other), name


def test_where_diffusers_reads_lite_folders_it_does(monkeypatch: pytest.MonkeyPatch, lite: Path) -> None:
    from diffusers.quantizers import DiffusersAutoQuantizer, auto

    described = json.loads((lite / "config.json").read_text())["quantization_config"]
    assert isinstance(DiffusersAutoQuantizer.from_dict(described), bittern.QuantizationConfig)
    monkeypatch.setattr(auto.AUTO_QUANTIZER_MAPPING["nunchaku_lite"], "validate_environment", lambda self: None)
    assert isinstance(DiffusersAutoQuantizer.from_dict(described), diffusers.NunchakuLiteQuantizationConfig)


def svdquant(default: dict[str, Any] | None = None, **changes: Any) -> recipes.Recipe:
    quick = {"rounds": 0, "scales": "absmax", **(default or {})}
    return recipes.load("svdquant-fast").override(default=quick, **changes)


@pytest.mark.parametrize(
    ("recipe", "to", "message"),
    [
        ("ternary-fast", "nunchaku-lite", "has no ternary weights"),
        (svdquant(overrides={"*.attn.to_out.0": {"rank": 16}}), "nunchaku-lite", "one rank for all layers"),
        (svdquant(default={"group_size": 32}, modulation={"group_size": 64}), "nunchaku-lite", "groups of 32"),
        (svdquant(default={"activations": 8}), "nunchaku", "solved for 8-bit activations"),
        (svdquant(modulation={"activations": 4}), "nunchaku", "packs it for 16-bit activations"),
        (svdquant(default={"scale_dtype": "fp32"}), "nunchaku-lite", "these are fp32"),
        (svdquant(default={"branch_dtype": "fp32"}), "nunchaku-lite", "mixes bf16 and fp32"),
        (svdquant(keep=["transformer_blocks.0.ff.net.2"]), "nunchaku", "ff.net.2 was kept in 16 bits"),
        (
            svdquant(overrides={"transformer_blocks.0.attn.to_q": {"smoothing_exponent": 0.3}}),
            "nunchaku",
            "shares no smoothing with transformer_blocks.0.attn.to_q",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, recipe: Any, to: str, message: str) -> None:
    source = quantized(tmp_path / "few-bit", recipe)
    with pytest.raises(UserError, match=message) as caught:
        export_checkpoint(source, tmp_path / ("out.safetensors" if to == "nunchaku" else "out"), to)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["few-bit"]


def test_ranks_are_filled_up_to_whole_tiles(tmp_path: Path) -> None:
    source = quantized(tmp_path / "few-bit", svdquant(default={"rank": 10}))
    written = export_checkpoint(source, tmp_path / "lite", "nunchaku-lite")
    assert written.rank == 16 and any("filled up with zeros" in note for note in written.notes)
    model, path = load(source), f"{SINGLE}.proj_mlp"
    stored, own = load_file(tmp_path / "lite" / WEIGHTS), layer(model, path)
    x = inputs(own.in_features)
    agree(own(x), files.meaning(files.of_layer(stored, path), own.out_features, own.in_features)(x))


NVFP4 = {"weight": "nvfp4", "group_size": 16, "scale_dtype": "e4m3"}
INT4 = {"weight": "int4", "group_size": 64, "scale_dtype": "bf16"}


@pytest.mark.parametrize("to", ["nunchaku-lite", "nunchaku"])
def test_nvfp4_goes_out_and_comes_back(tmp_path: Path, to: str) -> None:
    source = quantized(tmp_path / "few-bit", svdquant(NVFP4, modulation=INT4))
    out = tmp_path / ("f.safetensors" if to == "nunchaku" else "lite")
    export_checkpoint(source, out, to)
    import_checkpoint(out, tmp_path / "back")
    before, after = load(source), load(tmp_path / "back")
    x, wide = inputs(128), inputs(512)
    for path in (f"{DOUBLE}.attn.to_k", f"{DOUBLE}.attn.to_add_out", f"{SINGLE}.proj_mlp"):
        assert torch.equal(layer(after, path)(x), layer(before, path)(x)), path
    assert torch.equal(layer(after, f"{DOUBLE}.ff.net.2")(wide), layer(before, f"{DOUBLE}.ff.net.2")(wide))
    agree(
        layer(after, f"{SINGLE}.proj_out")([x, wide]), layer(before, f"{SINGLE}.proj_out")([x, wide]).detach().double()
    )
    stored = load_file(out if to == "nunchaku" else out / WEIGHTS)
    name = f"{DOUBLE}.mlp_fc2" if to == "nunchaku" else f"{DOUBLE}.ff.net.2"
    agree(layer(before, f"{DOUBLE}.ff.net.2")(wide), files.meaning(files.of_layer(stored, name), 128, 512)(wide))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nvfp4_files_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """Scales of rows and of the tensor, which are one number here, are found again as products."""
    stored = files.write_flux(tmp_path / "f.safetensors", weight="nvfp4", dtype=dtype)
    import_checkpoint(tmp_path / "f.safetensors", tmp_path / "ours")
    written = export_checkpoint(tmp_path / "ours", tmp_path / "again.safetensors", "nunchaku")
    assert any(f"biases are stored in {dtype}: wider ones are rounded" in note for note in written.notes)
    again, products = load_file(tmp_path / "again.safetensors"), 0
    for name, tensor in stored.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "wcscales":
            before, after = (t[name].float() * t[f"{path}.wtscale"].float() for t in (stored, again))
            assert torch.equal(before, after), name
            products += 1
        elif leaf in ("qweight", "wscales"):
            assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), name
    assert products == 8 + 2 * 4


def test_nvfp4_lite_folders_come_back(tmp_path: Path) -> None:
    """The single block's last layer reads two tensors and has one scale a row."""
    source = quantized(tmp_path / "few-bit", svdquant(NVFP4, modulation=INT4))
    export_checkpoint(source, tmp_path / "lite", "nunchaku-lite")
    tensors = load_file(tmp_path / "lite" / WEIGHTS)
    tensors = {name: t * 1.25 if name.endswith("wcscales") else t for name, t in tensors.items()}
    tensors = {name: t * 1.1 if name.endswith("wtscale") else t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "lite" / WEIGHTS, {"format": "pt"})
    import_checkpoint(tmp_path / "lite", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again", "nunchaku-lite")
    again, k = load_file(tmp_path / "again" / WEIGHTS), 128 + 512
    x = inputs(k)
    before, after = (files.meaning(files.of_layer(t, f"{SINGLE}.proj_out"), 128, k)(x) for t in (tensors, again))
    agree(after, before)


def test_row_scales_of_more_than_16_bits(tmp_path: Path) -> None:
    files.write_flux(tmp_path / "f.safetensors", weight="nvfp4")
    import_checkpoint(tmp_path / "f.safetensors", tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    rows = tensors[f"{DOUBLE}.attn.to_q.row_scales"]
    rows.copy_(torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    save_file(tensors, tmp_path / "ours" / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="need more than 16 bits"):
        export_checkpoint(tmp_path / "ours", tmp_path / "again.safetensors", "nunchaku")


def test_layers_that_fill_no_tile(tmp_path: Path) -> None:
    source = quantized(tmp_path / "few-bit", svdquant(), {**CONFIG, "num_attention_heads": 6})
    with pytest.raises(UserError, match="multiples of 128 only"):
        export_checkpoint(source, tmp_path / "lite", "nunchaku-lite")
    export_checkpoint(source, tmp_path / "f.safetensors", "nunchaku")
    model, stored = load(source), load_file(tmp_path / "f.safetensors")
    own = layer(model, f"{DOUBLE}.attn.to_out.0")
    x = inputs(192)
    agree(own(x), files.meaning(files.of_layer(stored, f"{DOUBLE}.out_proj"), 192, 192)(x))


def test_other_mistakes(few_bit: Path, lite: Path, tmp_path: Path) -> None:
    for source, out, to, message in (
        (few_bit, "out", "nunchaku-light", "did you mean 'nunchaku-lite'"),
        (few_bit, "out", "comfyui", "no layers with smoothing and a low-rank branch: convert FLUX.1 with --to"),
        (few_bit, "out", "nunchaku", "expected the name of a .safetensors file"),
        (few_bit, "out.safetensors", "nunchaku-lite", "is the name of a file: expected that of a folder"),
        (lite, "out", "nunchaku-lite", "is no few-bit model of bittern's"),
        (tmp_path / "absent", "out", "nunchaku-lite", "no folder"),
        (few_bit, few_bit / "f.safetensors", "nunchaku", "lies in the model"),
    ):
        with pytest.raises(UserError, match=message):
            export_checkpoint(source, tmp_path / out, to)
    (tmp_path / "f.safetensors").write_text("mine")
    with pytest.raises(UserError, match="is there"):
        export_checkpoint(few_bit, tmp_path / "f.safetensors", "nunchaku")
    assert (tmp_path / "f.safetensors").read_text() == "mine"
    with pytest.raises(UserError, match="is packed for Nunchaku Lite: bittern convert"):
        bittern.inspect(lite)
    with pytest.raises(UserError, match="is a few-bit model of bittern"):
        import_checkpoint(few_bit, tmp_path / "out")
    (tmp_path / "deep").mkdir()
    config = json.loads((lite / "config.json").read_text())
    (tmp_path / "deep" / "config.json").write_text(json.dumps({**config, "num_layers": 10**6}))
    (tmp_path / "deep" / WEIGHTS).symlink_to(lite / WEIGHTS)
    with pytest.raises(UserError, match=r"config\.json has num_layers 1000000, and there are"):
        import_checkpoint(tmp_path / "deep", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["svdq_w4a4"].update(rank=48), "has rank 32: expected 48"),
        (lambda c: c["svdq_w4a4"].update(rank="32"), "rank '32': expected a positive whole number"),
        (
            lambda c: c["svdq_w4a4"].update(precision="nvfp4", group_size=16),
            "says that its weights are nvfp4 and holds int4",
        ),
        (lambda c: c.update(compute_dtype="float99"), "compute_dtype 'float99': "),
        (lambda c: c["svdq_w4a4"].update(precision="int3"), "did you mean 'int4'"),
        (lambda c: c["svdq_w4a4"].update(group_size=32), "group_size 32: expected 64"),
        (
            lambda c: c["svdq_w4a4"]["targets"].append("transformer_blocks.9.x"),
            "is no linear of FluxTransformer2DModel",
        ),
        (lambda c: c["svdq_w4a4"]["targets"].append(f"{DOUBLE}.attn.to_q"), "names the target .* twice"),
        (lambda c: c["svdq_w4a4"]["targets"].pop(0), "is missing|belongs to no layer"),
        (lambda c: c["awq_w4a16"].update(targets=[]), "empty list of targets"),
        (lambda c: c["awq_w4a16"].update(precision="nvfp4"), "awq_w4a16 is 'nvfp4'"),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
    ],
)
def test_lite_descriptions_that_do_not_fit(lite: Path, tmp_path: Path, change: Any, message: str) -> None:
    config = json.loads((lite / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "lite").mkdir()
    (tmp_path / "lite" / "config.json").write_text(json.dumps(config))
    (tmp_path / "lite" / WEIGHTS).symlink_to(lite / WEIGHTS)
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "lite", tmp_path / "out")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "lite")


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another family, whose linears have no biases."""
    folder = tmp_path_factory.mktemp("flux2") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.Flux2Transformer2DModel(**{**FAMILIES["flux2"].tiny, "num_attention_heads": 8})
    bittern.quantize(model.to(torch.bfloat16).eval(), svdquant())
    model.save_pretrained(folder)
    return folder


def test_layers_without_biases_of_another_family(flux2: Path, tmp_path: Path) -> None:
    export_checkpoint(flux2, tmp_path / "lite", "nunchaku-lite")
    stored = load_file(tmp_path / "lite" / WEIGHTS)
    assert not any(name.startswith(("transformer_blocks", "single_")) and name.endswith(".bias") for name in stored)
    read = diffusers.Flux2Transformer2DModel.from_pretrained
    models = [read(place, dtype=torch.float32) for place in (flux2, tmp_path / "lite")]
    given = FAMILIES["flux2"].call()
    with torch.no_grad():
        images = [model(**given).sample for model in models]
    assert torch.equal(*images)
    with pytest.raises(UserError, match="Flux2Transformer2DModel has no original Nunchaku file"):
        export_checkpoint(flux2, tmp_path / "f.safetensors", "nunchaku")


def test_a_bias_that_was_added(flux2: Path, tmp_path: Path) -> None:
    path = f"{DOUBLE}.attn.to_out.0"
    config = json.loads((flux2 / "config.json").read_text())
    config["quantization_config"]["targets"][path]["bias"] = True
    tensors = {**load_file(flux2 / WEIGHTS), f"{path}.bias": torch.ones(128, dtype=torch.bfloat16)}
    (tmp_path / "few-bit").mkdir()
    (tmp_path / "few-bit" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "few-bit" / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=f"{path}.bias was added by the solver: in Nunchaku Lite"):
        export_checkpoint(tmp_path / "few-bit", tmp_path / "lite", "nunchaku-lite")


@pytest.mark.parametrize("leaf", ["scales", "up", "down"])
@pytest.mark.parametrize("to", ["nunchaku", "nunchaku-lite"])
def test_numbers_that_are_not_finite_are_not_passed_on(few_bit: Path, tmp_path: Path, leaf: str, to: str) -> None:
    shutil.copytree(few_bit, tmp_path / "few-bit")
    tensors = load_file(tmp_path / "few-bit" / WEIGHTS)
    name = f"{DOUBLE}.attn.to_out.0.{leaf}"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "few-bit" / WEIGHTS, {"format": "pt"})
    out = tmp_path / ("out" if to == "nunchaku-lite" else "out.safetensors")
    with pytest.raises(UserError, match=f"{re.escape(name)}.*1 of .* values are NaN or infinite"):
        export_checkpoint(tmp_path / "few-bit", out, to)
    assert not out.exists()
