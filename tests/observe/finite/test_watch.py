"""What the watch sees: origins, what inherits them, and which forward op a derivative belongs to."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from floatline.observe.finite import Kind, backward, plain_name, watching

NAN = float("nan")


def origins(watch, tensor):
    return {origin.ran for origin in watch.ledger.of(tensor)}


def test_what_is_discarded_has_no_say():
    x = torch.tensor([-1.0, 4.0])
    with watching() as watch:
        root = x.sqrt()
        kept = torch.where(x > 0, root, 0.0)
        nothing = torch.nan_to_num(root)
    assert origins(watch, root) == {"sqrt"}
    assert origins(watch, kept) == origins(watch, nothing) == set()


def test_of_where_the_branch_that_was_chosen_counts():
    x = torch.tensor([-1.0, 1.0])
    with watching() as watch:
        left, right = x.sqrt(), (x - 1).log()
        taken = torch.where(torch.tensor([True, True]), left, right)
    assert origins(watch, taken) == {"sqrt"}


def test_in_place_ops_are_seen_with_what_was_there_before():
    x = torch.tensor([0.0, 1.0])
    with watching() as watch:
        y = x.clone()
        y.log_()
        z = torch.full((2,), -float("inf"))
        z.mul_(0.0)
    assert origins(watch, y) == {"log_"}
    assert watch.origins[0].inputs[0].low == 0
    assert origins(watch, z) == {"mul_"}


def test_a_write_into_a_part_leaves_the_rest():
    with watching() as watch:
        buffer = torch.zeros(4)
        buffer[0] = torch.tensor(-1.0).sqrt()
        buffer[1] = 1.0
        before = origins(watch, buffer)
        buffer.zero_()
    assert before == {"sqrt"} and origins(watch, buffer) == set()


def test_memory_that_nobody_wrote_is_told_even_if_it_became_bad_outside_of_torch():
    with watching() as watch:
        raw = torch.empty(3)
        raw.numpy()[:] = NAN
        total = raw + 1
    assert {(o.kind, o.ran) for o in watch.ledger.of(total)} == {(Kind.RAW, "empty")}


def test_tensors_of_before_are_given_once():
    x = torch.tensor([1.0, NAN])
    with watching() as watch:
        a, b = x + 1, x[1:] * 2
    assert watch.ledger.of(a) == watch.ledger.of(b)
    (origin,) = watch.ledger.of(a)
    assert origin.kind is Kind.GIVEN and origin.tensor is not None and origin.variable == "x"


def test_names_of_modules_and_their_calls_one_inside_the_other():
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    model = nn.Sequential(nn.ModuleDict({"a": nn.Identity()}), Log())
    model[0].forward = lambda x: x
    with watching(model) as watch:
        model(torch.zeros(2)).add(torch.tensor(-1.0).sqrt())
    assert [(o.spot.op, o.spot.module) for o in watch.origins] == [("log", "1"), ("sqrt", "")]


def test_a_derivative_belongs_to_its_forward_op():
    w = torch.zeros(3, requires_grad=True)
    with watching() as watch:
        loss = (w.sqrt() * 2).sum()
        watch.enter("backward")
        backward(loss)
    (origin,) = watch.ledger.of(w.grad)
    assert (origin.spot.op, origin.ran, origin.derivative) == ("sqrt", "div", True)
    assert "w.sqrt() * 2" in origin.spot.user.code
    assert [item.name for item in origin.saved] == ["result"]


def test_a_forward_that_is_computed_again_is_no_derivative():
    w = torch.zeros(3, requires_grad=True)

    def body(x):
        return torch.where(x > 0, x.log(), 0.0)

    for reentrant in (True, False):
        w.grad = None
        with watching() as watch:
            loss = checkpoint(body, w * 1, use_reentrant=reentrant).sum()
            watch.enter("backward")
            backward(loss)
        assert {o.spot.op for o in watch.ledger.of(w.grad)} == {"log"}
        assert all("x.log()" in o.spot.user.code for o in watch.ledger.of(w.grad))


def test_hooks_are_their_own_fault():
    w = torch.ones(3, requires_grad=True)
    with watching() as watch:
        h = w * 1
        h.register_hook(lambda gradient: gradient / 0.0)
        watch.enter("backward")
        backward(h.sum())
    (origin,) = watch.ledger.of(w.grad)
    assert (origin.spot.op, origin.derivative) == ("div", False) and "gradient / 0.0" in origin.spot.user.code


def test_batch_norm_writes_statistics_that_its_schema_does_not_tell():
    norm = nn.BatchNorm1d(2)
    with watching(norm) as watch:
        norm(torch.tensor([[1e30, 1.0], [-1e30, 2.0]]))
    assert origins(watch, norm.running_var) == {"native_batch_norm"}


def test_exact_results_tell_a_format_that_ends_from_a_function_that_does():
    with watching() as watch:
        torch.full((1,), 300.0, dtype=torch.float16) ** 2
        (torch.ones(1, dtype=torch.float16) - 1).log()
    small, edge = watch.origins
    assert [item.high for item in small.exact] == [90000.0]
    assert edge.exact[0].negative == 1


def test_large_half_precision_inputs_are_widened_to_fp32_only(monkeypatch):
    monkeypatch.setattr("floatline.observe.finite.ran.LARGE", 2)
    with watching() as watch:
        torch.full((4,), 300.0, dtype=torch.float16) ** 2
        torch.full((4,), 1e30) * 1e30
    half, single = watch.origins
    assert half.exact[0].dtype == "float32" and half.exact[0].high == 90000.0 and single.exact is None


def test_library_modules_name_the_users_line():
    scores = torch.full((1, 2), -float("inf"))
    with watching() as watch:
        F.softmax(scores, -1)
    assert watch.origins[-1].spot.function == "softmax" and "F.softmax" in watch.origins[-1].spot.user.code


def test_what_wrappers_put_into_names():
    assert plain_name("blocks.0._orig_mod.fc") == "blocks.0.fc"
    assert plain_name("_orig_mod") == "" and plain_name("a._checkpoint_wrapped_module.b") == "a.b"
