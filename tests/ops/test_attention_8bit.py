"""8-bit attention on a CPU: its numbers, its place in torch, and what it refuses. The kernels are in `kernel_cases`."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bittern import ops
from bittern.errors import UserError
from bittern.ops import attention, cudnn
from bittern.ops.attention import codes_of, reference_attention, refusal


def random(
    images: int = 2, tokens: int = 70, key_tokens: int | None = None, heads: int = 3, size: int = 32
) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    lengths = (tokens, key_tokens or tokens, key_tokens or tokens)
    return [torch.randn(images, n, heads, size, generator=g) for n in lengths]


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("key_tokens", [None, 9])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_it_is_attention_with_rounded_operands(scale: float | None, key_tokens: int | None, size: int) -> None:
    """Step by step in float64, with every rounding where the module says it is."""
    q, k, v = random(key_tokens=key_tokens, size=size)
    n = {32: 32, 48: 16}[size]
    hadamard = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]).double()

    def codes(x: Tensor, bound: Tensor) -> tuple[Tensor, float]:
        step = 2.0 ** math.ceil(math.log2(float(bound) / 448))
        return (x / step).to(torch.float8_e4m3fn).double().transpose(1, 2), step

    def mixed(x: Tensor) -> Tensor:
        return (x.double().unflatten(-1, (size // n, n)) @ hadamard).flatten(-2)

    qc, qs = codes(mixed(q), q.norm(dim=-1).max() * n**0.5)
    kc, ks = codes(mixed(k - k.mean(1, keepdim=True)), k.norm(dim=-1).max() * 2 * n**0.5)
    vc, vs = codes(v.double(), v.abs().max())
    z = qc @ kc.mT * (qs * ks / n * (scale or size**-0.5))
    p = (z - z.amax(-1, keepdim=True)).exp()
    o = (p * 256).to(torch.float8_e4m3fn).double() @ vc * vs / 256 / p.sum(-1, keepdim=True)
    want = ((o / (2 * vs)).to(torch.float8_e4m3fn).double() * 2 * vs).transpose(1, 2)
    found = ops.attention_8bit(q, k, v, scale)
    # Where float32 sums are on the other side of a boundary a code is the next one.
    assert (found.double() == want).double().mean() > 0.99 and apart(found, want) < 5e-3
    assert 0.01 < apart(found, exact(q, k, v, scale=scale)) < 0.1


def test_what_all_keys_share_and_a_few_places_hold_costs_nothing() -> None:
    """Both are in keys of trained models; rounded as they are they drown the rest."""
    q, k, v = random()
    k = k + 30 * torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    near = apart(ops.attention_8bit(q, k, v), exact(q, k, v))
    q[..., :2] *= 12
    k[..., :2] *= 12
    few = apart(ops.attention_8bit(q, k, v), exact(q, k, v))
    assert near < 0.08 and few < 0.13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_powers_of_two_that_hold_everything(dtype: torch.dtype) -> None:
    for peak in (1.0, 448.0, 449.0, 3.7e-6, 6e4):
        x = torch.linspace(-peak, peak / 3, 96).to(dtype).view(1, 3, 1, 32)
        (q, q_scale), (k, k_scale), (v, v_scale) = codes_of(x, x, x)
        assert all(scale.log2() == scale.log2().round() for scale in (q_scale, k_scale, v_scale))
        assert 224 <= v.float().abs().max() <= 448
        assert torch.equal(v.float() * v_scale, (x.float() / v_scale).to(torch.float8_e4m3fn).float() * v_scale)
        assert q.float().abs().max() <= 448 and 14 <= k.float().abs().max() <= 448
    zero = torch.zeros(1, 3, 1, 32, dtype=dtype)
    assert not any(codes.float().any() for codes, _ in codes_of(zero, zero, zero))


def test_one_picture_does_not_change_with_those_beside_it() -> None:
    q, k, v = random()
    for x in (q, k, v):
        x[1] *= 8
    alone = [x[:1] for x in (q, k, v)]
    assert apart(ops.attention_8bit(q, k, v)[:1], ops.attention_8bit(*alone)) < 5e-3


def test_few_heads_at_a_time_are_all_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = random()
    whole = reference_attention(*given)
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", 4 * 70 * 70)
    assert apart(reference_attention(*given), whole) < 1e-3


def test_what_is_not_finite_leaves_nothing_finite() -> None:
    for which in range(3):
        for value in (float("nan"), float("inf")):
            given = random(images=1)
            given[which][0, 3, 1, 5] = value
            assert not torch.isfinite(ops.attention_8bit(*given)).any()
    assert not ops.attention_8bit(*(x * 0 for x in random())).any()


def test_the_operation_is_sound_to_torch() -> None:
    torch.library.opcheck(torch.ops.bittern.attention_8bit.default, (*random(tokens=6), None))
    q, k, v = torch.randn(2, 5, 3, 4, 8).unbind(2)
    torch.library.opcheck(torch.ops.bittern.attention_8bit.default, (q, k, v, 0.1))
    torch.library.opcheck(torch.ops.bittern.attention_8bit.default, (*random(tokens=6, key_tokens=3), 0.1))
    assert ops.attention_8bit(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
    assert ops.attention_8bit(q[:, :0], k, v).shape == (2, 0, 4, 8)


def test_it_compiles_whole() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention_8bit(q * 2, k, v) + 1

    given = random()
    with torch.no_grad():
        assert torch.equal(torch.compile(call, fullgraph=True)(*given), call(*given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(1, a[1][:, :4]), r"keys \[2, 4, 3, 32\] and values \[2, 70, 3, 32\]: expected"),
        (lambda a: a.__setitem__(0, a[0][..., :8]), r"queries \[2, 70, 3, 8\], keys"),
        (lambda a: a.__setitem__(0, a[0][0]), r"queries \[70, 3, 32\], keys"),
        (
            lambda a: a.__setitem__(2, a[2].bfloat16()),
            "on cpu, torch.bfloat16 on cpu: expected one dtype",
        ),
        (lambda a: a.__setitem__(0, a[0].to("meta")), "torch.float32 on meta, torch.float32 on cpu, .* on one device"),
        (lambda a: a.__setitem__(slice(None), [x.long() for x in a]), "have dtype torch.int64: expected a float type"),
        (lambda a: a.__setitem__(slice(1, 3), [x[:, :0] for x in a[1:]]), "of no tokens: expected at least one"),
        (lambda a: a[2].requires_grad_(), "8-bit attention has no gradients: call the model under torch.no_grad"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    given = random()
    change(given)
    with pytest.raises(UserError, match=message):
        ops.attention_8bit(*given)


class OnGpu:
    """As much of a tensor as a refusal asks for."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, size: int = 128, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (1, 64, 2, size), dtype


@pytest.mark.parametrize(
    ("capability", "has", "x", "reason"),
    [
        ((9, 0), True, OnGpu(), None),
        ((12, 0), True, OnGpu(64), None),
        ((8, 9), True, OnGpu(), r"needs compute capability 9.0 or more \(Hopper\), not 8.9"),
        (None, True, OnGpu(), "not another maker's GPU"),
        (
            (9, 0),
            False,
            OnGpu(),
            r"nvidia-cudnn-frontend, .*: pip install 'bittern\[fp8-attention\]'",
        ),
        ((9, 0), True, OnGpu(72), "takes heads of multiples of 16 up to 128, not of 72"),
        ((9, 0), True, OnGpu(512), "takes heads of multiples of 16 up to 128, not of 512"),
        ((9, 0), True, OnGpu(dtype=torch.float32), "takes torch.bfloat16, torch.float16, not torch.float32"),
    ],
)
def test_why_cudnn_cannot(
    capability: Any, has: bool, x: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bittern.ops.dispatch.device_capability", lambda _: capability)
    monkeypatch.setattr(attention, "_HAS_CUDNN", has)
    monkeypatch.setattr(attention, "_HAS_TRITON", True)
    found = refusal(x, x, x)
    assert found is reason is None or re.search(str(reason), str(found))


def test_a_cpu_computes_the_reference_and_says_why() -> None:
    given = random()
    assert refusal(*given) == "runs on cuda, not on cpu"
    with ops.use_backend("torch"):
        assert torch.equal(ops.attention_8bit(*given), reference_attention(*given))
    with ops.use_backend("triton"), pytest.raises(UserError, match="8-bit attention cannot be computed here by"):
        ops.attention_8bit(*given)


class Described:
    """Stands for cuDNN's graphs, whose device is not here: what is asked of them, by uid."""

    def __init__(self, **options: Any) -> None:
        self.options, self.tensors, self.attention = options, dict[int, dict[str, Any]](), dict[str, Any]()

    def tensor(self, uid: int, **how: Any) -> Node:
        self.tensors[uid] = how
        return Node(self, uid)

    def sdpa_fp8(self, **given: Any) -> list[Node | None]:
        self.attention = given
        return [Node(self), None, Node(self), Node(self)]


class Node:
    def __init__(self, graph: Described, uid: int = 0) -> None:
        self.graph, self.uid, self.how = graph, uid, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        def put(value: Any) -> Node:
            self.how[name.removeprefix("set_")] = value
            if name == "set_uid":
                self.graph.tensors[value] = self.how
            return self

        return put


def test_autocast_changes_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 32, generator=g) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.attention_8bit(q, k, v)
    assert found.dtype == torch.float32 and torch.equal(found, ops.attention_8bit(q, k, v))


def test_what_cudnn_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queries [2, 70, 3, 32] and keys of 9 tokens, contiguous, by image, head, token and place."""

    class Package:
        class data_type:
            FP8_E4M3, FLOAT = "e4m3", "single"

        pygraph = Described

    monkeypatch.setattr(cudnn, "_package", lambda: Package)
    graph = cudnn.describe(cudnn.Problem(0, 2, 70, 9, 3, 32, 0.25), handle=7)
    assert graph.options["handle"] == 7 and graph.options["io_data_type"] == "e4m3"
    x, y = torch.empty(2, 70, 3, 32).transpose(1, 2), torch.empty(2, 9, 3, 32).transpose(1, 2)
    for uid, like in ((1, x), (2, y), (3, y), (4, x)):
        assert (graph.tensors[uid]["dim"], graph.tensors[uid]["stride"]) == (list(like.shape), list(like.stride()))
        assert graph.tensors[uid]["data_type"] == "e4m3"
    given = graph.attention
    assert given["attn_scale"] == 0.25 and given["generate_stats"] is False
    scalars = ["descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o"]
    uids = [given[name].uid for name in ("q", "k", "v", *scalars)]
    assert uids[:3] == [1, 2, 3] and uids[3:] == [int(uid) for uid in cudnn._SCALARS[:6]]
    assert all(graph.tensors[uid]["dim"] == [1, 1, 1, 1] for uid in uids[3:])
    assert sorted(graph.tensors) == sorted([1, 2, 3, 4, *map(int, cudnn._SCALARS)])
