from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import UserError
from bittern.layers import flat_weight
from bittern.trajectories import State, enough, record, sensitivities, sensitivity


class Toy(nn.Module):
    """Two layers that share an input, one that follows, and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.idle = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.c(torch.tanh(self.a(x)) * self.b(x)),)


def states(count: int, tokens: int = 7) -> list[State]:
    generator = torch.Generator().manual_seed(1)
    return [State(i, 0, (), {"x": torch.randn(2, tokens, 6, generator=generator) * (i + 1)}) for i in range(count)]


def test_sums_are_over_all_tokens_and_rows_are_a_sample_of_them() -> None:
    given = states(5)
    x = torch.cat([state.kwargs["x"].reshape(-1, 6) for state in given])
    found = record(Toy(), ["a", "c"], given, rows=20, seed=2)
    a = found["a"]
    assert a.count == len(x) == 70
    torch.testing.assert_close(a.gram.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(a.amax, x.abs().amax(0))
    assert a.rows.shape == (20, 6)
    match = (a.rows[:, None] == x).all(-1)
    assert (match.sum(1) == 1).all()
    positions = match.int().argmax(1)
    assert torch.bincount(positions // 14, minlength=5).tolist() == [4] * 5
    # Layers that see the same tokens are recorded at the same ones.
    model = Toy()
    middle = torch.tanh(model.a(a.rows)) * model.b(a.rows)
    torch.testing.assert_close(found["c"].rows, middle)


def test_recording_repeats_itself_and_leaves_nothing_behind() -> None:
    model = Toy()
    one, two = (record(model, ["b"], states(3), rows=9, seed=4)["b"] for _ in range(2))
    assert torch.equal(one.rows, two.rows)
    assert torch.equal(one.gram, two.gram)
    other = record(model, ["b"], states(3), rows=9, seed=5)["b"]
    assert not torch.equal(one.rows, other.rows)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_fewer_tokens_than_rows_are_all_kept() -> None:
    found = record(Toy(), ["a"], states(2, tokens=1), rows=100)["a"]
    assert found.rows.shape == (4, 6)
    torch.testing.assert_close(found.rows.T @ found.rows, found.gram)
    assert found.nbytes == 4 * (4 * 6 + 6 * 6 + 6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_named(value: float) -> None:
    given = states(2)
    given[1].kwargs["x"][0, 0, 3] = value
    with pytest.raises(UserError, match="the input of b is NaN or infinite"):
        record(Toy(), ["b"], given, rows=4)


def test_recording_ends_behind_the_last_layer_that_is_watched() -> None:
    model, given = Toy(), states(4)
    ran: list[int] = []
    model.c.register_forward_hook(lambda *_: ran.append(1))
    alone = record(model, ["a"], given, rows=8)
    assert len(ran) == 1
    together = record(model, ["a", "c"], given, rows=8, grams={"c"})
    for name in ("rows", "amax"):
        assert torch.equal(getattr(alone["a"], name), getattr(together["a"], name))
    assert together["a"].gram is None and alone["a"].gram is not None
    assert together["c"].count == alone["a"].count == 56


def test_no_states_and_modules_that_are_not_called() -> None:
    with pytest.raises(UserError, match="no samples"):
        record(Toy(), ["a"], [], rows=4)
    with pytest.raises(UserError, match="idle is never called"):
        record(Toy(), ["a", "idle"], states(1), rows=4)


def test_sensitivity_is_the_gauss_newton_matrix() -> None:
    """Against explicit Jacobians in float64, up to the noise of as many random projections."""
    model, given = Toy(), states(40)
    found = sensitivities(model, ["b", "c"], given * 25, seed=0)
    exact = torch.zeros(4, 4, dtype=torch.float64)
    wide = Toy().double()
    for state in given:
        x = state.kwargs["x"].double()
        # dv / db at one token is the weight of c times what a's branch multiplies with.
        gate = torch.tanh(wide.a(x)).reshape(-1, 4)
        jacobian = wide.c.weight[None] * gate[:, None]
        exact += torch.einsum("toi,toj->ij", jacobian, jacobian).detach()
    relative = (found["b"] / 25 - exact).norm() / exact.norm()
    assert relative < 0.1
    # The last layer's output is the model's.
    identity = torch.eye(5) * 40 * 14
    assert (found["c"] / 25 - identity).norm() / identity.norm() < 0.1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_convolution_is_recorded_as_the_product_that_it_is() -> None:
    class Picture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 5, 3, padding=1, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = Picture()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = record(model, ["conv"], [State(0, 0, (x,), {})], rows=1000)["conv"]
    assert found.count == 2 * 4 * 4
    product = found.rows @ flat_weight(model.conv).T + model.conv.bias
    torch.testing.assert_close(product, model(x).movedim(1, -1).reshape(-1, 5), rtol=1e-4, atol=1e-5)
    felt = sensitivities(model, ["conv"], [State(0, 0, (x,), {})] * 200)["conv"] / 200
    assert (felt / 32 - torch.eye(5)).norm() < 0.3


def test_of_many_large_states_enough_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    given = [State(i, 0, (torch.full((5, 4), float(i + 1)),), {}) for i in range(6)]
    seen: list[int] = []
    model[0].register_forward_hook(lambda _, args, __: seen.append(int(args[0][0, 0])))
    whole = sensitivities(model, ["0"], given)["0"]
    assert seen == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(sensitivity, "ENOUGH", 3 * 20 - 1)
    told: list[tuple[float, float]] = []
    part = sensitivities(model, ["0"], given, progress=lambda *done: told.append(done))["0"]
    assert seen[6:] == [1, 3, 5] and told[-1] == (3, 3)
    assert not torch.equal(part, whole)
    assert (enough(6, 20), enough(2, 20), enough(6, 60)) == (3, 2, 1)
