"""Our PSNR, SSIM and MS-SSIM beside those of torchmetrics, on noise and on pictures with natural statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import image as tm

from bittern.evaluation import fidelity as fid

SIZES = [(176, 176), (181, 240), (256, 203)]


def natural(count: int, height: int, width: int) -> Tensor:
    """Pictures whose amplitudes fall as 1 / frequency, as those of natural pictures do [Field 1987]."""
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    spectrum = torch.fft.rfft2(torch.randn(count, 3, height, width)) / frequency.clamp(min=1 / max(height, width))
    found = torch.fft.irfft2(spectrum, s=(height, width))
    found = (found - found.mean((2, 3), keepdim=True)) / found.std((2, 3), keepdim=True)
    return (128 + 50 * found).clamp(0, 255).to(torch.uint8)


def pairs(height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(height)
    noise = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    scene = natural(2, height, width)
    blurred = torch.nn.functional.avg_pool2d(scene.float(), 5, 1, 2).to(torch.uint8)
    grainy = (scene + 20 * torch.randn(scene.shape)).clamp(0, 255).to(torch.uint8)
    return [(noise, noise.flip(3)), (scene, grainy), (scene, blurred), (scene, noise), (scene, 255 - scene)]


@pytest.mark.parametrize("size", SIZES)
def test_all_three_agree(size: tuple[int, int]) -> None:
    for images, reference in pairs(*size):
        x, y = images.float(), reference.float()
        psnr = tm.peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))
        torch.testing.assert_close(fid.psnr(images, reference).float(), psnr, rtol=0, atol=1e-4)
        options = {"data_range": 255.0, "reduction": "none"}
        ssim = tm.structural_similarity_index_measure(x, y, **options)
        torch.testing.assert_close(fid.ssim(images, reference).float(), ssim, rtol=0, atol=1e-4)
        multi = tm.multiscale_structural_similarity_index_measure(x, y, **options)
        torch.testing.assert_close(fid.ms_ssim(images, reference).float(), multi, rtol=0, atol=1e-4)


def test_ms_ssim_has_the_ends_it_should() -> None:
    scene = natural(2, 176, 190)
    assert fid.ms_ssim(scene, scene).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert (fid.ms_ssim(scene, 255 - scene) < 0.1).all()
    found = fid.fidelity(scene, scene)
    assert found.mean_ms_ssim is not None and found.mean_ms_ssim.mean == pytest.approx(1.0)
    assert fid.fidelity(scene[..., :175], scene[..., :175]).ms_ssim is None
    with pytest.raises(ValueError, match="at least 176"):
        fid.ms_ssim(scene[..., :175], scene[..., :175])
