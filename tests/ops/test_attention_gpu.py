"""8-bit attention by cuDNN on a GPU: against the plain torch that defines it, captured, compiled, in a model."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import bittern
from bittern.errors import UserError
from bittern.integrations import attention
from bittern.integrations.attention_backend import NAME
from bittern.ops import attention_8bit
from bittern.ops.attention import codes_of, reference_attention, refusal
from families import FAMILIES

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16

WEIGHTS_APART = 0.06
"""Relative distance of two computations that round the same weights relative to other maxima: each rounding is wrong by
2.6 % of a weight, apart from the other, and the result is rounded once more."""


@pytest.fixture(autouse=True)
def here() -> None:
    q = torch.empty(1, 64, 1, 64, dtype=BF16, device="cuda")
    if reason := refusal(q, q, q):
        pytest.skip(reason)


def random(
    shape: tuple[int, int, int, int], key_tokens: int | None = None, dtype: torch.dtype = BF16, seed: int = 0
) -> list[Tensor]:
    images, tokens, heads, size = shape
    g = torch.Generator("cuda").manual_seed(seed)
    lengths = (tokens, key_tokens or tokens, key_tokens or tokens)
    return [torch.randn(images, n, heads, size, generator=g, device="cuda").to(dtype) for n in lengths]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = [x.float().transpose(1, 2) for x in (q, k, v)]
    return functional.scaled_dot_product_attention(*wide).transpose(1, 2)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("kind", ["gaussian", "sharp", "outlier"])
@pytest.mark.parametrize(
    ("shape", "key_tokens", "dtype"),
    [
        ((1, 4608, 24, 128), None, BF16),
        ((1, 77, 3, 128), None, BF16),
        ((2, 1111, 4, 64), None, BF16),
        ((2, 333, 4, 128), 77, FP16),
        ((1, 2, 2, 64), 5, BF16),
        ((1, 200, 2, 80), None, BF16),
    ],
)
def test_it_is_as_near_to_exact_attention_as_the_reference(
    shape: tuple[int, int, int, int], key_tokens: int | None, dtype: torch.dtype, kind: str
) -> None:
    q, k, v = random(shape, key_tokens, dtype)
    if kind == "sharp":
        q, k = q * 3, k * 3
    elif kind == "outlier":
        v[..., 5] *= 100
        v[0, -1] *= 30
        k[..., 7] += 20
    found, reference, wanted = attention_8bit(q, k, v), reference_attention(q, k, v), exact(q, k, v)
    assert found.dtype == dtype and found.shape == q.shape and found.is_contiguous()
    assert torch.isfinite(found).all()
    ours, theirs = apart(found, wanted), apart(reference, wanted)
    print(f"{shape} {kind}: {ours:.4f} from exact, the reference {theirs:.4f}, apart {apart(found, reference):.4f}")
    assert ours <= 1.15 * theirs + 2e-3
    assert apart(found, reference) <= WEIGHTS_APART


def test_a_single_key_attended_to_gives_its_codes() -> None:
    """Nothing is rounded but values: a wrong stride, scale or order of tokens shows in every number."""
    g = torch.Generator("cuda").manual_seed(0)
    keys = torch.randint(0, 2, (2, 150, 3, 128), generator=g, device="cuda").mul(2).sub(1).to(BF16) * 16
    order = torch.randperm(150, generator=g, device="cuda")
    v = random((2, 150, 3, 128), seed=1)[0].clamp(-4, 4)
    v = torch.where(v.abs() < 0.05, 0.05, v)
    codes, scale = codes_of(v, v, v)[2]
    found = attention_8bit(keys[:, order], keys, v)
    assert torch.equal(found, (codes.float() * scale).to(BF16)[:, order])


def test_equal_weights_give_the_mean_of_codes() -> None:
    q, k, v = random((1, 500, 2, 64))
    q.zero_()
    assert apart(attention_8bit(q, k, v), reference_attention(q, k, v)) <= 1e-2
    assert not attention_8bit(q, k, v * 0).any()


def test_slices_of_one_tensor_and_another_scale() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    fused = torch.randn(2, 300, 3, 4, 64, generator=g, device="cuda").to(BF16)
    q, k, v = fused.unbind(2)
    whole = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(attention_8bit(q, k, v), attention_8bit(*whole))
    assert apart(attention_8bit(q, k, v, 0.05), reference_attention(q, k, v, 0.05)) <= WEIGHTS_APART
    # Anything of another layout is copied.
    assert torch.equal(attention_8bit(q.mT.contiguous().mT, k, v), attention_8bit(*whole))


def test_runs_streams_and_threads_agree() -> None:
    q, k, v = random((1, 1000, 4, 128))
    first = attention_8bit(q, k, v)
    assert torch.equal(first, attention_8bit(q, k, v))
    results: list[Tensor] = []

    def elsewhere() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            results.append(attention_8bit(q, k, v))
        stream.synchronize()

    elsewhere()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert [torch.equal(first, result) for result in results] == [True, True]


def test_in_a_cuda_graph() -> None:
    q, k, v = random((1, 600, 4, 128))
    attention_8bit(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_8bit(q, k, v)
    for seed in (1, 2):
        for x, y in zip((q, k, v), random((1, 600, 4, 128), seed=seed), strict=True):
            x.copy_(y * seed)
        graph.replay()
        assert torch.equal(out, attention_8bit(q, k, v))


def test_a_shape_never_computed_is_not_captured() -> None:
    q, k, v = random((1, 601, 4, 128))
    refused = pytest.raises(UserError, match="601 to 601 tokens is computed for the first time while a CUDA graph")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        attention_8bit(q, k, v)
    torch.cuda.synchronize()
    attention_8bit(q, k, v)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_8bit(q * 2, k, v) + 1

    given = random((1, 500, 4, 128))
    compiled = torch.compile(call, fullgraph=True, mode=mode)
    with torch.no_grad():
        want = call(*given)
        assert all(torch.equal(compiled(*given), want) for _ in range(3))


@pytest.mark.parametrize("recipe", [None, "svdquant-fast"])
def test_in_a_model(recipe: str | None) -> None:
    wider = {"attention_head_dim": 64, "num_attention_heads": 2, "axes_dims_rope": (16, 24, 24)}
    family = dataclasses.replace(FAMILIES["flux"], tiny={**FAMILIES["flux"].tiny, **wider})
    model: Any = family.build().to("cuda", BF16)
    if recipe:
        bittern.quantize(model, recipe)
    given = {name: x.to("cuda", BF16) for name, x in family.call().items()}
    with torch.no_grad():
        plain = model(**given).sample
        with attention.using(model, NAME):
            eight = model(**given).sample
            compiled = torch.compile(model, fullgraph=True)(**given).sample
    assert 0 < apart(eight, plain) < 0.1
    assert apart(compiled, eight) < 0.03


def test_what_it_does_not_take() -> None:
    q, k, v = random((1, 64, 2, 72))
    with pytest.raises(UserError, match="takes heads of multiples of 16 up to 128, not of 72"):
        attention_8bit(q, k, v)
    with pytest.raises(UserError, match=r"takes torch.bfloat16, torch.float16, not torch.float32"):
        attention_8bit(*(x.float() for x in random((1, 64, 2, 64))))
    if torch.cuda.get_device_capability()[0] == 9:
        with pytest.raises(UserError, match=r"cuDNN .* has no 8-bit attention for 1 x 2 heads of 64, 1 to 5 tokens"):
            attention_8bit(*random((1, 1, 2, 64), 5, BF16))
    given = random((1, 64, 2, 64))
    with bittern.use_backend("torch"):
        assert torch.equal(attention_8bit(*given), reference_attention(*given))
