"""Learning-rate schedules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from floatline.train.schedule import factor, make_schedule


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("cosine", [1, 0.853553, 0.5, 0.146447]), ("linear", [1, 0.75, 0.5, 0.25]), ("constant", [1, 1, 1, 1])],
)
def test_shapes(kind, expected):
    assert [factor(k, kind=kind, steps=4, warmup=0, final=0.0) for k in range(4)] == pytest.approx(expected, abs=1e-6)


def test_warm_up_rises_to_the_peak():
    values = [factor(k, kind="cosine", steps=10, warmup=3, final=0.1) for k in range(10)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0] and min(values[4:]) > 0.1


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(1, 100),
    st.integers(0, 100),
    st.floats(0, 1),
    st.integers(0, 200),
)
def test_always_between_zero_and_one(kind, steps, warmup, final, step):
    assert 0 <= factor(step, kind=kind, steps=steps, warmup=warmup, final=final) <= 1


def test_drives_an_optimizer_and_resumes():
    def rates(schedule, optimizer, n):
        out = []
        for _ in range(n):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return out

    def fresh():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        return make_schedule(optimizer, kind="linear", steps=8, warmup=2, final=0.0), optimizer

    whole = rates(*fresh(), 8)
    schedule, optimizer = fresh()
    rates(schedule, optimizer, 3)
    other, other_optimizer = fresh()
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(schedule.state_dict())
    assert rates(other, other_optimizer, 5) == whole[3:]
