from __future__ import annotations

import copy
import functools
import itertools
import pickle
from typing import Any

import pytest
import torch
from layers_helpers import INT4, TERNARY, few_bit, solved
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from bittern.errors import UserError
from bittern.layers import QuantLinear, group_linear, join_group
from bittern.scheme import Scheme

OUTPUTS = (20, 8, 33)


def group(scheme: Scheme = INT4, bias: bool = True, segments: tuple[int, ...] | None = None) -> nn.ModuleList:
    return nn.ModuleList(few_bit(OUTPUTS, 96, scheme, segments, bias))


def outputs(model: nn.ModuleList, x: Tensor) -> list[Tensor]:
    return [layer(x) for layer in model]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def assert_shared(model: nn.ModuleList) -> None:
    """One buffer a leaf, in which the members' rows follow one another."""
    first = model[0]
    assert all(member.holder is first and member.group is first.group for member in model)
    assert {name for name, _ in model.named_buffers()} >= {"0.group_codes", "0.group_scales"}
    for leaf in ("codes", "scales", "up"):
        starts = [member.tensors()[leaf] for member in model if leaf in member.tensors()]
        for before, after in itertools.pairwise(starts):
            assert before.data_ptr() + before.nbytes == after.data_ptr()
    for member in model[1:]:
        assert member.parts().down is first.parts().down and member.parts().smooth is first.parts().smooth


def test_joining_changes_no_output() -> None:
    layers, solutions = solved([nn.Linear(96, n) for n in OUTPUTS])
    x = torch.randn(2, 5, 96)
    want = [layer(x) for layer in layers]
    model = nn.ModuleList(layers)
    join_group(layers)
    assert_shared(model)
    assert_equal(outputs(model, x), want)
    for layer, solution in zip(layers, solutions, strict=True):
        assert torch.allclose(layer.weight.dequantize(), solution.reconstruct(), atol=1e-6)


@pytest.mark.parametrize("path", ["a16", "a8-int8", "a8-fp8", "a4"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", [INT4, TERNARY])
def test_together_is_the_same_as_one_by_one(path: str, bias: bool, scheme: Scheme) -> None:
    model = group(scheme, bias, (64, 32))
    if bias:
        model[1].bias = None
    for layer in model:
        layer.path = path
    x = torch.randn(2, 5, 96)
    for members in (model, model[:2], model[1:], model[2:]):
        for given in (x, [x[..., :64], x[..., 64:]]):
            for a, b in zip(group_linear(list(members), given), outputs(members, x), strict=True):
                assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("gelus", [0, 1, 2, 4])
def test_gelus_follow_the_last_layers_wherever_these_run(gelus: int) -> None:
    """Three of a group, one by itself as in files of other engines, and one that is not few-bit."""
    model, (alone,), x = group(), few_bit((12,), 96), torch.randn(3, 96)
    members = [*model, alone, nn.Linear(96, 4)]
    found = group_linear(members, x, gelus=gelus)
    for place, (member, y) in enumerate(zip(members, found, strict=True)):
        expected = member(x)
        if place >= len(members) - gelus:
            expected = nn.functional.gelu(expected, approximate="tanh")
        assert torch.allclose(y, expected, atol=1e-5)


def test_what_can_run_together_runs_as_one_operation(operations: list[tuple[int, int]]) -> None:
    model, x = group(), torch.randn(3, 96)
    a, b, c = model

    def rows(members: list[nn.Module]) -> list[tuple[int, int]]:
        operations.clear()
        group_linear(members, x)
        return list(operations)

    assert rows([a, b, c]) == [(0, 61)] and rows([b, c]) == [(20, 61)]
    apart = [(0, 20), (20, 28), (28, 61)]
    assert rows([a, c]) == [apart[0], apart[2]] and rows([b, a]) == [apart[1], apart[0]]
    assert rows([a, b, nn.Linear(96, 4)]) == [(0, 28)]
    hook = b.register_forward_hook(lambda *_: None)
    assert rows([a, b, c]) == apart
    hook.remove()
    b.forward = functools.partial(b.forward)
    assert rows([a, b, c]) == apart
    # So do those leave it who wrapped it.
    b.forward = b.forward.func
    assert rows([a, b, c]) == [(0, 61)]
    b.forward = a.forward
    assert rows([a, b, c]) == [apart[0], apart[0], apart[2]]
    del b.forward
    b.path = "a4"
    assert rows([a, b, c]) == apart
    b.path = "auto"
    assert rows([a, b, c]) == [(0, 61)]


def wear(model: nn.ModuleList, name: str, targets: list[str], **more: Any) -> None:
    """Loads a random adapter by peft."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **more)
    inject_adapter_in_model(config, model, adapter_name=name)


@pytest.mark.parametrize("gelus", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loras_do_not_part_a_group(dtype: torch.dtype, gelus: int, operations: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    model, x = group().to(dtype), torch.randn(3, 96, dtype=dtype)
    bare = [layer(x) for layer in model]
    wear(model, "a", ["0", "2"])
    wear(model, "b", ["1", "2"], lora_dropout=0.5)
    model.eval()

    def check(expected: list[tuple[int, int]]) -> list[Tensor]:
        apart = [member(x) for member in model]
        operations.clear()
        found = group_linear(list(model), x, gelus=gelus)
        assert operations == expected
        for place, (one, y) in enumerate(zip(apart, found, strict=True)):
            want = nn.functional.gelu(one, approximate="tanh") if place >= len(model) - gelus else one
            assert torch.allclose(y, want, atol=1e-5 if dtype == torch.float32 else 2e-2) and y.dtype == dtype
        return apart

    whole, parted = [(0, 61)], [(0, 20), (20, 28), (28, 61)]
    for active in (["a"], ["b"], ["a", "b"]):
        for member in model:
            member.set_adapter(active)
        differ = [not torch.equal(*pair) for pair in zip(check(whole), bare, strict=True)]
        assert differ == ["a" in active, "b" in active, True]
    model[2].scale_layer(-0.5)
    check(whole)
    for member in model:
        member.enable_adapters(False)
    assert all(torch.equal(*pair) for pair in zip(check(whole), bare, strict=True))
    for member in model:
        member.enable_adapters(True)
    model[1].register_forward_hook(lambda *_: None)
    check(parted)


def test_a_dora_is_called_by_itself() -> None:
    torch.manual_seed(0)
    model, x = group(), torch.randn(3, 96)
    wear(model, "a", ["1"], use_dora=True)
    model.eval()
    for one, y in zip([member(x) for member in model], group_linear(list(model), x), strict=True):
        assert torch.allclose(one, y, atol=1e-5)


def test_memory_is_counted_once() -> None:
    layers, _ = solved([nn.Linear(96, n) for n in OUTPUTS])
    apart = sum(t.nbytes for layer in layers for t in layer.buffers())
    shared = layers[0].smooth.nbytes + layers[0].down.nbytes
    join_group(layers)
    assert sum(t.nbytes for t in nn.ModuleList(layers).buffers()) == apart - 2 * shared


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.half().float()])
def test_a_group_survives(change: Any) -> None:
    model = group(bias=False)
    x = torch.randn(3, 96)
    apart, together = outputs(model, x), group_linear(list(model), x)
    other = change(model)
    assert_shared(other)
    assert_equal(outputs(other, x), apart)
    assert_equal(group_linear(list(other), x), together)


def test_a_copy_shares_nothing_with_its_original() -> None:
    model, x = group(), torch.randn(3, 96)
    want = outputs(model, x)
    other = copy.deepcopy(model)
    for buffer in other.buffers():
        buffer.zero_()
    assert_equal(outputs(model, x), want)


@pytest.mark.parametrize("scheme", [INT4, TERNARY])
def test_a_state_dict_fills_an_empty_group(scheme: Scheme) -> None:
    model, x = group(scheme), torch.randn(3, 96)
    state = model.state_dict()
    shared = {"0.smooth", "0.down"} if scheme is INT4 else set()
    up = {"up"} if scheme is INT4 else set()
    own = {"codes", "scales", "bias", "weight"} | up
    assert set(state) == shared | {f"{i}.{leaf}" for i in range(3) for leaf in own}
    other = nn.ModuleList(QuantLinear.empty(96, n, scheme, (96,), device="meta") for n in OUTPUTS)
    join_group(list(other))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert_shared(other)
    assert_equal(outputs(other, x), outputs(model, x))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_members_load_in_any_order(order: tuple[int, ...]) -> None:
    model, x = group(), torch.randn(3, 96)
    other = nn.ModuleList(QuantLinear.empty(96, n, INT4, (96,), device="meta") for n in OUTPUTS)
    join_group(list(other))
    for index in order:
        for leaf, tensor in [*model[index].tensors().items(), ("bias", model[index].bias.detach())]:
            other[index].load(leaf, tensor)
    assert_shared(other)
    assert_equal(outputs(other, x), outputs(model, x))
    with pytest.raises(UserError, match="no tensor 'down'"):
        other[1].load("down", model[0].tensors()["down"])


def test_what_does_not_fit_together_is_refused() -> None:
    def alone(n: int = 8, k: int = 96, scheme: Scheme = INT4) -> QuantLinear:
        return few_bit([n], k, scheme)[0]

    one = alone()
    for members in ([], [one], [one, one], [one, group()[0]]):
        with pytest.raises(UserError, match="two or more different layers that are in no group yet"):
            join_group(members)
    with pytest.raises(UserError, match="differ in in_features"):
        join_group([one, alone(k=64)])
    with pytest.raises(UserError, match="differ in scheme"):
        join_group([one, alone(scheme=TERNARY)])
    with pytest.raises(UserError, match="differ in compute_dtype"):
        join_group([one, alone().half()])
    (other,), _ = solved([nn.Linear(96, 8)])
    with pytest.raises(UserError, match="have different smooth: solve them together"):
        join_group([one, other])
    assert one.group is None and one.codes is not None
