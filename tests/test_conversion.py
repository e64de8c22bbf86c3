"""Files of Nunchaku's, read: what the model computes is what the file means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import bittern
import nunchaku_files as files
from bittern.conversion import import_checkpoint
from bittern.errors import UserError
from bittern.layers import quant_layers
from converted import agree, inputs, layer, load

PADDED = {**files.SMALL, "num_attention_heads": 6, "num_single_layers": 1}
"""192 wide: no multiple of 128."""

DOUBLE = {
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_proj_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "out_proj": ("attn.to_out.0",),
    "out_proj_context": ("attn.to_add_out",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "mlp_context_fc1": ("ff_context.net.0.proj",),
    "mlp_context_fc2": ("ff_context.net.2",),
}


def check_all(model: FluxTransformer2DModel, tensors: dict[str, Tensor], config: dict[str, Any], shift: float) -> None:
    """Every layer of the model against the file's meaning."""
    hidden = config["attention_head_dim"] * config["num_attention_heads"]
    seen: set[str] = set()

    def packed(name: str, n: int, k: int, by: float = 0.0) -> Callable[[Tensor], Tensor]:
        return files.meaning(files.of_layer(tensors, name), n, k, shift=by)

    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}"
        for name, targets in DOUBLE.items():
            layers = [layer(model, f"{block}.{target}") for target in targets]
            x, n = inputs(layers[0].in_features), sum(each.out_features for each in layers)
            run = packed(f"{block}.{name}", n, x.shape[1], shift if name.endswith("fc2") else 0.0)
            agree(torch.cat([each(x) for each in layers], dim=-1), run(x))
            seen.update(f"{block}.{target}" for target in targets)
        for norm in ("norm1.linear", "norm1_context.linear"):
            check_modulation(model, tensors, f"{block}.{norm}", 6, hidden)
            seen.add(f"{block}.{norm}")
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            own = getattr(model.transformer_blocks[index].attn, norm).weight
            assert torch.equal(own, tensors[f"{block}.{norm}.weight"].float())
    for index in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{index}"
        attention, mlp, x = inputs(hidden), inputs(4 * hidden), inputs(hidden)
        qkv = [layer(model, f"{block}.attn.{name}") for name in ("to_q", "to_k", "to_v")]
        agree(torch.cat([each(x) for each in qkv], dim=-1), packed(f"{block}.qkv_proj", 3 * hidden, hidden)(x))
        agree(layer(model, f"{block}.proj_mlp")(x), packed(f"{block}.mlp_fc1", 4 * hidden, hidden)(x))
        both = packed(f"{block}.out_proj", hidden, hidden)(attention)
        both = both + packed(f"{block}.mlp_fc2", hidden, 4 * hidden, shift)(mlp)
        agree(layer(model, f"{block}.proj_out")([attention, mlp]), both)
        check_modulation(model, tensors, f"{block}.norm.linear", 3, hidden)
        seen |= {f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")}
        seen.add(f"{block}.norm.linear")
    assert seen == set(quant_layers(model))


def check_modulation(
    model: FluxTransformer2DModel, tensors: dict[str, Tensor], path: str, splits: int, hidden: int
) -> None:
    x = inputs(hidden)
    agree(layer(model, path)(x), files.awq_meaning(files.of_layer(tensors, path), splits)(x))


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("config", [files.SMALL, PADDED], ids=["whole tiles", "padded"])
def test_layers_compute_what_the_file_means(
    tmp_path: Path, config: dict[str, Any], symmetric: bool, newer: bool
) -> None:
    tensors = files.write_flux(tmp_path / "f.safetensors", config, newer=newer, symmetric=symmetric)
    report = import_checkpoint(tmp_path / "f.safetensors", tmp_path / "out")
    model = load(tmp_path / "out")
    check_all(model, tensors, config, files.SHIFT)
    assert report.recipe == "nunchaku-int4"
    assert bittern.inspect(model).bytes == report.bytes + bias_bytes(model, tmp_path / "out")
    # Symmetric weights need no branch for what they are off centre.
    assert model.transformer_blocks[0].norm1.linear.scheme.rank == (0 if symmetric else config_width(config) // 64)


@pytest.mark.parametrize("config", [files.SMALL, PADDED], ids=["whole tiles", "padded"])
@pytest.mark.parametrize("without", [(), ("wcscales",), ("wtscale",), ("wcscales", "wtscale")], ids=str)
def test_nvfp4_layers_compute_what_the_file_means(
    tmp_path: Path, config: dict[str, Any], without: tuple[str, ...]
) -> None:
    tensors = files.flux_tensors(config, weight="nvfp4")
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in without}
    save_file(tensors, tmp_path / "f.safetensors", files.metadata(config, weight="nvfp4"))
    report = import_checkpoint(tmp_path / "f.safetensors", tmp_path / "out")
    model = load(tmp_path / "out")
    few_bit = quant_layers(model)["transformer_blocks.0.ff.net.2"]
    assert few_bit.choice().path == "a8-int8" and few_bit.scheme.weight == "nvfp4" and not few_bit.scheme.shift
    check_all(model, tensors, config, 0.0)
    assert report.recipe == "nunchaku-nvfp4"


def config_width(config: dict[str, Any]) -> int:
    return config["attention_head_dim"] * config["num_attention_heads"]


def bias_bytes(model: FluxTransformer2DModel, folder: Path) -> int:
    """What the 16-bit tensors of the file grow by as float32."""
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in stored}
    return sum(kept[name].nbytes - stored[name].nbytes for name in kept if not name.endswith((".down", ".up")))


def test_the_whole_model_runs_and_survives_saving(tmp_path: Path) -> None:
    files.write_flux(tmp_path / "f.safetensors")
    import_checkpoint(tmp_path / "f.safetensors", tmp_path / "out")
    model = load(tmp_path / "out")
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
        image = model(**given).sample
        model.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again")(**given).sample
    assert bool(torch.isfinite(image).all()) and float(image.std()) > 0
    assert torch.equal(image, again)


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    files.write_flux(tmp_path / "f.safetensors")
    for name in ("a", "b"):
        import_checkpoint(tmp_path / "f.safetensors", tmp_path / name)
    a, b = (tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


EVERYTHING = ("model_class", "config", "all others")


def widened(folder: Path, out: Path) -> dict[str, Any]:
    """A copy of a pipeline whose transformer is 128 wide, by its config; what weights are there does not count."""
    shutil.copytree(folder, out)
    config = json.loads((out / "transformer" / "config.json").read_text())
    config.update(num_attention_heads=4)
    (out / "transformer" / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("unsaid", [("model_class",), ("config",), ("model_class", "config"), EVERYTHING], ids=str)
def test_a_pipeline_tells_what_the_file_does_not(
    tmp_path: Path, tiny_random_folder: Path, unsaid: tuple[str, ...]
) -> None:
    config = widened(tiny_random_folder, tmp_path / "base")
    tensors = files.flux_tensors(config)
    said = {key: value for key, value in files.metadata(config).items() if key not in unsaid}
    file = tmp_path / "f.safetensors"
    save_file(tensors, file, None if unsaid == EVERYTHING else said)
    if unsaid != ("model_class",):
        with pytest.raises(UserError, match=r"in its metadata: name a pipeline of the model with --pipeline"):
            import_checkpoint(file, tmp_path / "out")
        with pytest.raises(UserError, match=r"UNet2DConditionModel"):
            import_checkpoint(file, tmp_path / "out", pipeline="tiny-unet")
    assert not (tmp_path / "out").exists()
    # Its config tells the class, too, where the file has one.
    import_checkpoint(file, tmp_path / "out", pipeline=None if unsaid == ("model_class",) else tmp_path / "base")
    folder = tmp_path / "out" if unsaid == ("model_class",) else tmp_path / "out" / "transformer"
    check_all(load(folder), tensors, config, files.SHIFT)


def test_a_pipeline_around_it(tmp_path: Path, tiny_random_folder: Path) -> None:
    config = json.loads((tiny_random_folder / "transformer" / "config.json").read_text())
    config.update(num_attention_heads=4)  # 128 wide
    tensors = files.write_flux(tmp_path / "f.safetensors", config)
    # The file's own config counts; that of the pipeline is narrower.
    import_checkpoint(tmp_path / "f.safetensors", tmp_path / "out", pipeline=tiny_random_folder)
    assert (tmp_path / "out" / "model_index.json").is_file() and (tmp_path / "out" / "vae").is_dir()
    check_all(load(tmp_path / "out" / "transformer"), tensors, config, files.SHIFT)


# ---- bad files


def damaged(tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    tensors, said = files.flux_tensors(files.SMALL), files.metadata(files.SMALL)
    change(tensors, said)
    file = tmp_path / "f.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, said)
    return file


def without(name: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, said: tensors.__delitem__(name)


def with_tensor(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, said: tensors.update({name: make(tensors[name])})


def with_metadata(**values: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
        for key, value in values.items():
            said.pop(key)
            if value is not None:
                said[key] = value if isinstance(value, str) else json.dumps(value)

    return change


QKV, MOD = "transformer_blocks.0.qkv_proj", "transformer_blocks.0.norm1.linear"
FC2 = "single_transformer_blocks.0.mlp_fc2"
QUANTIZATION = json.loads(files.metadata(files.SMALL)["quantization_config"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{QKV}.lora_down"), f"tensor '{QKV}.lora_down' is missing"),
        (without(f"{QKV}.qweight"), f"tensor '{QKV}.qweight' is missing"),
        (without(f"{QKV}.bias"), f"tensor '{QKV}.bias' is missing"),
        (without(f"{MOD}.wzeros"), f"tensor '{MOD}.wzeros' is missing"),
        *((without(f"{QKV}.{leaf}"), f"tensor '{QKV}.{leaf}' is missing") for leaf in ("wscales", "smooth", "lora_up")),
        *((without(f"{MOD}.{leaf}"), f"tensor '{MOD}.{leaf}' is missing") for leaf in ("qweight", "wscales", "bias")),
        (without(f"{FC2}.wscales"), f"tensor '{FC2}.wscales' is missing"),
        (without("x_embedder.weight"), "tensor 'x_embedder.weight' is missing"),
        (without("single_transformer_blocks.0.norm_q.weight"), "norm_q.weight' is missing"),
        (with_tensor(f"{QKV}.lora_down", lambda t: t[:, :24]), "expected a rank that is a multiple of 16"),
        (with_tensor(f"{QKV}.lora_down", lambda t: t[:, :16]), "has rank 16: expected 32"),
        (with_tensor(f"{QKV}.lora_up", lambda t: t[:, :16]), r"has shape \[384, 16\]: expected \[384, 32\]"),
        (with_tensor(f"{QKV}.qweight", lambda t: t[:300]), r"has shape \[300, 64\]: expected \[384, 64\]"),
        (with_tensor(f"{QKV}.smooth", lambda t: t[:100]), r"has shape \[100\]: expected \[128\]"),
        (with_tensor(f"{QKV}.qweight", lambda t: t.flatten()), r"has shape \[24576\]: expected \[384, 64\]"),
        (with_tensor(f"{QKV}.lora_down", lambda t: t.flatten()), r"shape \[4096\]: expected a rank that is a multiple"),
        (with_tensor(f"{QKV}.wscales", lambda t: t.repeat(2, 1)), r"has shape \[4, 384\]: expected \[2, 384\]"),
        (with_tensor(f"{QKV}.wscales", lambda t: t.float()), "dtype torch.float32: expected torch.bfloat16"),
        (with_tensor(f"{MOD}.qweight", lambda t: t[1:]), r"has shape \[191, 64\]: expected \[192, 64\]"),
        (with_tensor(f"{MOD}.qweight", lambda t: t.to(torch.int8)), "dtype torch.int8: expected torch.int32"),
        (with_tensor(f"{QKV}.bias", lambda t: t.float()), "has dtype torch.float32: expected torch.bfloat16"),
        (with_tensor(f"{QKV}.qweight", lambda t: t.view(torch.uint8)), "dtype torch.uint8: expected torch.int8"),
        (
            lambda tensors, said: tensors.update({f"{QKV}.smoth": torch.ones(3)}),
            f"belongs to no layer: did you mean '{QKV}.smooth'",
        ),
        (with_metadata(model_class=None, config=files.SMALL), "names no model_class .* with --pipeline"),
        (
            with_metadata(model_class=None, config={**files.SMALL, "_class_name": "PixArtTransformer2DModel"}),
            "PixArtTransformer2DModel has no original Nunchaku file that we know",
        ),
        (with_metadata(model_class="NunchakuSanaTransformer2DModel"), "holds a NunchakuSana"),
        (with_metadata(config="{"), "config in its metadata is no JSON mapping"),
        (with_metadata(config=None), "name a pipeline of the model with --pipeline"),
        (with_metadata(config={**files.SMALL, "num_layers": 2}), "transformer_blocks.1"),
        (
            with_metadata(config={**files.SMALL, "num_layers": 10**6}),
            r"has num_layers 1000000, and there are \d+ tensors",
        ),
        (with_metadata(config={**files.SMALL, "num_single_layers": 10**6}), "has num_single_layers 1000000"),
        (with_metadata(quantization_config={**QUANTIZATION, "method": "gptq"}), "method 'gptq'"),
        (with_metadata(quantization_config=[1]), "quantization_config in its metadata is no JSON mapping"),
        (with_metadata(quantization_config={**QUANTIZATION, "weight": "int4"}), "weights of dtype None"),
        (
            with_metadata(quantization_config={**QUANTIZATION, "activation": {"dtype": "int8"}}),
            "int4 weights and activations of dtype 'int8': expected 'int4'",
        ),
        (with_metadata(quantization_config={**QUANTIZATION, "rank": 64}), "has rank 32: expected 64"),
        (with_metadata(quantization_config={**QUANTIZATION, "rank": "32"}), "has rank '32'"),
        (
            with_metadata(quantization_config={**QUANTIZATION, "weight": {"dtype": "int3"}}),
            "weights of dtype 'int3': did you mean 'int4'",
        ),
        (
            with_metadata(quantization_config={**QUANTIZATION, "weight": {"dtype": "int4", "group_size": 32}}),
            "in groups of 32: expected 64",
        ),
        (
            with_metadata(quantization_config=files.metadata(files.SMALL, weight="nvfp4")["quantization_config"]),
            "says that its weights are nvfp4 and holds int4",
        ),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        import_checkpoint(damaged(tmp_path, change), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    whole = tmp_path / "f.safetensors"
    files.write_flux(whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "text.safetensors").write_text("no safetensors")
    save_file({"weight": torch.ones(3)}, tmp_path / "foreign.safetensors")
    save_file({}, tmp_path / "bare.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "head.safetensors").write_bytes((1 << 62).to_bytes(8, "little"))
    (tmp_path / "folder.safetensors").mkdir()
    missing = "qkv_proj.wscales' is missing: the file is damaged, or not one of Nunchaku's"
    for name, pipeline, message in (
        ("cut", None, "cannot be read"),
        ("text", None, "cannot be read"),
        ("empty", None, "cannot be read"),
        ("head", "tiny-flux", "cannot be read"),
        ("folder", None, "is no model: expected config.json"),
        ("foreign", None, "names no model_class"),
        ("foreign", "tiny-flux", missing),
        ("bare", "tiny-flux", missing),
        ("absent", None, "no file or folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            import_checkpoint(tmp_path / f"{name}.safetensors", tmp_path / "out", pipeline=pipeline)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        *((f"{QKV}.{leaf}", "transformer_blocks.0.attn.to_") for leaf in ("wscales", "smooth", "lora_up", "bias")),
        ("x_embedder.weight", "x_embedder.weight"),
        ("transformer_blocks.0.norm_q.weight", "transformer_blocks.0.attn.norm_q.weight"),
    ],
)
def test_numbers_that_are_not_finite(tmp_path: Path, name: str, reported: str) -> None:
    change = with_tensor(name, lambda t: t.flatten().index_fill(0, torch.tensor([3]), torch.nan).reshape(t.shape))
    with pytest.raises(UserError, match=rf"tensor '{reported}.*NaN or infinite"):
        import_checkpoint(damaged(tmp_path, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("leaf", "value"),
    [("wtscale", 0.0), ("wtscale", -1.0), ("wtscale", torch.nan), ("wcscales", -1.0), ("wscales", -1.0)],
)
def test_scales_of_nvfp4_that_are_none(tmp_path: Path, leaf: str, value: float) -> None:
    tensors = files.flux_tensors(files.SMALL, weight="nvfp4")
    tensors[f"{QKV}.{leaf}"].view(-1)[0] = value
    save_file(tensors, tmp_path / "f.safetensors", files.metadata(files.SMALL, weight="nvfp4"))
    with pytest.raises(UserError, match=rf"tensor '{QKV}.{leaf}': 1 of \d+ scales are negative, 0 or NaN: expected"):
        import_checkpoint(tmp_path / "f.safetensors", tmp_path / "out")


def test_a_pipeline_of_another_kind_is_refused(tmp_path: Path) -> None:
    files.write_flux(tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="has a UNet2DConditionModel as its unet: expected a pipeline with a Flux"):
        import_checkpoint(tmp_path / "flux.safetensors", tmp_path / "out", pipeline="tiny-unet")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_ours_asks_for_the_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="few-bit model of bittern's: expected --to"):
        import_checkpoint("tiny-flux-ternary", tmp_path / "out")
