"""Quantizing from disk block by block: the bytes of quantizing in memory, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import bittern
from bittern import folders, pipelines, recipes
from bittern.architectures import plan
from bittern.errors import UserError
from bittern.quantization import stream
from bittern.quantization.preview import skeleton
from bittern.quantization.workspace import Workspace, fingerprint

NewPipeline = Callable[[], FluxPipeline]
STEM = "diffusion_pytorch_model"


@pytest.fixture
def model(tiny_random_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of the test's own, which it may damage."""
    return Path(shutil.copytree(tiny_random_folder, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def interrupt_after(blocks: int) -> Callable[[str, float, float], None]:
    """A progress callback that interrupts once so many blocks are finished."""

    def progress(_what: str, done: float, _total: float) -> None:
        if done >= blocks:
            raise KeyboardInterrupt

    return progress


def interrupt_when_solving(what: str, done: float, _total: float) -> None:
    if what.startswith("solving") and done >= 1:
        raise KeyboardInterrupt


# ---- the result


@pytest.mark.parametrize("recipe", ["int4", "svdquant-fast", "ternary-fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_quantizing_in_memory(
    recipe: str, dtype: torch.dtype, new_tiny_random_pipeline: NewPipeline, tmp_path: Path
) -> None:
    pipe = new_tiny_random_pipeline()
    pipe.transformer.to(dtype)
    pipe.save_pretrained(tmp_path / "model")
    report = folders.quantize_folder(tmp_path / "model", recipe, tmp_path / "out", seed=5)
    assert report == bittern.quantize(pipe, recipe, seed=5)
    pipe.transformer.save_pretrained(tmp_path / "memory")
    assert contents(tmp_path / "out" / "transformer") == contents(tmp_path / "memory")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_shards_and_mixed_dtypes(new_tiny_random_pipeline: NewPipeline, tmp_path: Path) -> None:
    pipe = new_tiny_random_pipeline()
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    place = tmp_path / "model" / "transformer"
    shards = sorted(place.glob("*.safetensors"))
    assert len(shards) > 2
    odd = load_file(shards[0])
    save_file({name: t.float() for name, t in odd.items()}, shards[0], {"format": "pt"})
    folders.quantize_folder(tmp_path / "model", "svdquant-fast", tmp_path / "out")
    pipe.transformer = FluxTransformer2DModel.from_pretrained(place, dtype=torch.bfloat16)
    bittern.quantize(pipe, "svdquant-fast")
    pipe.transformer.save_pretrained(tmp_path / "memory")
    assert contents(tmp_path / "out" / "transformer") == contents(tmp_path / "memory")


def test_one_block_is_in_memory_at_a_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a job is solved, the weights of no other target exist."""
    loaded: list[int] = []
    real = stream.solve_job

    def spy(job, modules, *rest):  # type: ignore[no-untyped-def]
        loaded.append(sum(not m.weight.is_meta for m in blank.modules() if type(m) is torch.nn.Linear))
        assert loaded[-1] == len(job.paths)
        return real(job, modules, *rest)

    monkeypatch.setattr(stream, "solve_job", spy)
    recipe, place = recipes.load("svdquant-fast"), model / "transformer"
    blank, _ = skeleton(place)
    with Workspace(tmp_path / "work", stream.run_manifest(place, recipe, 0, "1")) as workspace:
        stream.quantize_streaming(blank, place, recipe, workspace)
    assert len(loaded) == len(plan(skeleton(place)[0], recipe).jobs) == 13
    assert not any(p.is_meta for p in blank.parameters())


def test_buffers_that_are_saved_arrive(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = model / "transformer"
    file = place / f"{STEM}.safetensors"
    save_file({**load_file(file), "norm_out.seen": torch.arange(5.0)}, file, {"format": "pt"})
    blank, _ = skeleton(place)
    blank.norm_out.register_buffer("seen", torch.empty(5, device="meta"))
    recipe = recipes.load("int4")
    with Workspace(tmp_path / "work", stream.run_manifest(place, recipe, 0, "1")) as workspace:
        stream.quantize_streaming(blank, place, recipe, workspace)
    assert torch.equal(blank.norm_out.seen, torch.arange(5.0))
    assert not isinstance(blank.norm_out.seen, torch.nn.Parameter)


def test_files_under_other_names_go_through_diffusers(model: Path, tmp_path: Path) -> None:
    blank, _ = skeleton(model / "transformer")
    assert stream.can_stream(blank, model / "transformer")
    file = model / "transformer" / f"{STEM}.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.bias"]
    save_file(tensors, file, {"format": "pt"})
    assert not stream.can_stream(blank, model / "transformer")


# ---- interrupted runs


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_an_interrupted_run_goes_on(blocks: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, solved = tmp_path / "out", list[tuple[str, ...]]()
    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(model, "svdquant-fast", out, progress=interrupt_after(blocks))
    work = folders.workspace_of(out)
    assert work.exists() == (blocks > 0) and not out.exists()
    real = stream.solve_job
    monkeypatch.setattr(stream, "solve_job", lambda job, *rest: solved.append(job.paths) or real(job, *rest))
    folders.quantize_folder(model, "svdquant-fast", out)
    jobs = plan(skeleton(model / "transformer")[0], recipes.load("svdquant-fast")).jobs
    second = [job.paths for job in jobs if not job.paths[0].startswith("transformer_blocks.0.")]
    assert solved == {0: [job.paths for job in jobs], 1: second, 2: []}[blocks]
    folders.quantize_folder(model, "svdquant-fast", tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not work.exists()


CALIBRATED = """
samples: 2
rows: 96
default: {weight: int4, activations: 4, rank: 4, branch: outputs, svd_iterations: 1, bias_correction: true}
modulation: {rank: 0, activations: 16, rounding: gptq, branch: weights}
"""


@pytest.mark.parametrize(
    "recipe", ["svdquant-fast", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "few-bit"))]
)
def test_sigkill_at_random_moments(recipe: str, model: Path, tmp_path: Path) -> None:
    """Many runs are killed, each a little later; the last one finishes with the bytes of an undisturbed run."""
    kills = 8
    if recipe in ("full", "few-bit"):
        kills = 24
        text = f"predecessors: {recipe}\n{CALIBRATED}"
        recipe = str(tmp_path / "calibrated.yaml")
        Path(recipe).write_text(text)
    code = """
import os, random, signal, sys, time
import torch
from bittern import folders
from bittern.quantization import Limits
model, recipe, out, kills = sys.argv[1:]
torch.set_num_threads(1)
# The records of the two blocks need 0.43 and 0.19 MB: each is a pass of its own.
options = {"limits": Limits(None, 500_000)}
folders.quantize_folder(model, recipe, out + "-undisturbed", **options)  # imports everything before the fork
began = time.monotonic()
folders.quantize_folder(model, recipe, out + "-undisturbed", force=True, **options)
whole = time.monotonic() - began
choose, killed, kept = random.Random(0), 0, set()
# On a busy machine the first ones may all come too early or too late.
while killed < int(kills) or (len(kept) < 2 and killed < 200):
    child = os.fork()
    if not child:
        folders.quantize_folder(model, recipe, out, force=True, **options)
        os._exit(0)
    time.sleep(whole * choose.random())
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or not status
    work = folders.workspace_of(out)
    kept.add(len(list(work.glob("*.safetensors"))) if work.exists() else 0)
folders.quantize_folder(model, recipe, out, force=True, **options)
print(sorted(kept))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), recipe, str(out), str(kills)],
        capture_output=True, text=True, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])) >= 2, "every kill came before or after the work"
    assert contents(out) == contents(tmp_path / "out-undisturbed")
    assert not folders.workspace_of(out).exists()


# ---- another run


def test_another_run_is_refused_until_restart(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(model, "int4", out, progress=interrupt_after(1))
    left = contents(folders.workspace_of(out))
    for changed, what in (({"recipe": "ternary-fast"}, "recipe"), ({"recipe": "int4", "seed": 1}, "seed")):
        with pytest.raises(UserError, match=f"unfinished run with another {what}: run that command again, or begin"):
            folders.quantize_folder(model, out=out, **changed)
    file = model / "transformer" / f"{STEM}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="unfinished run with another model"):
        folders.quantize_folder(model, "int4", out)
    assert contents(folders.workspace_of(out)) == left
    folders.quantize_folder(model, "ternary-fast", out, restart=True)
    assert bittern.inspect(out).recipe == "ternary-fast"


def test_samples_of_another_pipeline_or_of_other_prompts_are_no_part_of_a_run(model: Path, tmp_path: Path) -> None:
    place, others = model / "transformer", [model / name for name in ("scheduler", "text_encoder", "tokenizer")]
    recipe = recipes.load("int4-gptq")

    def manifest(prompts: list[str] | None = None) -> dict[str, object]:
        return stream.run_manifest(place, recipe, 0, "1", prompts, others=others)

    with_prompts, without = manifest(["a", "b"]), manifest()
    assert manifest(["a", "b"]) == with_prompts
    assert manifest(["a\nb"])["prompts"] != with_prompts["prompts"]
    weights = next((model / "text_encoder").glob("*.safetensors"))
    for file in (model / "scheduler" / "scheduler_config.json", weights):
        data = bytearray(file.read_bytes())
        data[-20] ^= 1
        file.write_bytes(bytes(data))
        changed = manifest(["a", "b"])
        assert [key for key in changed if changed[key] != with_prompts[key]] == ["pipeline"]
        with_prompts = changed
    # What draws nothing does not mind.
    assert manifest() == without


def test_an_unfinished_run_of_another_scheduler_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = recipes.load("int4-gptq").override(samples=2, rows=64)
    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(model, recipe, tmp_path / "out", prompts=["a star"], progress=interrupt_when_solving)
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 3.0}))
    with pytest.raises(UserError, match="unfinished run with another pipeline"):
        folders.quantize_folder(model, recipe, tmp_path / "out", prompts=["a star"])


def test_two_runs_do_not_meet(tmp_path: Path) -> None:
    with Workspace(tmp_path / "work", {}), pytest.raises(UserError, match="in use by another run"):
        Workspace(tmp_path / "work", {}).__enter__()
    with Workspace(tmp_path / "work", {}):
        pass


def test_calibrating_where_16_bits_have_no_arithmetic_changes_no_dtype(
    new_tiny_random_pipeline: NewPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done in float32; what is written is what was there, and a run that was begun in 16 bits is another."""
    monkeypatch.setattr(pipelines, "multiplies", lambda _device, dtype: dtype == torch.float32)
    drawn: list[torch.dtype] = []
    load = pipelines.load_denoiser

    def noted(*args: Any) -> torch.nn.Module:
        drawn.append((model := load(*args)).dtype)
        return model

    monkeypatch.setattr(folders, "load_denoiser", noted)
    dense, out = tmp_path / "dense", tmp_path / "out"
    new_tiny_random_pipeline().to(torch.bfloat16).save_pretrained(dense)
    (tmp_path / "calibrated.yaml").write_text(CALIBRATED)
    recipe = tmp_path / "calibrated.yaml"
    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(dense, recipe, out, progress=interrupt_when_solving)
    with monkeypatch.context() as elsewhere, pytest.raises(UserError, match="unfinished run with another computes in"):
        elsewhere.setattr(pipelines, "multiplies", lambda *_: True)
        folders.quantize_folder(dense, recipe, out)
    folders.quantize_folder(dense, recipe, out)
    assert set(drawn) == {torch.float32}
    floats = {t.dtype for t in load_file(out / f"transformer/{STEM}.safetensors").values() if t.is_floating_point()}
    assert floats == {torch.bfloat16}


def test_what_is_loaded_lies_as_what_was_never_saved(tmp_path: Path) -> None:
    """A BLAS may sum what is not aligned in another order."""
    saved = {name: torch.arange(5.0) for name in "abcdef"}
    with Workspace(tmp_path / "work", {}) as workspace:
        workspace.save("block", saved, {"n": 1})
        mapped = workspace.load("block", mapped=True)[0]
        loaded, notes = workspace.load("block")
    assert notes == {"n": 1}
    assert any(tensor.data_ptr() % 64 for tensor in mapped.values())
    for name, tensor in loaded.items():
        assert torch.equal(tensor, saved[name]) and tensor.data_ptr() % 64 == 0


def test_a_damaged_block_is_solved_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(model, "int4", out, progress=interrupt_after(1))
    (block,) = folders.workspace_of(out).glob("*.safetensors")
    block.write_bytes(block.read_bytes()[:-10])
    folders.quantize_folder(model, "int4", out)
    folders.quantize_folder(model, "int4", tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_weights_that_are_not_finite_leave_nothing(model: Path, tmp_path: Path) -> None:
    file = model / "transformer" / f"{STEM}.safetensors"
    tensors = load_file(file)
    tensors["single_transformer_blocks.0.proj_mlp.weight"][3, 4] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights of single_transformer_blocks\.0\.proj_mlp are NaN or infinite"):
        folders.quantize_folder(model, "int4", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fingerprint_sees_every_kind_of_change(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    data = random.Random(0).randbytes(1_000_000)
    seen = set()
    for changed in (
        data,
        data[:-1],
        b"x" + data[1:],
        data[:-1] + b"x",
        data[:500_000] + bytes(40_000) + data[540_000:],
    ):
        file.write_bytes(changed)
        seen.add(fingerprint([file]))
    file.rename(tmp_path / "b.bin")
    seen.add(fingerprint([tmp_path / "b.bin"]))
    (tmp_path / "empty").write_bytes(b"")
    seen.add(fingerprint([tmp_path / "empty"]))
    assert len(seen) == 7
