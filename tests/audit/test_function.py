"""fl.audit_function: each kind of failure in a plain function, found in its line, and cured by the lines it names."""

import inspect
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import floatline as fl
from floatline.audit.fp32_lines import FP32Lines
from floatline.audit.program import Format, Program
from floatline.errors import ConfigError, ModelError
from floatline.hardware import resolve


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed))


# Functions that fail, each in a way of its own


def variance(x):
    mean = x.mean()
    square = (x * x).mean()
    return square - mean * mean


def running_sum(x):
    y = x * 1.0
    return y.cumsum(-1)


def histogram(x):
    counts = torch.zeros(16)
    place = (x.detach().float() * 16).long().clamp(0, 15)
    counts.scatter_add_(0, place, torch.ones_like(x))
    return counts


def softmax_by_hand(x):
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def threshold(x):
    near = x - 100
    return near > 0


def unit(x):
    length = (x * x).sum().sqrt()
    return x / length


def log_sum_exp(x):
    return x.exp().sum(-1).log()


def small_eps(x):
    return x / (x.abs().sum() * 1e-9 + 1e-8)


def masked(x):
    fill = torch.full((x.shape[-1], x.shape[-1]), float("-inf"))
    return (x + fill.triu(1)).softmax(-1)


def smooth(x):
    return F.avg_pool1d(x.tanh(), 3)


def line_of(function, code):
    """File and number of the line of a function that holds some code."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if code in line)


FAILING = [
    (variance, 100 + normal(1000), "bf16", "square - mean", "rounding"),
    (variance, 100 + normal(1000), "fp16", "square - mean", "rounding"),
    (running_sum, uniform(1, 10_000), "bf16", "cumsum", "stagnation"),
    (running_sum, uniform(1, 10_000), "fp16", "cumsum", "stagnation"),
    (histogram, uniform(100_000), "bf16", "scatter_add_", "stagnation"),
    (softmax_by_hand, 8 + 4 * normal(8, 50), "fp16", "x.exp()", "range"),
    (threshold, 100 + normal(10_000), "bf16", "x - 100", "rounding"),
    (unit, 300 * normal(1000), "fp16", "sqrt()", "range"),
    (log_sum_exp, 8 + 4 * normal(8, 50), "fp16", "log()", "range"),
    (small_eps, normal(100).abs() * 1e-3, "fp16", "1e-8", "range"),
]


@pytest.mark.parametrize(("fn", "x", "name", "code", "failure"), FAILING)
def test_a_failure_is_found_in_its_line_and_its_lines_cure_it(fn, x, name, code, failure):
    report = fl.audit_function(fn, (x,), (name,), hardware="cpu")
    line = line_of(fn, code)
    assert (line, failure) in {(row.location.line, row.failure) for row in report.failures}
    assert any(code in row.location.code for row in report.failures)
    candidate = report.candidates[name]
    assert candidate.lines is not None and line in [place.line for place in candidate.lines]
    assert candidate.effect.ratio <= 1 and not candidate.safe and report.safe == ()
    assert f"{name}-true needs {len(candidate.lines)} of {candidate.audited} lines in fp32" in report.verdict


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("fn", "x"), [(masked, normal(8, 8)), (smooth, normal(2, 3, 50)), (softmax_by_hand, normal(8, 50))]
)
def test_healthy_functions_need_nothing(fn, x, name):
    report = fl.audit_function(fn, (x,), (name,), hardware="cpu")
    assert report.candidates[name].lines == () and report.failures == ()
    assert report.candidates[name].safe_outputs == ("output",)


def test_an_fp32_line_gets_its_inputs_unrounded():
    report = fl.audit_function(threshold, (100 + normal(10_000),), ("bf16",), hardware="cpu")
    before, after = report.candidates["bf16"].all_lowered.outputs[0], report.candidates["bf16"].effect.outputs[0]
    assert before.flipped > 100 and after.flipped == 0 and before.decisions == 10_000
    assert [place.code for place in report.candidates["bf16"].lines] == ["near = x - 100"]


def test_cancellation_needs_all_the_lines_that_lead_to_it():
    report = fl.audit_function(variance, (100 + normal(1000),), ("bf16",), hardware="cpu")
    assert [place.code for place in report.candidates["bf16"].lines] == [
        "mean = x.mean()", "square = (x * x).mean()", "return square - mean * mean"
    ]  # fmt: skip
    assert report.fp32[0].relative == pytest.approx(report.candidates["bf16"].effect.outputs[0].relative)


def test_only_what_is_needed_is_kept():
    def twice(x):
        y = (x * 0.5).tanh()
        z = y.cumsum(-1)
        return z.sin()

    report = fl.audit_function(twice, (normal(1, 4000).abs(),), ("bf16",), hardware="cpu")
    kept = [place.code for place in report.candidates["bf16"].lines]
    assert "z = y.cumsum(-1)" in kept and report.candidates["bf16"].audited == 3
    assert len({effect.lines for effect in report.candidates["bf16"].trials}) == len(report.candidates["bf16"].trials)


def test_mixed_follows_the_targets_autocast():
    def scores(x, w):
        return (x @ w).exp()

    x, w = 3 * normal(16, 64), normal(64, 16) / 4
    cuda = fl.audit_function(scores, {"x": x, "w": w}, ("bf16",), mode="mixed", hardware="l4")
    true = fl.audit_function(scores, {"x": x, "w": w}, ("bf16",), mode="true", hardware="l4")
    ops = {row.op for row in cuda.rows if row.measure is not None and row.measure.format == "bf16"}
    assert "mm" in ops and "exp" not in ops  # on CUDA's list exp is fp32
    assert "exp" in {row.op for row in true.rows if row.measure.format == "bf16"}
    assert cuda.candidates["bf16"].all_lowered.outputs[0].relative > 0.001
    assert any("CUDA's autocast lists for" in note for note in cuda.notes)


def test_mixed_lines_run_without_autocast():
    def scores(x, w):
        logits = x @ w
        return logits.exp()

    x, w = 3 * normal(16, 64), normal(64, 16) / 3
    report = fl.audit_function(scores, (x, w), ("bf16",), mode="mixed", hardware="cpu")
    candidate = report.candidates["bf16"]
    assert candidate.all_lowered.outputs[0].relative > 0.02 >= candidate.effect.outputs[0].relative
    assert [place.code for place in candidate.lines] == ["logits = x @ w"]


def test_gradients_of_a_loss_and_of_outputs():
    def loss(logits, target):
        p = logits.exp() / logits.exp().sum(-1, keepdim=True)
        return -(p.gather(-1, target[:, None])).log().mean()

    inputs = {"logits": 5 * normal(6, 50), "target": torch.arange(6)}
    report = fl.audit_function(loss, inputs, hardware="cpu", backward="auto")
    assert [error.name for error in report.fp32] == ["output", "gradient of logits"]
    assert {row.phase for row in report.rows} == {"forward", "backward"}
    assert report.candidates["bf16"].safe and report.candidates["fp16"].effect.ratio <= 1
    assert [e.name for e in fl.audit_function(smooth, (normal(2, 3, 50),), backward="auto").fp32] == ["output"]
    both = fl.audit_function(smooth, (normal(2, 3, 50),), backward=True, hardware="cpu")
    assert [error.name for error in both.fp32] == ["output", "gradient of inputs[0]"]
    assert 0 < both.candidates["bf16"].all_lowered.outputs[1].relative < 0.02


def test_fp16_gradients_get_a_loss_scale():
    def tiny(x):
        return (x * 1e-6).square().mean()

    report = fl.audit_function(tiny, (normal(1000),), ("fp16",), hardware="cpu", backward=True)
    assert report.candidates["fp16"].all_lowered.scale > 1


def test_outputs_are_named_and_held_apart():
    def many(x):
        return {"half": x / 2, "cells": [(x * 8).long(), x > 0.5], "count": 3}

    report = fl.audit_function(many, (uniform(5000),), ("bf16",), hardware="cpu")
    by_name = {error.name: error for error in report.candidates["bf16"].all_lowered.outputs}
    assert list(by_name) == ["output['half']", "output['cells'][0]", "output['cells'][1]"]
    half, cells = by_name["output['half']"], by_name["output['cells'][0]"]
    assert half.cosine == pytest.approx(1, abs=1e-4) and 0 < half.largest < 0.002
    assert cells.decisions == 5000 and cells.flipped == int(
        ((uniform(5000).bfloat16() * 8).long() != (uniform(5000) * 8).long()).sum()
    )
    assert cells.cosine is None


def test_what_has_no_kernel_or_another_format_is_an_fp32_line():
    bank = normal(4, 3, 5, 5)

    def filtered(image):
        seen = F.conv2d(image, bank)
        return seen.relu()

    candidate = fl.audit_function(filtered, (uniform(1, 3, 16, 16),), ("bf16",), hardware="cpu").candidates["bf16"]
    assert [place.code for place in candidate.lines] == ["seen = F.conv2d(image, bank)"]
    (where,) = candidate.no_kernel
    assert where == f"{__file__}:{line_of(filtered, 'conv2d')}"
    assert "1 do not run in bf16 here" in candidate.reason


def test_a_format_that_does_not_run_at_all_is_said():
    def stubborn(x):
        if x.dtype == torch.bfloat16 or torch.get_default_dtype() == torch.bfloat16:
            raise TypeError("no bf16 for me")
        return x * 2

    candidate = fl.audit_function(stubborn, (normal(4),), ("bf16",), hardware="cpu").candidates["bf16"]
    assert candidate.lines is None and "no bf16 for me" in candidate.reason and not candidate.safe


def test_functions_of_torch_itself_have_one_line():
    report = fl.audit_function(torch.cumsum, {"input": uniform(10_000), "dim": 0}, ("bf16",), hardware="cpu")
    assert [place.line for place in report.candidates["bf16"].lines] == [0]
    assert "(built in)" in str(report)


def test_random_functions_are_said_and_compared_with_their_own_draws():
    def noisy(x):
        return x + torch.randn_like(x)

    report = fl.audit_function(noisy, (normal(1000),), hardware="cpu", seed=3)
    assert "noisy draws random numbers; every run uses seed 3" in report.notes
    assert all(c.safe and c.all_lowered.outputs[0].relative < 0.01 for c in report.candidates.values())
    state = torch.get_rng_state()
    fl.audit_function(noisy, (normal(10),), hardware="cpu")
    assert torch.equal(state, torch.get_rng_state())


def test_what_fp32_cannot_compute_is_nobodys_fault():
    report = fl.audit_function(lambda x: (x + 2e4) - 2e4 - x, (normal(100),), hardware="cpu")
    assert any("fp32 itself is too far off in output" in note for note in report.notes)
    assert all(candidate.all_lowered.ratio == 0 for candidate in report.candidates.values())


def test_inputs_are_not_changed_and_the_default_format_comes_back():
    def eats(x):
        x.mul_(2)
        return x.sum()

    x = normal(5)
    before = x.clone()
    fl.audit_function(eats, (x,), hardware="cpu")
    assert torch.equal(x, before) and torch.get_default_dtype() == torch.float32 and not x.requires_grad


def test_the_report_reads_and_serialises():
    report = fl.audit_function(softmax_by_hand, (8 + 4 * normal(8, 50),), hardware="cpu")
    text, tree = str(report), json.loads(json.dumps(report.as_dict()))
    assert text.startswith("bf16-true is safe as it is: output is")
    assert "not finite" in text and "test_function.py:" in text
    assert tree["safe"] == ["bf16"] and tree["candidates"]["fp16"]["all_lowered"]["ratio"] == "inf"
    assert sum(tree["passes"].values()) >= 7
    assert isinstance(report, fl.FunctionReport)


def test_tolerance_is_what_outputs_are_held_to():
    loose = fl.audit_function(smooth, (normal(2, 3, 50),), ("bf16",), hardware="cpu")
    tight = fl.audit_function(smooth, (normal(2, 3, 50),), ("bf16",), 1e-5, hardware="cpu")
    assert loose.candidates["bf16"].lines == () and len(tight.candidates["bf16"].lines) == 1
    assert tight.candidates["bf16"].effect.outputs[0].relative < 1e-5


# The exact run


OPS = {
    "sin": torch.sin,
    "tanh": torch.tanh,
    "exp": lambda x: torch.exp(-x.abs()),
    "square": torch.square,
    "scale": lambda x: 0.3 * x - 0.1,
    "sqrt": lambda x: (x.abs() + 0.5).sqrt(),
    "line": lambda x: x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype),
    "where": lambda x: torch.where(x > 0.1, x, x.cos()),
    "flip": lambda x: x.flip(0) * x,
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=8), st.integers(0, 99))
def test_the_exact_output_is_that_of_fp64(names, seed):
    def pipeline(x):
        for name in names:
            x = OPS[name](x)
        return x

    x = normal(4, 7, seed=seed)
    program = Program(pipeline, (x,), resolve("cpu"), False, 0)
    truth = program.exact()
    assert truth.exact["output"].dtype == torch.float64
    torch.testing.assert_close(truth.exact["output"], pipeline(x.double()), rtol=1e-13, atol=1e-15)
    low = program.run(Format(name="bf16", mode="true"), None, shadows=True)
    kept = truth.exact["output"] if "where" not in names else low.exact["output"]
    torch.testing.assert_close(low.exact["output"], kept, rtol=1e-13, atol=1e-15)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(set(OPS) - {"line"})), min_size=1, max_size=6), st.integers(0, 99))
def test_with_all_lines_in_fp32_it_is_fp32_bit_for_bit(names, seed):
    def pipeline(x):
        for name in names:
            x = OPS[name](x)
        return x

    program = Program(pipeline, (normal(4, 7, seed=seed),), resolve("cpu"), False, 0)
    lines = frozenset((__file__, number) for number in range(1, 1000))
    low = program.run(Format(name="bf16", mode="true"), lines)
    assert torch.equal(low.values["output"], program.plain(0)["output"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=6), st.integers(0, 99))
def test_with_no_line_in_fp32_it_is_the_lower_format_bit_for_bit(names, seed):
    def pipeline(x):
        for name in names:
            x = OPS[name](x)
        return x

    program = Program(pipeline, (normal(4, 7, seed=seed),), resolve("cpu"), False, 0)
    fmt = Format(name="fp16", mode="true")
    cast, by_lines = program.run(fmt, None), program.run(fmt, frozenset({("nowhere.py", 1)}))
    assert cast.values["output"].dtype == torch.float16
    assert torch.equal(cast.values["output"], by_lines.values["output"].half())


# Lines in fp32


def in_lines(function, *args, codes, lower=torch.bfloat16):
    lines = frozenset((__file__, line_of(function, code)) for code in codes)
    with FP32Lines(lines, lower, sys._getframe(), "cpu") as mode:
        for value in args:
            mode.widen(value)
        return function(*args)


def test_what_is_written_in_place_arrives():
    def cells(x):
        counts = torch.zeros(3, dtype=torch.bfloat16)
        counts[0] += x.sum()
        counts[1:].add_(x[1:])
        torch.add(x, 1, out=counts)
        return counts

    x = torch.tensor([1.0, 2.0, 3.0])
    got = in_lines(cells, x, codes=["counts[0]", "counts[1:]", "torch.add"])
    assert got.dtype == torch.bfloat16 and got.tolist() == [2, 3, 4]

    def halves(x):
        counts = torch.zeros(3, dtype=torch.bfloat16)
        counts[0] += x.sum()
        counts[1:].add_(x[1:])
        return counts

    assert in_lines(halves, x, codes=["counts[0]", "counts[1:]"]).tolist() == [6, 2, 3]


def test_wide_results_go_on_wide_through_views_and_are_narrowed_by_other_lines():
    def chain(x):
        a = x + 2**-10
        b = a.reshape(-1)[:2]
        c = b * 1
        return a, b, c

    x = torch.ones(2, 2)
    a, b, c = in_lines(chain, x, codes=["x + 2"])
    assert a.dtype == b.dtype == torch.float32 and b.data_ptr() == a.data_ptr()
    assert c.dtype == torch.bfloat16 and c.tolist() == [1.0, 1.0]
    assert in_lines(chain, x, codes=["x + 2", "b * 1"])[2].tolist() == [1 + 2**-10] * 2


def test_formats_that_a_program_asks_for_are_those_of_its_line():
    def asks(x):
        low = x.dtype
        high = x.dtype
        return low, high, torch.zeros(2, dtype=low) + x.to(high)

    low, high, _ = in_lines(asks, torch.ones(2), codes=["high = "])
    assert low == torch.bfloat16 and high == torch.float32


# Errors


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((torch.arange(3),), "inputs holds no floating tensor (int64)"),
        ((3, "x"), "inputs holds no tensor (int, str)"),
        ("x", "inputs is a str"),
        ((), "inputs holds no tensor (nothing)"),
    ],
)
def test_inputs_that_cannot_be_audited(inputs, text):
    with pytest.raises(ConfigError) as error:
        fl.audit_function(smooth, inputs)
    assert text in str(error.value) and "hint:" in str(error.value)


@pytest.mark.parametrize(
    ("settings_", "text"),
    [
        ({"candidates": ("fp61",)}, "did you mean 'fp16'?"),
        ({"candidates": "bf16"}, "candidates='bf16'"),
        ({"mode": "tru"}, "did you mean 'true'?"),
        ({"tolerance": -1}, "tolerance=-1 is no positive number"),
        ({"tolerance": math.nan}, "tolerance=nan is no positive number"),
        ({"backward": "yes"}, "backward='yes'"),
    ],
)
def test_settings_that_are_wrong(settings_, text):
    with pytest.raises(ConfigError, match=r"(?s).*") as error:
        fl.audit_function(smooth, (normal(2, 3, 50),), **settings_)
    assert text in str(error.value)


def test_modules_are_sent_to_audit():
    with pytest.raises(ConfigError, match=r"fl\.audit\(model, batch\)"):
        fl.audit_function(torch.nn.Linear(2, 2), (normal(2),))
    with pytest.raises(ConfigError, match="cannot be called"):
        fl.audit_function(3, (normal(2),))


def test_functions_that_cannot_be_audited():
    x = normal(3, 4)
    with pytest.raises(ModelError, match=r"raises RuntimeError in fp32 at test_function.py:\d+ \(.*x @ x"):
        fl.audit_function(lambda x: x @ x, (x,))
    with pytest.raises(ModelError, match="returned no tensor with real values"):
        fl.audit_function(lambda x: x.sum().item(), (x,))
    with pytest.raises(ModelError, match=r"(?s)not finite in fp32 already.*fl\.diagnose"):
        fl.audit_function(lambda x: (x * 1e30) * 1e30, (x,))
    with pytest.raises(ModelError, match=r"(?s)not finite in fp32 already.*fl\.diagnose"):
        fl.audit_function(lambda x: (x - x) / (x - x), (x,))
    with pytest.raises(ModelError, match="not finite in fp32 already"):
        fl.audit_function(lambda x: x / 0, (x,))
    with pytest.raises(ModelError, match="returned no tensor with real values"):
        fl.audit_function(lambda x: x.to_sparse(), (x,))
    with pytest.raises(ConfigError, match="meta device\nhint: give it values"):
        fl.audit_function(lambda x: x, (x.to("meta"),))
    with pytest.raises(ModelError, match="no gradient arrives"):
        fl.audit_function(lambda x: x > 0, (x,), backward=True)


def test_a_compiled_function_runs_eager():
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    compiled = torch.compile(lambda x: x * 2, backend=refuse)
    assert fl.audit_function(compiled, (normal(100),), hardware="l4").safe == ("bf16", "fp16")


def test_infinities_that_are_meant_are_no_error():
    def mask(x):
        return x.masked_fill(x < 0, float("-inf"))

    assert fl.audit_function(mask, (normal(100),), hardware="cpu").safe[:1] == ("bf16",)


def test_what_it_is_given_and_what_it_closes_over_stays_as_it_is():
    layer, exact = torch.nn.Linear(4, 4), torch.full((3, 4), 1.1, dtype=torch.float64)

    def overwrite(x):
        x[0] = 0.0
        return layer(x.float()).square().sum()

    fl.audit_function(overwrite, (exact,), hardware="cpu", candidates=("bf16",))
    assert (exact == 1.1).all()
    fl.audit_function(lambda x: layer(x).square().sum(), (torch.randn(2, 4),), hardware="cpu", backward=True)
    assert layer.weight.grad is None
