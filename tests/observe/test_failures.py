"""What a traced program raises is told with its cause, its place and what to do."""

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import ConfigError, ModelError
from floatline.observe.failures import explain
from floatline.observe.trace import trace
from floatline.plan.probe import probe


def square(model, batch):
    return model(*batch).square().mean()


def work(**changes):
    given = {"model": lambda: nn.Linear(8, 8), "batch": lambda: (torch.ones(3, 8),), "loss": square, **changes}
    return fl.Workload(**given)


def missing_key(model, batch):
    return model(batch[0]).sum() + {}["labels"]


@torch.library.custom_op("floatline_tests::without_fake", mutates_args=())
def without_fake(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def failing():
    raise ValueError("no such width\nmore")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": missing_key}, r"does not run: KeyError: 'labels' \(observe/test_failures.py:\d+\)"),
        ({"model": failing}, r"does not run: ValueError: no such width \(observe/test_failures.py:\d+\)"),
        ({"batch": failing}, r"does not run: ValueError: no such width \(observe/test_failures.py:\d+\)"),
        ({"batch": lambda: (torch.ones(3, 7),)}, r"does not run: RuntimeError: a and b must have same reduction dim"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=-1)}, "does not run: ValueError: Invalid learning rate: -1"),
    ],
)
def test_an_error_of_the_program_says_where(changes, said):
    with pytest.raises(ModelError, match=said) as caught:
        trace(work(**changes), hardware="t4")
    assert "on the CPU" in caught.value.hint
    assert caught.value.__cause__ is not None


def test_an_op_without_a_fake_kernel_says_how_to_register_one():
    with pytest.raises(ModelError, match="floatline_tests::without_fake has no fake kernel") as caught:
        trace(work(loss=lambda model, batch: model(without_fake(*batch)).sum()), hardware="t4")
    assert caught.value.hint == "register one: @torch.library.register_fake('floatline_tests::without_fake')"


def test_a_kernel_that_another_backend_lacks_is_not_put_on_cuda():
    def sparse(model, batch):
        return torch.linalg.vector_norm(torch.eye(3).to_sparse()) + square(model, batch)

    with pytest.raises(ModelError, match="does not run: NotImplementedError: Could not run 'aten::linalg_vector_norm'"):
        trace(work(loss=sparse), hardware="t4")


def test_a_batch_that_cannot_be_made_here_says_how_large_it_is(capfd):
    with pytest.raises(ModelError, match=r"no memory for .* its batch above all: [\d.]+ GiB in one piece \(") as caught:
        trace(work(batch=lambda: (torch.ones(2**50, 8),)), hardware="t4")
    assert caught.value.hint == "plan a smaller batch or shorter samples"
    assert capfd.readouterr().err == ""


def test_torch_does_not_log_what_is_told(caplog):
    with pytest.raises(ModelError):
        trace(work(batch=lambda: (torch.ones(3, 7),)), hardware="t4")
    assert not caplog.records


def test_an_error_in_our_own_code_is_not_put_on_the_program():
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile("1 / 0", fl.__file__, "exec"), {})
    assert explain(caught.value) is None


def test_the_probe_explains_too():
    with pytest.raises(ModelError, match="does not run: ValueError: Invalid learning rate"):
        probe(work(optimizer=lambda p: torch.optim.SGD(p, lr=-1)))
    with pytest.raises(ConfigError, match="ReLU has no parameters, there is nothing to train"):
        probe(work(model=nn.ReLU))


def test_a_frozen_model_is_refused_unless_something_is_added_to_train():
    frozen = work(model=lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False))
    with pytest.raises(ConfigError, match="has no trainable parameters"):
        fl.plan(frozen, "t4", advice=False)
    assert fl.plan(frozen, "t4", techniques=["lora(rank=2, targets='*')"], advice=False).fits


def test_a_loss_that_is_no_function_is_refused():
    with pytest.raises(ConfigError, match=r"Workload\(loss=...\) is a int"):
        work(loss=5)
