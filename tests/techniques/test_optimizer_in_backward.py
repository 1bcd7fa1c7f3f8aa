"""Updates in the backward: the plain numbers, gradients that are gone, a guard that holds, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import floatline as fl
from floatline.errors import ConfigError, NonFiniteError

from .optimizer_cases import adamw, data, make, mse, net, resumed, same, through_a_file, train

NAME = "optimizer_in_backward"
OPTIMIZERS = {
    "adamw": adamw,
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def both(techniques=(NAME,), **settings):
    """The plain step and the one under test, neither clips."""
    return make(max_grad_norm=None, **settings), make(techniques, max_grad_norm=None, **settings)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_bit_identical_on_every_model(case, precision):
    """Losses and gradient norms too; GPT-2, Qwen3-VL and the last model have tied weights."""
    results = []
    for techniques in ([], [NAME]):
        model, step = make(techniques, precision, max_grad_norm=None, model=case.build(), loss=case.loss)
        results.append((model, train(step, map(case.batch, range(3)))))
    (plain, expected), (ours, got) = results
    assert same(plain, ours)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.loss, other.loss) and torch.equal(one.grad_norm, other.grad_norm)
        assert bool(other.applied)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bit_identical_for_every_optimizer_with_groups_and_a_schedule(name):
    models = []
    for techniques in ([], [NAME]):
        model = net()
        weights = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() < 2]
        optimizer = OPTIMIZERS[name]([{"params": weights}, {"params": rest, "weight_decay": 0.0}])
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        _, step = make(techniques, max_grad_norm=None, model=model, optimizer=optimizer, schedule=schedule)
        train(step, map(data, range(4)))
        models.append(model)
    assert same(*models)


def test_at_most_two_gradients_exist_at_a_time():
    model, step = make([NAME], max_grad_norm=None)
    alive = []
    for parameter in model.parameters():  # runs after the technique's own hook
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    step(data(0))
    assert len(alive) == 6 and max(alive) <= 1
    plain, bare = make(max_grad_norm=None)
    plain[0].weight.register_post_accumulate_grad_hook(
        lambda _: alive.append(sum(p.grad is not None for p in plain.parameters()))
    )
    bare(data(0))
    assert alive[-1] >= 5  # without the technique all of them do


def test_state_dicts_load_with_and_without():
    assert same(*resumed([NAME], max_grad_norm=None))
    (plain, one), (ours, two) = both()
    train(one, map(data, range(2)))
    ours.load_state_dict(plain.state_dict())
    two.load_state_dict(through_a_file(one.state_dict()))
    train(one, [data(2)]), train(two, [data(2)])
    one.load_state_dict(through_a_file(two.state_dict()))
    train(one, [data(3)]), train(two, [data(3)])
    assert same(plain, ours)


def test_a_non_finite_loss_changes_no_weight_and_no_state():
    model, step = make([NAME], max_grad_norm=None)
    train(step, [data(0)])
    before, state = copy.deepcopy(model), copy.deepcopy(step.optimizer.state_dict()["state"])
    x, y = data(1)
    out = step((x, y * float("nan")))
    assert not bool(out.applied) and same(model, before) and step.sentinel.skipped == 1
    for key, values in step.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, values[what]) for what, value in state[key].items())
    assert all(p.grad is None for p in model.parameters())
    assert bool(step(data(2)).applied)


class Poison(torch.autograd.Function):
    """Passes values on; its gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def test_a_non_finite_gradient_stops_at_its_parameter():
    """Layers after the fault in the model, earlier in the backward, are updated; the others are not."""
    poisoned = [False]

    def loss(model, batch):
        hidden = model[1](model[0](batch[0]))
        hidden = Poison.apply(hidden) if poisoned[0] else hidden
        return (model[3](model[2](hidden)) - batch[1]).square().mean()

    model, step = make([NAME], max_grad_norm=None, loss=loss)
    train(step, [data(0)])
    before = copy.deepcopy(model)
    poisoned[0] = True
    out = step(data(1))
    assert not bool(out.applied) and not torch.isfinite(out.grad_norm) and torch.isfinite(out.loss)
    assert same(model[0], before[0])
    assert not same(model[2], before[2]) and not same(model[3], before[3])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(NonFiniteError):
        for _ in range(5):
            step(data(1))


def test_a_weight_used_twice_is_stepped_once_with_the_whole_gradient():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.mix, self.out = nn.Linear(64, 64), nn.Linear(64, 1)

        def forward(self, x):
            return self.out(self.mix(checkpoint(self.mix, x, use_reentrant=False).tanh()))

    (plain, one), (ours, two) = make(max_grad_norm=None, model=Twice()), make([NAME], max_grad_norm=None, model=Twice())
    train(one, map(data, range(3))), train(two, map(data, range(3)))
    assert same(plain, ours)


def test_a_gradient_in_two_parts_is_an_error():
    class Reentrant(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.out = nn.Linear(64, 64), nn.Linear(64, 1)

        def forward(self, x):
            x = x.requires_grad_()
            return self.out(self.mix(checkpoint(self.mix, x, use_reentrant=True)))

    _, step = make([NAME], max_grad_norm=None, model=Reentrant())
    with pytest.raises(
        ConfigError, match=r"got its gradient in two parts.*\nhint: checkpoint with use_reentrant=False"
    ):
        step(data(0))


def test_a_backward_outside_the_step_accumulates_gradients_as_ever():
    model, _ = make([NAME], max_grad_norm=None)
    before = copy.deepcopy(model)
    mse(model, data(0)).backward()
    assert same(model, before) and all(p.grad is not None for p in model.parameters())


def test_undo_takes_the_hooks_off_and_the_optimizer_goes_on():
    (plain, one), (ours, two) = both()
    train(one, [data(0)]), train(two, [data(0)])
    two.undo()
    for model, optimizer in ((plain, one.optimizer), (ours, two.optimizer.inner)):
        mse(model, data(1)).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert same(plain, ours)


def test_a_deep_copy_of_the_model_is_a_plain_model():
    model, _ = make([NAME], max_grad_norm=None)
    mse(twin := copy.deepcopy(model), data(0)).backward()
    assert same(model, twin) and all(p.grad is not None for p in twin.parameters())


@pytest.mark.parametrize(
    "other", ["low_bit_optimizer", "optimizer_offload(bucket_bytes=1)", "kahan", "kahan(moments=fp32)"]
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_composes_with_the_other_optimizer_techniques_in_any_order(other, precision):
    if other == "kahan":
        precision = "32-true"  # rounds bf16 moments at random, in another order
    models = []
    for techniques in ([other], [NAME, other], [other, NAME]):
        model, step = make(techniques, precision, max_grad_norm=None)
        train(step, map(data, range(3)))
        models.append(model)
    assert same(models[0], models[1]) and same(models[0], models[2])


def test_bad_input():
    with pytest.raises(ConfigError, match=r"max_grad_norm is 1.0, but the total norm is known only after") as error:
        make([NAME])
    assert "max_grad_norm=None" in str(error.value) and "train.max_grad_norm: null" in str(error.value)
    for precision in ("16-mixed", "16-true"):
        with pytest.raises(ConfigError, match=f"under {precision} scaled gradients overflow.*use bf16-mixed"):
            make([NAME], precision, max_grad_norm=None)
    with pytest.raises(ConfigError, match=f"{NAME} and accumulation cannot be combined|accumulation and {NAME}"):
        make([NAME, "accumulation(micro_batches=2)"], max_grad_norm=None)
    _, step = make([NAME], max_grad_norm=None)
    with pytest.raises(ConfigError, match="2 micro-batches, but the optimizer steps in the backward of each"):
        step([data(0), data(1)])
    _, step = make([NAME], max_grad_norm=None, loss=lambda m, b: torch.ones((), requires_grad=True) * 1.0)
    with pytest.raises(ConfigError, match="no gradient reached any parameter of the optimizer"):
        step(data(0))
    assert fl.techniques.OptimizerInBackward().refuses(fl.Policy.parse("bf16-mixed"), None) is None
