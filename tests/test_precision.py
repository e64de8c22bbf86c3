"""Solvers multiply in float32, whatever the user allows products to be rounded to."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bittern
from bittern import pipelines, recipes, tiny_flux, tiny_unet
from bittern.precision import exact_products, multiplies
from bittern.trajectories import State, record


@pytest.fixture(autouse=True)
def tf32_allowed() -> Generator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


def test_the_block_is_exact_and_what_was_before_is_restored() -> None:
    with pytest.raises(ValueError, match="inside"), exact_products():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        raise ValueError("inside")
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_what_a_cpu_multiplies_is_what_its_library_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiplies("cpu", torch.float32) and multiplies("cuda", torch.bfloat16)
    for has in (True, False):
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda has=has: has))
        assert multiplies("cpu", torch.bfloat16) == has
        # Where torch does not tell, a model is left as it is.
        assert multiplies("cpu", torch.float16)


@pytest.mark.gpu
def test_gram_matrices_are_exact() -> None:
    layer = nn.Linear(96, 8).cuda()
    x = torch.randn(4096, 96, generator=torch.Generator().manual_seed(0)) @ torch.randn(96, 96).tril()
    statistics = record(layer, [""], [State(prompt=0, step=0, args=(x.cuda(),), kwargs={})], rows=64)[""]
    exact = x.double().T @ x.double()
    assert (statistics.gram.cpu() - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("model", [tiny_flux.NAME, tiny_unet.NAME])
def test_calibration_on_a_gpu_agrees_with_the_cpus(model: str) -> None:
    # Sensitivities take a CPU minutes.
    recipe = recipes.load("svdquant").override(default={"sensitivity": False})
    reports = []
    for device in ("cpu", "cuda"):
        pipe = pipelines.load(model, device=device)
        reports.append(bittern.quantize(pipe, recipe, samples=6))
    for mine, other in zip(*(report.rows for report in reports), strict=True):
        assert mine.stages is not None and other.stages is not None
        for stage, error in mine.stages.items():
            assert other.stages[stage] == pytest.approx(error, rel=0.25), f"{mine.path} after {stage}"
