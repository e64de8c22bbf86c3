"""Tensors on disk: exact round trips, and every kind of damage refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bittern import formats
from bittern.checkpoints import (
    CheckpointConfig,
    Target,
    TensorSpec,
    check_headers,
    check_values,
    from_disk,
    on_disk,
    read_headers,
    to_disk,
    weight_files,
)
from bittern.checkpoints.files import file_bytes
from bittern.errors import UserError
from bittern.scheme import Scheme

CONFIG = CheckpointConfig(
    schemes=(
        Scheme(weight="int4", rank=8, smooth=True, activations=4),
        Scheme(weight="ternary", packing="trits", activations=8),
    ),
    targets={
        "a.q": Target(scheme=0, shape=(48, 128)),
        "a.k": Target(scheme=0, shape=(32, 128)),
        "out": Target(scheme=1, shape=(16, 100)),
    },
    groups=(("a.q", "a.k"),),
    segments={"out": (36, 64)},
)
OTHERS = {"a.q.bias": (48,), "norm.weight": (128,)}


def memory(seed: int = 0) -> dict[str, Tensor]:
    """A state dict as a model holds it: the group's codes are views of one buffer, and every member has `weight`."""
    generator = torch.Generator().manual_seed(seed)
    nibbles = torch.randint(0, 256, (80, 64), dtype=torch.uint8, generator=generator)
    trits = torch.randint(-1, 2, (16, 128), dtype=torch.int8, generator=generator)
    state = {
        "a.q.codes": nibbles[:48],
        "a.k.codes": nibbles[48:],
        "out.codes": formats.get("ternary").pack(trits),
        "a.q.weight": torch.zeros(48, 128),
        "a.k.weight": torch.zeros(32, 128),
        "a.k.smooth": torch.ones(128),
        **{name: torch.randn(shape, generator=generator) for name, shape in OTHERS.items()},
    }
    for path in CONFIG.targets:
        for leaf, (shape, dtype) in CONFIG.leaves(path).items():
            if leaf != "codes":
                state[f"{path}.{leaf}"] = (torch.rand(shape, generator=generator) + 0.5).to(dtype)
    return state


def written(folder: Path, change: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
    tensors = to_disk(memory(), CONFIG)
    if change:
        change(tensors)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return file


def check(file: Path) -> None:
    headers = read_headers([file])
    check_headers(headers, CONFIG, OTHERS)
    check_values(headers, CONFIG)


def test_disk_holds_what_the_config_says_and_no_more() -> None:
    state = memory()
    tensors = to_disk(state, CONFIG)
    expected = {f"{path}.{leaf}" for path in CONFIG.targets for leaf in CONFIG.leaves(path)} | set(OTHERS)
    assert set(tensors) == expected
    for path in CONFIG.targets:
        for leaf, (shape, dtype) in CONFIG.leaves(path).items():
            tensor = tensors[f"{path}.{leaf}"]
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert torch.equal(from_disk(tensor, leaf, path, CONFIG), state[f"{path}.{leaf}"])
    assert all(torch.equal(tensors[name], state[name]) for name in OTHERS)


def test_predicted_specs_are_the_written_ones(tmp_path: Path) -> None:
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in memory().items()}
    file = written(tmp_path)
    assert on_disk(specs, CONFIG) == {name: spec for name, (_, spec) in read_headers([file]).items()}
    assert file_bytes(on_disk(specs, CONFIG)) == file.stat().st_size


def test_a_sound_file_passes(tmp_path: Path) -> None:
    check(written(tmp_path))


def test_an_adapter_is_refused_by_the_writer() -> None:
    state = memory()
    state["out.base_layer.codes"] = state.pop("out.codes")
    with pytest.raises(UserError, match="out wears an adapter: unload it before saving"):
        to_disk(state, CONFIG)


def poke(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.k.scales"), r"tensor 'a\.k\.scales' is missing"),
        (lambda t: t.pop("norm.weight"), r"tensor 'norm\.weight' is missing"),
        (lambda t: t.update({"a.k.smoth": torch.ones(128)}), r"'a\.k\.smoth' in \S+ belongs to no layer: did you"),
        (lambda t: t.update({"a.q.weight": torch.zeros(48, 128)}), r"'a\.q\.weight' in \S+ belongs to no layer"),
        (lambda t: t.update({"out.codes": t["out.codes"][:, :-1]}), r"shape \[16, 25\]: expected \[16, 26\]"),
        (lambda t: t.update({"norm.weight": torch.ones(127)}), r"'norm\.weight' .* shape \[127\]: expected \[128\]"),
        (lambda t: t.update({"a.q.scales": t["a.q.scales"].float()}), r"dtype torch\.float32: expected torch\.bf"),
        (lambda t: t.update({"out.codes": t["out.codes"].to(torch.int8)}), r"dtype torch\.int8: expected torch\.uint8"),
        (lambda t: t.update({"norm.weight": torch.ones(128).int()}), r"'norm\.weight' .* expected a float type"),
        (poke("out.codes", 255), r"'out\.codes' in \S+: 1 of 2048 codes are out of range"),
        (poke("a.q.scales", float("nan")), r"'a\.q\.scales' in \S+: 1 of 96 values are NaN or infinite"),
        (poke("a.q.down", float("inf")), r"'a\.q\.down' in \S+: 1 of 1024 values are NaN or infinite"),
        (poke("a.q.smooth", 0.0), r"'a\.q\.smooth' in \S+: smoothing divides by it"),
    ],
)
def test_damage_is_refused_by_name(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    file = written(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        check(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors cannot be read .* write it again"):
        read_headers([file])


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not safetensors: bittern reads no other files"):
        read_headers([tmp_path / "diffusion_pytorch_model.bin"])
    with pytest.raises(UserError, match="has no diffusion_pytorch_model"):
        weight_files(tmp_path)


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    tensors = to_disk(memory(), CONFIG)
    names = sorted(tensors)
    halves = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[:4]}
    halves["diffusion_pytorch_model-00002-of-00002.safetensors"] = names[4:]
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, tmp_path / file)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", halves, strict=True))}))
    files = weight_files(tmp_path)
    assert [file.name for file in files] == list(halves)
    headers = read_headers(files)
    check_headers(headers, CONFIG, OTHERS)
    check_values(headers, CONFIG)
    with pytest.raises(UserError, match="is both in"):
        read_headers([files[0], files[0]])
    files[1].unlink()
    with pytest.raises(UserError, match=r"lists 'diffusion_pytorch_model-00002-of-00002\.safetensors'"):
        weight_files(tmp_path)
    index.write_text('{"weight_map": {"a": "../diffusion_pytorch_model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match="which is not in its folder"):
        weight_files(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match="is not a shard index"):
        weight_files(tmp_path)


def test_variants_come_after_the_plain_file(tmp_path: Path) -> None:
    variant, plain = (tmp_path / f"diffusion_pytorch_model{tag}.safetensors" for tag in (".fp16", ""))
    variant.touch()
    assert weight_files(tmp_path) == [variant]
    plain.touch()
    assert weight_files(tmp_path) == [plain]
