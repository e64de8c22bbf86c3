from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from layers_helpers import INT4, TERNARY, few_bit, solved
from torch import Tensor, nn

from bittern import ops
from bittern.errors import UserError
from bittern.layers import FewBitWeight, QuantLinear, paths, quant_layers, set_path
from bittern.scheme import Scheme

SCHEMES = [INT4, TERNARY, Scheme(activations=4, shift=(0.2,), branch_dtype="fp16", rank=16, scale_dtype="fp32")]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("path", ops.PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_operation_on_the_solution(scheme: Scheme, path: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(100, 33).to(dtype)
    (layer,), (solution,) = solved([linear], scheme)
    layer.path = path
    x = torch.randn(2, 5, 100, dtype=dtype)
    want = ops.few_bit_linear(
        [x],
        scheme.format.pack(solution.codes),
        solution.scales,
        solution.smooth,
        solution.down,
        solution.up,
        linear.bias,
        scheme.weight,
        scheme.group_size,
        path,
        scheme.shift,
    )
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weight_is_the_solutions(scheme: Scheme) -> None:
    (layer,), (solution,) = solved([nn.Linear(100, 33)], scheme)
    assert torch.allclose(layer.weight.dequantize(), solution.reconstruct(), atol=1e-6)


def test_it_takes_the_place_of_its_linear() -> None:
    linear = nn.Linear(64, 32, dtype=torch.bfloat16).eval()
    (layer,), _ = solved([linear])
    assert isinstance(layer, nn.Linear) and layer.bias is linear.bias and not layer.training
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert {name for name, _ in layer.named_buffers()} == {"codes", "scales", "smooth", "down", "up"}
    (bare,), _ = solved([nn.Linear(64, 32, bias=False)], TERNARY)
    assert bare.bias is None and not [*bare.parameters()]
    assert {name for name, _ in bare.named_buffers()} == {"codes", "scales"}


def test_segments_may_come_apart_or_together() -> None:
    (layer,) = few_bit([20], 96, segments=(64, 32))
    x = torch.randn(3, 4, 96)
    assert torch.equal(layer(x), layer([x[..., :64], x[..., 64:]]))
    with pytest.raises(UserError, match="inputs of 64 and 31 columns"):
        layer([x[..., :64], x[..., 65:]])


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to("cpu", torch.float64), torch.float64),
        (lambda m: m.type(torch.bfloat16), torch.bfloat16),
        (lambda m: m.share_memory(), torch.float32),
        (lambda m: m.to("cpu"), torch.float32),
    ],
)
def test_moving_casts_the_bias_and_the_compute_dtype_alone(move: Any, dtype: torch.dtype) -> None:
    layers = few_bit([20, 30], 64, Scheme(rank=8, smooth=True, scale_dtype="fp32", branch_dtype="fp16"))
    model = nn.ModuleList(layers)
    before = [{leaf: t.clone() for leaf, t in layer.tensors().items()} for layer in layers]
    move(model)
    for layer, tensors in zip(layers, before, strict=True):
        assert layer.compute_dtype == layer.weight.dtype == layer.bias.dtype == dtype
        for leaf, tensor in layer.tensors().items():
            assert tensor.dtype == tensors[leaf].dtype and torch.equal(tensor, tensors[leaf])


def test_to_meta_and_empty() -> None:
    layers = few_bit([20, 30], 64)
    model = nn.ModuleList(layers).to("meta")
    assert all(t.is_meta for t in [*model.buffers(), *model.parameters()])
    assert layers[1].weight.device.type == "meta" and layers[1].weight.shape == (30, 64)
    model.to_empty(device="cpu")
    assert [t.shape for t in layers[1].tensors().values()] == [(30, 32), (30, 2), (30, 8)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_fills_an_empty_layer(scheme: Scheme, device: str) -> None:
    (layer,) = few_bit([20], 70, scheme)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    # The codes carry the numbers; a dense weight in the file would be eight times the size.
    assert state["weight"].is_meta and state["weight"].shape == (20, 70)
    other = QuantLinear.empty(70, 20, scheme, (70,), device=device)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    x = torch.randn(4, 70)
    assert torch.equal(other(x), layer(x))


def test_a_loaded_layer_has_chosen_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    (full,) = few_bit([40], 64)
    empty = QuantLinear.empty(64, 40, full.scheme, device="meta")
    for leaf, tensor in full.state_dict().items():
        if leaf != "weight":
            empty.load(leaf, tensor)

    def choose(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a compiler would have to trace this")

    monkeypatch.setattr(ops, "choose_path", choose)
    x = torch.randn(3, 64)
    assert torch.equal(empty(x), full(x))


def test_loading_tells_what_does_not_fit() -> None:
    (layer,) = few_bit([20], 64)
    state = layer.state_dict()
    other = QuantLinear.empty(64, 20, INT4, (64,), device="meta")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "scales"'):
        other.load_state_dict({key: value for key, value in state.items() if key != "scales"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "zeros"'):
        other.load_state_dict({**state, "zeros": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"codes is torch.uint8 \[20, 31\]: expected torch.uint8 \[20, 32\]"):
        other.load_state_dict({**state, "codes": state["codes"][:, 1:]})
    with pytest.raises(UserError, match=r"scales is torch.float32 \[20, 2\]: expected torch.bfloat16"):
        other.load("scales", state["scales"].float())
    with pytest.raises(UserError, match="no tensor 'scale': did you mean 'scales'"):
        other.load("scale", state["scales"])
    with pytest.raises(UserError, match=r"bias has shape \[19\]: expected \[20\]"):
        other.load("bias", torch.zeros(19))
    with pytest.raises(UserError, match="no tensor 'bias'"):
        QuantLinear.empty(64, 20, INT4, bias=False).load("bias", torch.zeros(20))


def test_a_bias_is_loaded_in_the_compute_dtype() -> None:
    layer = QuantLinear.empty(64, 20, INT4, device="meta", dtype=torch.bfloat16)
    layer.load("bias", torch.ones(20))
    assert isinstance(layer.bias, nn.Parameter) and layer.bias.dtype == torch.bfloat16


def test_segments_must_add_up() -> None:
    with pytest.raises(UserError, match="add up to 96: expected 100"):
        QuantLinear.empty(100, 20, INT4, (64, 32))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(duplicate: Any) -> None:
    (layer,) = few_bit([20], 64)
    layer.path = "a4"
    x = torch.randn(3, 64)
    want = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), want) and other.path == "a4"
    other.codes.zero_()
    assert torch.equal(layer(x), want)


def test_paths_are_set_counted_and_explained() -> None:
    model = nn.ModuleDict({"a": few_bit([20], 64)[0], "b": few_bit([20], 64, TERNARY)[0], "c": nn.Linear(2, 2)})
    assert list(quant_layers(model)) == ["a", "b"]
    assert paths(model) == {"a8-int8": 1, "a16": 1}
    assert "integer" in quant_layers(model)["a"].choice().reason
    set_path(model, "a8-fp8")
    assert paths(model) == {"a8-fp8": 1, "a16": 1}, "a layer solved for 16-bit activations keeps them"
    set_path(model, "a4")
    assert paths(model) == {"a4": 1, "a16": 1}
    x = torch.randn(2, 64)
    a4 = model["a"](x)
    set_path(model, "auto")
    assert paths(model) == {"a8-int8": 1, "a16": 1} and not torch.equal(model["a"](x), a4)
    with pytest.raises(UserError, match="unknown path 'a6'"):
        set_path(model, "a6")
    assert model["a"].path == "auto"


def test_it_says_what_it_is() -> None:
    (layer,) = few_bit([20], 64)
    assert repr(layer) == (
        "QuantLinear(in_features=64, out_features=20, bias=True, int4 g32, rank=8, activations=8, path=auto)"
    )
    assert "ternary per row, activations=16" in repr(few_bit([20], 64, TERNARY)[0])
    assert repr(layer.weight) == "FewBitWeight(int4, shape=(20, 64), dtype=torch.float32, device='cpu')"


# ---- the weight


def test_the_weight_answers_without_being_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,) = few_bit([20], 64)

    def fail(*args: Any) -> None:
        raise AssertionError("dequantized")

    monkeypatch.setattr(ops, "dequantize", fail)
    weight = layer.weight
    assert isinstance(weight, Tensor) and isinstance(weight.data, FewBitWeight)
    assert weight.shape == (20, 64) and weight.numel() == 1280 and weight.ndim == 2
    assert weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.requires_grad
    assert isinstance(weight.detach(), FewBitWeight) and isinstance(weight.to("cpu"), FewBitWeight)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    assert weight.to("meta").device.type == "meta"
    assert pickle.loads(pickle.dumps(weight)).is_meta
    assert isinstance(copy.deepcopy(weight), FewBitWeight)
    assert "weight" in layer.state_dict()


def test_the_weight_computes_like_a_tensor() -> None:
    (layer,) = few_bit([20], 64)
    weight, dense = layer.weight, layer.weight.dequantize()
    assert type(dense) is Tensor
    assert torch.equal(weight.T, dense.T) and torch.equal(weight[3:5, 7], dense[3:5, 7])
    assert torch.equal(weight + 1, dense + 1) and torch.equal(weight.clone(), dense)
    assert torch.equal(torch.cat([weight, weight]), torch.cat([dense, dense]))
    assert torch.equal(torch.zeros(20, 64).copy_(weight), dense)
    assert torch.equal(weight.to(torch.int32), dense.to(torch.int32))
    assert weight.norm() == dense.norm()
    x = torch.randn(3, 64, requires_grad=True)
    nn.functional.linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, dense.sum(0).expand(3, 64))


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.weight.add_(1),
        lambda m: m.weight.data.mul_(2),
        lambda m: m.weight.copy_(torch.zeros(20, 64)),
        lambda m: m.weight.__setitem__(0, 1.0),
        lambda m: torch.add(torch.zeros(20, 64), 1, out=m.weight),
        lambda m: setattr(m.weight, "data", torch.zeros(20, 64)),
        lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(20, 64))),
        lambda m: setattr(m, "weight", torch.zeros(20, 64)),
        lambda m: m.reset_parameters(),
        lambda m: nn.init.normal_(m.weight),
    ],
)
def test_the_weight_refuses_to_be_written(write: Any) -> None:
    (layer,) = few_bit([20], 64)
    before = layer.weight.dequantize()
    with pytest.raises(UserError, match="read-only"):
        write(layer)
    assert torch.equal(layer.weight.dequantize(), before)


def test_inputs_of_other_segments_are_refused_with_their_sizes() -> None:
    (layer,) = few_bit([24], 136, segments=(64, 72))
    swapped = [torch.randn(3, k) for k in (72, 64)]
    with pytest.raises(
        UserError, match=r"inputs of 72 and 64 columns: expected tensors of 64 and 72, in this order, or one of 136"
    ):
        layer(swapped)
    for inputs, sizes in (
        ([torch.randn(3, 136)], "136"),
        ([], "none"),
        ([torch.randn(3, k) for k in (64, 64, 8)], "64 and 64 and 8"),
        (torch.randn(3, 135), "135"),
    ):
        with pytest.raises(UserError, match=f"inputs of {sizes} columns: expected tensors of 64 and 72"):
            layer(inputs)
    assert torch.equal(layer(swapped[::-1]), layer(torch.cat(swapped[::-1], dim=1)))
    (plain,) = few_bit([24], 64)
    for inputs in (torch.randn(3, 65), [torch.randn(3, 65)], [torch.randn(3, 32)] * 2):
        with pytest.raises(UserError, match="columns: expected one tensor of 64"):
            plain(inputs)


def test_no_outputs_and_no_axes_are_what_they_are_to_a_linear() -> None:
    linear, layer = nn.Linear(64, 0), QuantLinear(64, 0, TERNARY)
    for x in (torch.randn(3, 64), torch.randn(2, 3, 64), torch.randn(64), torch.randn(0, 64)):
        assert layer(x).shape == linear(x).shape
    with pytest.raises(RuntimeError):
        linear(torch.tensor(1.0))
    with pytest.raises(UserError, match="a single number without an axis: expected a vector"):
        layer(torch.tensor(1.0))
    with pytest.raises(UserError, match="a single number without an axis: expected a vector"):
        few_bit([24], 136, segments=(64, 72))[0](torch.tensor(1.0))
