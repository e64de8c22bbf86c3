"""The comparison with other libraries: what it counts, what it refuses, what it says of those that are not there."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import peers
import peers_quality
import pytest
import torch
from peers_quality import Method, best, measured, replace_weights, rounded, run, summary, table
from torch import nn


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("k", [64, 100, 130])
def test_rounding_is_the_nearest_of_a_symmetric_grid(bits: int, k: int) -> None:
    generator = torch.Generator().manual_seed(bits * k)
    weight = torch.randn(5, k, generator=generator)
    weight[2, :64] = 0
    weight[3, 1] = 50
    found, size = rounded(weight, bits)
    groups = -(-k // 64)
    assert size == 5 * k * bits / 8 + 2 * 5 * groups
    top = 2 ** (bits - 1) - 1
    for row in range(5):
        for start in range(0, k, 64):
            part = weight[row, start : start + 64]
            scale = float((part.abs().max() / top).bfloat16())
            grid = np.arange(-top, top + 1) * scale
            nearest = np.abs(part.double().numpy()[:, None] - grid).min(axis=1)
            missed = np.abs(part.double() - found[row, start : start + 64].double()).numpy()
            np.testing.assert_allclose(missed, nearest, rtol=1e-5, atol=1e-6 * float(part.abs().max()))


def test_weights_are_replaced_as_matrices_and_bits_counted_over_the_targets() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Conv2d(3, 5, (2, 3)), "kept": nn.Linear(6, 4)})
    pipe = SimpleNamespace(transformer=model)
    bench = SimpleNamespace(pipe=pipe, dense=model, targets=["a", "b"])
    seen: list[tuple[int, int]] = []

    def change(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        seen.append(tuple(weight.shape))
        return 2 * weight, 10.0

    bits = replace_weights(bench, change)
    assert bits == 8 * 20 / (24 + 90)
    assert seen == [(4, 6), (5, 18)]
    assert pipe.transformer is not model
    for name, factor in (("a", 2), ("b", 2), ("kept", 1)):
        assert torch.equal(pipe.transformer[name].weight, factor * model[name].weight)


class _Scaled(nn.Module):
    """A layer whose weight is coarse, and which may answer otherwise for some inputs."""

    def __init__(self, weight: torch.Tensor, honest: bool = True):
        super().__init__()
        self.weight, self.honest = weight, honest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x @ self.weight.T
        return out if self.honest else out + x.square().sum(dim=-1, keepdim=True)


def _setting(layer) -> peers.Setting:
    return peers.Setting("torch", "torch", 64, lambda linear, group: (layer(linear.weight), float(group)))


def test_the_effective_weight_is_what_the_layer_computes_with() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    coarse = (weight * 4).round() / 4
    before = torch.get_rng_state()
    found, stored, apart = peers.effective(_setting(lambda _: _Scaled(coarse)), weight)
    assert torch.equal(found, coarse)
    assert stored == 32  # 64 does not divide 96
    assert apart < 1e-6
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_that_computes_something_else_or_nothing_coarser_is_refused() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="its own forward differs"):
        peers.effective(_setting(lambda w: _Scaled((w * 4).round() / 4, honest=False)), weight)
    with pytest.raises(RuntimeError, match="leaves a 8 x 96 layer"):
        peers.effective(_setting(_Scaled), weight)


def test_libraries_that_are_not_there_or_fail_have_a_row_with_the_reason() -> None:
    def fail(_bench: object) -> dict[str, object]:
        raise ImportError("needs a kernel\nand more")

    bench = SimpleNamespace(reference=None, trajectory=None)
    absent = Method("X int4", "peer", fail, library="no-such-library")
    assert measured(bench, absent, {"X int4": "a16"}) == [
        ("X int4", {"kind": "peer", "reason": "no-such-library is not installed"})
    ]
    broken = Method("Y int4", "peer", fail, library="torch")
    [(_, row)] = measured(bench, broken, {"Y int4": "a16"})
    assert row["reason"] == "ImportError: needs a kernel"
    with pytest.raises(ImportError):
        measured(bench, Method("Z", "ours", fail), {"Z": "a16"})


def _row(kind: str, bits: float, psnr: list[float], path: str = "a16") -> dict[str, object]:
    return {
        "kind": kind, "bits_per_weight": bits, "psnr": sum(psnr) / len(psnr), "psnr_stderr": 0.5, "psnr_each": psnr,
        "path": path, "ssim": 0.9, "velocity_error": 0.1,
    }  # fmt: skip


def test_the_best_are_sought_at_four_and_a_half_bits_as_tables_print_them() -> None:
    rows = {
        "ours": _row("ours", 4.43, [31, 33]),
        "ours a4": _row("ours", 4.43, [25, 29], "a4+a16"),
        "ours fat": _row("ours", 6.1, [50, 50]),
        "eight": _row("ours", 2.1, [60, 60], "a8-int8"),
        "peer": _row("peer", 4.501, [30, 31]),
        "peer fat": _row("peer", 4.512, [40, 40]),
        "int8": _row("rounding", 4.25, [70, 70]),
        "gone": {"kind": "peer", "reason": "not installed"},
    }
    assert best(rows, "peer") == "peer"
    found = summary(rows)
    assert found["our W4A16 over the best peer, dB"] == "+1.50 ± 0.50 (ours)"
    assert found["our W4A4 over the best peer, dB"] == "-3.50 ± 1.50 (ours a4)"
    assert best({"gone": rows["gone"]}, "peer") is None
    place = {
        "model": "m", "images": 2, "steps": 1, "dtype": "d", "device": "c", "torch": "t", "commit": "x",
        "peers": {"one": None},
    }  # fmt: skip
    text = table({"rows": rows, "environment": place, "summary": found})
    assert "| peer | gone | | | not installed | | | |" in text
    assert "one not installed" in text
    assert text.index("peer fat") < text.index("ours fat")


def test_a_calibrated_row_is_kept_and_not_drawn_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(
        model="tiny-flux", dtype=torch.float32, device="cpu", images=1, steps=1, samples=1, only="groups of 32",
        out=tmp_path / "r.json",
    )  # fmt: skip
    first = run(args)
    assert list(first["rows"]) == ["int4-gptq, groups of 32 [a16]"]
    assert first["rows"]["int4-gptq, groups of 32 [a16]"]["bits_per_weight"] == 4.5
    assert first["summary"]["best W4A16 of ours"] == "int4-gptq, groups of 32 [a16]"
    assert json.loads(args.out.read_text()) == first
    monkeypatch.setattr(peers_quality, "measured", None)
    assert run(args) == first


def test_libraries_that_are_not_there_are_named_with_the_mend(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "installed", lambda library: None)
    method = next(method for method in peers_quality.methods() if method.library)
    args = argparse.Namespace(
        model="tiny-flux", dtype=None, device="cpu", images=1, steps=1, samples=1, only=method.name,
        out=tmp_path / "r.json",
    )  # fmt: skip
    rows = run(args)["rows"].values()
    assert rows and all(row["reason"] == f"{method.library} is not installed" for row in rows)
    line = f'not installed, so not compared with: {method.library}; pip install -e ".[peers]" brings them'
    assert capsys.readouterr().err.count(line + "\n") == 1


def test_a_row_that_does_not_exist_is_refused() -> None:
    with pytest.raises(peers_quality.UserError, match="--only 'int99'"):
        run(argparse.Namespace(only="int99", images=1))
