"""LSTM and GRU on fake tensors: shapes, what is kept, what is left to torch."""

import pytest
import torch
from target_ops import Ops
from torch import nn
from torch._subclasses import FakeTensorMode

from floatline.errors import ConfigError
from floatline.observe.target import cuda_autocast, target_recurrent

TIME, BATCH, WIDTH, HIDDEN = 5, 3, 4, 8
ROWS = TIME * BATCH


@pytest.mark.parametrize(("kind", "a_layer", "states"), [(nn.LSTM, 5, 2), (nn.GRU, 6, 1)])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
def test_it_keeps_states_output_and_the_reserve(kind, a_layer, states, layers, directions, batch_first):
    with FakeTensorMode(), target_recurrent():
        module = kind(WIDTH, HIDDEN, layers, bidirectional=directions == 2, batch_first=batch_first)
        plain_shapes = [tuple(p.shape) for p in module.parameters()]
        x = torch.empty((BATCH, TIME, WIDTH) if batch_first else (TIME, BATCH, WIDTH), requires_grad=True)
        hx = [torch.empty(layers * directions, BATCH, HIDDEN, requires_grad=True) for _ in range(states)]
        with Ops(known=[x, *hx, *module.parameters()]) as ops:
            out, last = module(x, tuple(hx) if states == 2 else hx[0])
            reserve = ROWS * HIDDEN * directions * (a_layer * layers + layers - 1)
            outputs = ROWS * HIDDEN * directions + states * layers * directions * BATCH * HIDDEN
            assert ops.bytes == 4 * (reserve + outputs)
            assert out.shape == (*x.shape[:-1], HIDDEN * directions)
            (out.sum() + sum(state.sum() for state in (last if states == 2 else [last]))).backward()
        assert x.grad.shape == x.shape and all(state.grad.shape == state.shape for state in hx)
        assert [tuple(p.grad.shape) for p in module.parameters()] == plain_shapes
        assert len({p.grad.untyped_storage()._cdata for p in module.parameters()}) == 1
    assert not any("mkldnn" in name for name in ops.names)


@pytest.mark.parametrize(("kind", "reported"), [(nn.LSTM, 736_000_000), (nn.GRU, 864_000_000)])
def test_the_formula_meets_the_sizes_that_cudnn_reported(kind, reported):
    """pytorch#2895: 4 layers of 320 on 123 features (3,038,090 and 2,279,370 parameters with a head of 10)."""
    with FakeTensorMode(), target_recurrent():
        module, head = kind(123, 320, 4), nn.Linear(320, 10)
        parameters = sum(p.numel() for p in [*module.parameters(), *head.parameters()])
        assert parameters == {nn.LSTM: 3_038_090, nn.GRU: 2_279_370}[kind]
        x = torch.empty(500, 50, 123)
        with Ops(known=[x, *module.parameters()]) as ops:
            out, last = module(x)
            last = last if isinstance(last, tuple) else (last,)
            states = sum(state.numel() for state in last) * 2 * 4  # first and last
            assert ops.bytes - out.numel() * 4 - states == reported


@pytest.mark.parametrize(("name", "kind", "a_layer"), [("lstm", nn.LSTM, 5), ("gru", nn.GRU, 6)])
def test_packed_sequences(name, kind, a_layer):
    with FakeTensorMode(), target_recurrent():
        module = kind(WIDTH, HIDDEN)
        rows, state = torch.empty(9, WIDTH, requires_grad=True), torch.empty(1, 3, HIDDEN)
        sizes = torch.empty(4, dtype=torch.long)
        hx = [state, state] if name == "lstm" else state
        with Ops(known=[rows, *module.parameters(), state]) as ops:
            out, *last = getattr(torch._VF, name)(rows, sizes, hx, list(module.parameters()), True, 1, 0.0, True, False)
            assert out.shape == (9, HIDDEN)
            assert ops.bytes == 4 * (9 * HIDDEN * (1 + a_layer) + len(last) * state.numel())
        out.sum().backward()
        assert rows.grad.shape == (9, WIDTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_and_keeps_the_weights_of_each_call(dtype):
    with FakeTensorMode(), cuda_autocast(), target_recurrent():
        module = nn.LSTM(WIDTH, HIDDEN)
        x = torch.empty(TIME, BATCH, WIDTH)
        with Ops() as ops, torch.autocast("cpu", dtype=dtype):
            out, _ = module(x)
            assert out.dtype == dtype and ops.names.count("_to_copy") == 1 + 2 + 4
        out.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_inference_has_no_reserve_and_evaluation_no_backward():
    with FakeTensorMode(), target_recurrent():
        module = nn.LSTM(WIDTH, HIDDEN).eval()
        x = torch.empty(TIME, BATCH, WIDTH, requires_grad=True)
        with torch.no_grad(), Ops() as ops:
            out, (h, c) = module(x)
            assert ops.peak == 4 * (out.numel() + 2 * h.numel() + 2 * c.numel())
        with pytest.raises(
            ConfigError, match=r"no backward for LSTM layers in evaluation mode\nhint: call model.train"
        ):
            module(x)[0].sum().backward()


def test_frozen_weights_get_no_gradients():
    with FakeTensorMode(), target_recurrent():
        module = nn.GRU(WIDTH, HIDDEN).requires_grad_(False)
        x = torch.empty(TIME, BATCH, WIDTH, requires_grad=True)
        module(x)[0].sum().backward()
        assert x.grad is not None and all(p.grad is None for p in module.parameters())


def test_what_cudnn_does_not_take_is_left_to_torch(monkeypatch):
    def ops_of(module, dtype=torch.float32):
        with Ops() as ops:
            module(torch.empty(TIME, BATCH, WIDTH, dtype=dtype))
        return ops.names

    allocations = {"empty", "zeros", "new_empty", "detach"}
    with FakeTensorMode(), target_recurrent():
        for names in (
            ops_of(nn.LSTM(WIDTH, HIDDEN, proj_size=2)),
            ops_of(nn.LSTM(WIDTH, HIDDEN, dtype=torch.bfloat16), torch.bfloat16),
            ops_of(nn.RNN(WIDTH, HIDDEN)),
        ):
            assert set(names) - allocations
        assert set(ops_of(nn.LSTM(WIDTH, HIDDEN))) <= allocations
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
        assert any("mkldnn" in name for name in ops_of(nn.LSTM(WIDTH, HIDDEN)))


def test_real_tensors_compute_as_before():
    module, x = nn.LSTM(WIDTH, HIDDEN, 2), torch.randn(TIME, BATCH, WIDTH)
    before = module(x)[0]
    with target_recurrent():
        assert torch.equal(module(x)[0], before)
