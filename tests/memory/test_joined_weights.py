"""Without gradients, a layer uses one joined tensor of its projections, which must follow every change of them."""

import copy

import pytest
import torch
from helpers.tiny import randomise, tiny_model

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.memory.layer import DeltaMemLayer


@pytest.fixture(params=[True, False], ids=["coupled", "decay"])
def memory(request) -> DeltaMemLayer:
    adapter = attach(tiny_model(), DeltaMemConfig(state_heads=2, couple_lambda=request.param))
    randomise(adapter)
    return adapter.layer(1)


def _readings(memory: DeltaMemLayer) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, memory.query.in_features)
    state = torch.randn(2, 2, memory.config.rank, memory.config.rank)
    readings, state, *_ = memory(hidden, state, None, True)
    return readings.detach(), state.detach()


def _in_place(memory: DeltaMemLayer) -> None:
    with torch.no_grad():
        memory.key.weight.mul_(-1.5)


def _data(memory: DeltaMemLayer) -> None:
    memory.gate.weight.data = torch.randn_like(memory.gate.weight)


def _assigned(memory: DeltaMemLayer) -> None:
    weights = {name: torch.randn_like(weight) for name, weight in memory.state_dict().items()}
    memory.load_state_dict(weights, assign=True)


def _replaced(memory: DeltaMemLayer) -> None:
    memory.value.weight = torch.nn.Parameter(torch.randn_like(memory.value.weight))


def _cast_and_changed(memory: DeltaMemLayer) -> None:
    memory.double().float()
    _in_place(memory)


def _steps(memory: DeltaMemLayer) -> None:
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.1)
    readings, state, *_ = memory(torch.randn(1, 5, memory.query.in_features), torch.randn(1, 2, 8, 8), None, True)
    (readings.sum() + state.sum()).backward()
    optimizer.step()


@pytest.mark.parametrize("change", [_in_place, _data, _assigned, _replaced, _cast_and_changed, _steps])
def test_a_weight_change_is_used_without_gradients(memory, change):
    before = _readings(memory)
    change(memory)
    with torch.no_grad():
        without = _readings(memory)
    assert not torch.equal(without[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(without, _readings(memory), strict=True))


def test_a_copy_uses_its_own_joined_weights(memory):
    other = copy.deepcopy(memory)
    with torch.no_grad():
        before = _readings(memory)
        _in_place(other)
        changed = _readings(other)
        assert not torch.equal(changed[0], before[0])
        assert all(torch.equal(a, b) for a, b in zip(_readings(memory), before, strict=True))
    assert torch.equal(_readings(other)[0], changed[0])
