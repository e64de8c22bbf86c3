"""Pipelines by name, and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, FluxPipeline

import bittern
from bits import expect_bits
from bittern import folders, outputs, pipelines
from bittern.errors import UserError
from bittern.evaluation.drawing import Settings, draw
from bittern.layers import quant_layers
from bittern.quantization import component


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def model(tiny_random_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of the test's own, which it may damage."""
    return Path(shutil.copytree(tiny_random_folder, tmp_path / "model"))


def weight_file(model: Path, component: str = "transformer") -> Path:
    return model / component / "diffusion_pytorch_model.safetensors"


# ---- loading


def test_loads_in_the_dtype_of_the_transformer(
    new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path: Path
) -> None:
    pipe = new_tiny_random_pipeline()
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    loaded = pipelines.load(tmp_path)
    assert {m.dtype for m in (loaded.transformer, loaded.text_encoder, loaded.text_encoder_2, loaded.vae)} == {
        torch.bfloat16
    }
    assert pipelines.load(str(tmp_path), dtype=torch.float16).transformer.dtype == torch.float16


def test_a_cpu_without_16_bit_arithmetic_draws_in_float32(
    new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, few = tmp_path / "dense", tmp_path / "few"
    new_tiny_random_pipeline().to(torch.bfloat16).save_pretrained(dense)
    folders.quantize_folder(dense, "svdquant-fast", few)
    parameters = bittern.inspect(dense).parameters

    def found(multiplies: bool, memory: int) -> set[torch.dtype]:
        monkeypatch.setattr(pipelines, "multiplies", lambda _device, dtype: multiplies or dtype == torch.float32)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory, available=2**34))
        return {pipelines.quick_dtype(folder, "cpu") for folder in (dense, few)}

    assert found(multiplies=True, memory=2**36) == {torch.bfloat16}
    # The few-bit model is a third as large, and is drawn with like the other all the same.
    assert found(multiplies=False, memory=8 * parameters - 2) == {torch.bfloat16}
    assert found(multiplies=False, memory=8 * parameters) == {torch.float32}
    for folder in (dense, few):
        drawing = draw(str(folder), ["a"], Settings(steps=1))
        assert drawing.dtype == "fp32"
        assert drawing.inspection.file_bytes == weight_file(folder).stat().st_size
    assert draw(str(few), ["a"], Settings(steps=1, dtype=torch.bfloat16)).dtype == "bf16"


def test_a_few_bit_folder_keeps_its_dtype(new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path: Path) -> None:
    pipe = new_tiny_random_pipeline()
    pipe.transformer.to(torch.float16)
    pipe.save_pretrained(tmp_path / "model")
    # Scales and branches, in bf16, outweigh the fp16 layers that are kept.
    folders.quantize_folder(tmp_path / "model", "svdquant-fast", tmp_path / "out")
    loaded = pipelines.load(tmp_path / "out")
    assert loaded.transformer.dtype == torch.float16
    assert len(quant_layers(loaded.transformer)) == 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-net", r"unknown model 'tiny-net': did you mean 'tiny-unet'\?"),
        ("tiny-flax", r"unknown model 'tiny-flax': did you mean 'tiny-flux'\?"),
        (
            "no-such-thing",
            r"unknown model 'no-such-thing': expected one of: tiny-flux, tiny-flux-ternary, tiny-unet, or give a "
            r"folder or a hub id",
        ),
        ("./gone", r"no folder './gone': expected a pipeline folder, a hub id or tiny-flux or tiny-unet"),
        ("a/b/c", "no folder 'a/b/c'"),
        ("/", "folder '/' is not a pipeline: expected model_index"),
        (__file__, "is a file: expected a pipeline folder"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipelines.load(name)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to the hub\nand here are twenty more lines")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    with pytest.raises(UserError, match=r"no folder 'some/model' here, and the hub .*: We couldn't connect") as caught:
        pipelines.load("some/model")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_and_loaded(tiny_random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name: str(tiny_random_folder))
    assert isinstance(pipelines.load("some/model"), FluxPipeline)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "model_index.json").unlink(), "is not a pipeline: expected model_index.json in it"),
        (lambda m: (m / "model_index.json").write_text("{"), r"model_index\.json cannot be read"),
        (lambda m: (m / "model_index.json").write_text("[]"), r"model_index\.json holds no mapping"),
        (lambda m: (m / "model_index.json").write_text('{"_class_name": "NoPipe"}'), "pipeline class 'NoPipe'"),
        (lambda m: shutil.rmtree(m / "vae"), "cannot be loaded"),
        (lambda m: weight_file(m).unlink(), r"transformer has no diffusion_pytorch_model\.safetensors"),
        (lambda m: shutil.rmtree(m / "transformer"), "has no transformer or unet: expected a whole pipeline"),
        (lambda m: os.truncate(weight_file(m), 1000), r"diffusion_pytorch_model\.safetensors cannot be read"),
        (lambda m: os.truncate(weight_file(m, "vae"), 1000), r"cannot be loaded: .*vae/diffusion_pytorch_model"),
    ],
)
def test_damaged_folders(model: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        pipelines.load(model)
    assert "\n" not in str(caught.value)


def test_a_truncated_few_bit_file_is_reported_before_loading(model: Path) -> None:
    folders.quantize_folder(model, "int4", model.parent / "out")
    file = weight_file(model.parent / "out")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=r"transformer/diffusion_pytorch_model\.safetensors cannot be read .* again"):
        pipelines.load(model.parent / "out")


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "device 'gpu' is unknown: expected cpu, cuda or cuda:N"), ("cuda:99", "device 'cuda:99'")],
)
def test_devices_that_are_not_there(tiny_random_folder: Path, device: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipelines.load(tiny_random_folder, device=device)


def test_cuda_asked_for_and_absent(tiny_random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device 'cuda': torch finds no CUDA GPU here; use --device cpu"):
        pipelines.load(tiny_random_folder, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="device 'cuda:2': expected cuda:0 to cuda:1"):
        pipelines.check_device("cuda:2")
    pipelines.check_device("cuda:1")


def test_defaults_come_from_the_configs(tiny_random_pipeline: FluxPipeline) -> None:
    pipe = tiny_random_pipeline
    small = pipelines.defaults(pipe)
    assert small == pipelines.CallDefaults(height=32, width=32, steps=24, max_sequence_length=16, guidance=0.0)
    pipe.vae.register_to_config(sample_size=1024)
    pipe.tokenizer_2.model_max_length = 100_000
    schnell = pipelines.defaults(pipe)
    assert (schnell.height, schnell.steps, schnell.guidance, schnell.max_sequence_length) == (1024, 4, 0.0, 512)
    pipe.transformer.register_to_config(guidance_embeds=True)
    assert (pipelines.defaults(pipe).steps, pipelines.defaults(pipe).guidance) == (28, 3.5)


# ---- writing


def test_quantize_folder_writes_what_diffusers_loads(model: Path, tmp_path: Path) -> None:
    (model / "LICENSE.md").write_text("free")
    (model / "README.md").write_text("about another model")
    out = tmp_path / "deep" / "er" / "out"
    report = folders.quantize_folder(model, "svdquant-fast", out)
    assert bittern.inspect(out) == report
    assert weight_file(out).stat().st_size == report.file_bytes
    source, written = contents(model), contents(out)
    assert source.keys() == written.keys()
    assert {name for name in written if written[name] != source.get(name)} == {
        "README.md",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }
    plain = pipelines.load(model)
    bittern.quantize(plain, "svdquant-fast")
    loaded = DiffusionPipeline.from_pretrained(out)
    images = []
    for pipe in (plain, loaded):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        call = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16, "output_type": "np"}
        images.append(pipe("a", generator=generator, **call).images)
    expect_bits(component(loaded).state_dict(), component(plain).state_dict())
    # Tensors of a file lie at any address, and a BLAS may sum what is not aligned in another order.
    np.testing.assert_allclose(*images, rtol=0, atol=1e-4)
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_the_card_says_what_was_done_and_keeps_the_licence(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nlicense: cc0-1.0\ndatasets: mine\n---\n# The original\n")
    report = folders.quantize_folder(model, "svdquant-fast", tmp_path / "out", seed=3)
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "base_model": "model",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "license": "cc0-1.0",
        "tags": ["bittern", "quantized", "svdquant-fast"],
    }
    assert str(tmp_path) not in card
    assert f"| {report.bits_per_weight:.2f} |" in card and "seed 3" in card
    assert f"{weight_file(tmp_path / 'out').stat().st_size / 1e6:.1f} MB, was" in card


@pytest.mark.parametrize("card", ["", "# no head\n", "---\n: [\n---\n", "---\n- a list\n---\n"])
def test_a_card_that_says_nothing_of_use(model: Path, tmp_path: Path, card: str) -> None:
    (model / "README.md").write_text(card)
    folders.quantize_folder(model, "int4", tmp_path / "out")
    assert "license" not in yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])


def test_files_have_the_modes_of_ordinary_files(model: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folders.quantize_folder(model, "int4", tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").rglob("*") if file.is_file()} == {0o640}


def test_where_it_came_from_is_not_written(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "elsewhere" / model.name))
    folders.quantize_folder(model, "int4", tmp_path / "one")
    folders.quantize_folder(other, "int4", tmp_path / "two")
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    assert not any(str(tmp_path).encode() in data for data in one.values())


def test_an_output_folder_that_is_not_empty(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folders.quantize_folder(model, "int4", out)
    (out / "mine.txt").write_text("kept until replaced")
    before = contents(out)
    with pytest.raises(UserError, match="is not empty: choose another, or replace it with --force"):
        folders.quantize_folder(model, "int4", out)
    assert contents(out) == before
    folders.quantize_folder(model, "ternary-fast", out, force=True)
    assert not (out / "mine.txt").exists()
    assert bittern.inspect(out).recipe == "ternary-fast"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_force_replaces_models_only(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no model: --force replaces only models; empty it first"):
        folders.quantize_folder(model, "int4", home, force=True)
    (home / "config.json").write_text('{"eslint": 1}')
    with pytest.raises(UserError, match="holds no model"):
        folders.quantize_folder(model, "int4", home, force=True)
    for out in (model, tmp_path, model / "vae", model / "new"):
        with pytest.raises(UserError, match="would replace the model it is made from"):
            folders.quantize_folder(model, "int4", out, force=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file: expected a folder that is new or empty"):
        folders.quantize_folder(model, "int4", file, force=True)
    with pytest.raises(UserError, match="is not writable"):
        folders.quantize_folder(model, "int4", file / "below")
    assert (home / "thesis.tex").read_text() == "years of work"


def test_a_mount_point_is_refused_beforehand(model: Path) -> None:
    with pytest.raises(UserError, match="is a mount point, which cannot be replaced: choose a folder in it"):
        folders.quantize_folder(model, "int4", "/proc", force=True)


def test_a_pipeline_with_a_component_missing(model: Path, tmp_path: Path) -> None:
    shutil.rmtree(model / "vae")
    with pytest.raises(UserError, match=r"model_index.json lists 'vae', which is not there"):
        folders.quantize_folder(model, "int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/b"])
def test_components_are_names_and_no_paths(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").mkdir()
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(UserError, match="which is no name of a component"):
        folders.quantize_folder(model, "int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_fine(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    folders.quantize_folder(model, "int4", tmp_path / "out")
    assert bittern.inspect(tmp_path / "out").recipe == "int4"


@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    if force:
        out.mkdir()
        (out / "config.json").write_text('{"_class_name": "Old"}')
    before = contents(tmp_path), listing(tmp_path)

    def fill(error: BaseException) -> None:
        with outputs.new_folder(out, force=force) as folder:
            (folder / "half").write_text("written")
            raise error

    with pytest.raises(UserError, match="cannot be written: the disk is full; nothing was left behind"):
        fill(OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        fill(KeyboardInterrupt())
    with pytest.raises(ZeroDivisionError):
        fill(ZeroDivisionError())
    assert (contents(tmp_path), listing(tmp_path)) == before


def test_a_failing_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"_class_name": "Old"}')
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(13, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(UserError, match="cannot be written: Permission denied"),
        outputs.new_folder(out, force=True) as folder,
    ):
        (folder / "config.json").write_text("new")
    assert contents(tmp_path) == {"out/config.json": b'{"_class_name": "Old"}'}


KILLED = """
import os, signal, sys
from pathlib import Path
from bittern import outputs
out, moment = sys.argv[1:]
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
rename = Path.rename
if moment == "reading":
    outputs._open_to_readers = kill
if moment == "swap":
    Path.rename = lambda self, target: kill() if self.name.endswith(".tmp") else rename(self, target)
if moment == "tidying":
    outputs.shutil.rmtree = kill
with outputs.new_folder(out, force=True) as folder:
    (folder / "config.json").write_text('{"_class_name": "New"}')
    if moment == "wait":
        print("writing", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("moment", "there", "left"),
    [("reading", "Old", ["tmp"]), ("swap", None, ["old", "tmp"]), ("tidying", "New", ["old"])],
)
def test_what_a_killed_process_leaves_is_swept_by_the_next(
    moment: str, there: str | None, left: list[str], tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / ".out.more.01234567.tmp"
    for folder, name in ((out, "Old"), (other, "Other")):
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"_class_name": "{name}"}}')
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), moment], check=False)
    assert done.returncode == -9
    assert sorted(path.suffix[1:] for path in tmp_path.glob(".out.????????.*")) == left
    assert out.exists() == (there is not None)
    outputs.check_out(out, force=True)
    assert not list(tmp_path.glob(".out.????????.*")) and other.exists()
    assert json.loads((out / "config.json").read_text())["_class_name"] == (there or "Old")


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out), "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "writing\n"
        outputs.check_out(out)
        assert len(list(tmp_path.glob(".out.*.tmp"))) == 1
        process.communicate("go\n")
    assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full_midway(model: Path, tmp_path: Path) -> None:
    """The real thing: the kernel refuses the bytes beyond a limit, once in a copy, once in a safetensors file."""
    code = """
import resource, signal, sys
from bittern import folders
from bittern.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (60_000, 190_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        folders.quantize_folder(sys.argv[1], "int4", sys.argv[2])
    except UserError as error:
        print(error)
"""
    assert weight_file(model, "vae").stat().st_size < 190_000
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(out)], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert "cannot be written: the disk is full; nothing is left behind" in first
    assert "cannot be written: the disk is full; 2 finished blocks are kept, run the same command again" in second
    assert not out.exists()
    folders.quantize_folder(model, "int4", out)
    folders.quantize_folder(model, "int4", tmp_path / "other" / "out")
    assert contents(out) == contents(tmp_path / "other" / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "other", "out"]


def test_a_disk_that_is_too_small_is_told_beforehand(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.\d MB and the disk has 0\.1 MB free: make room"):
        folders.quantize_folder(model, "int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_takes_no_folder() -> None:
    with (
        pytest.raises(UserError, match=r"'/proc/out' (cannot be written|is not writable)"),
        outputs.new_folder("/proc/out"),
    ):
        pass
