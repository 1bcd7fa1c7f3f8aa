"""The contract: every technique, and every pair that does not conflict, trains like the plain step."""

import copy
import itertools
import warnings

import contract
import pytest
import torch
from contract import ROUNDING, SPECS, UPDATES, distance, make_step

from floatline.errors import ConfigError, FloatlineWarning
from floatline.techniques import HOMES, Stack, make_technique

PAIRS = list(itertools.combinations(SPECS.values(), 2))
COMPILED_WITH = {"accumulation", "checkpointing", "lora"}
"""What is paired with compile in the suite; the others, of seconds each, are in the long runs."""


def _pair(one, other):
    names = {one.name, other.name}
    marks = [pytest.mark.soak] if "compile" in names and not names & COMPILED_WITH else []
    return pytest.param(one, other, id=f"{one.name}+{other.name}", marks=marks)


@pytest.fixture(scope="module")
def plain(zoo):
    """(model name, defining techniques, precision, clip) -> the plain run's result and its first weights; cached."""
    cache = {}

    def run_plain(name, defining, precision, clip):
        key = (name, tuple(defining), precision, clip)
        if key not in cache:
            step = make_step(zoo[name], list(defining), precision, clip=clip)
            start = {n: contract.whole(p) for n, p in step.model.named_parameters()}
            cache[key] = contract.run(step, batches_of(zoo[name])), start
        return cache[key]

    return run_plain


def batches_of(case):
    return [case.batch(seed) for seed in range(UPDATES)]


def tolerance(specs, precision):
    """The tolerances of techniques that do not keep the bits add up."""
    return sum(spec.tolerance.get(precision, ROUNDING[precision]) for spec in specs if spec.tolerance)


def check_same(specs, case, precision, plain):
    """Train with the techniques and without, and compare everything; then undo."""
    given = next((s for s in specs if s.name == "precision"), None)
    reference_precision = make_technique(given.text).policy if given else precision
    step_precision = "auto" if given else precision
    clip = None if any(spec.clip is None for spec in specs) else 0.05
    allowed = tolerance(specs, reference_precision)
    expected, start = plain(case.name, [s.on(case.name) for s in specs if s.defines], reference_precision, clip)
    step = make_step(case, [spec.on(case.name) for spec in specs], step_precision, clip=clip)
    result = contract.run(step, batches_of(case))
    assert distance(result.weights, expected.weights, start) <= allowed
    if result.gradients:
        assert distance(result.gradients, expected.gradients, {}) <= 3 * allowed
    if not any(spec.approximate_state for spec in specs):
        assert distance(result.moments, expected.moments, {}) <= 3 * allowed
    for technique in step.stack.techniques:
        if technique.name != "precision":  # the step applies its policy itself
            with pytest.raises(ConfigError, match=f"{technique.name} is already applied"):
                technique.apply(step.model)
    losses = {str(i): loss for i, loss in enumerate(result.losses)}
    assert distance(losses, {str(i): loss for i, loss in enumerate(expected.losses)}, {}) <= 3 * allowed
    check_undone(step, case, result)
    return step


def check_undone(step, case, result):
    """After undo the model is as built: same modules, forwards, hooks and names; its weights are the trained ones."""
    fresh = case.build()
    step.undo()
    assert shape_of(step.model) == shape_of(fresh)
    assert [n for n, _ in step.model.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    for name, parameter in step.model.named_parameters():
        assert type(parameter) is torch.nn.Parameter and parameter.requires_grad and parameter.dtype == torch.float32
        if name in result.weights:  # an adapter's base has another name while the adapter is there
            assert torch.equal(contract.whole(parameter), result.weights[name])
    fresh.load_state_dict(step.model.state_dict())


def shape_of(model):
    """What a technique could leave behind: classes, attributes and hooks of every module."""
    return {
        name: (type(m), sorted(m.__dict__), [len(getattr(m, h)) for h in HOOKS]) for name, m in model.named_modules()
    }


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
         "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks")  # fmt: skip


def test_every_technique_has_a_spec():
    assert set(SPECS) == set(HOMES)


@pytest.mark.parametrize("name", SPECS)
def test_alone_in_every_precision(name, case, plain):
    spec = SPECS[name]
    if case.name not in spec.models:
        check_refused_or_warned(spec, case)
        return
    for precision in ["32-true", "bf16-mixed", "16-mixed"] if name != "precision" else ["bf16-mixed"]:
        if precision in spec.precisions:
            check_same([spec], case, precision, plain)
        else:
            with pytest.raises(ConfigError, match=f"{name}.*cannot be used in this step"):
                make_step(case, [spec.on(case.name)], precision, clip=spec.clip)


def check_refused_or_warned(spec, case):
    """On a model that it is not for, a technique says so: as an error, as a warning, or in a note."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FloatlineWarning)
        try:
            step = make_step(case, [spec.on(case.name)], "32-true", clip=spec.clip)
        except ConfigError as error:
            assert spec.name in str(error)
            return
    said = [str(w.message) for w in caught if issubclass(w.category, FloatlineWarning)] + step.stack.notes
    assert any(spec.name in text for text in said)


@pytest.mark.parametrize("name", SPECS)
def test_with_a_list_of_micro_batches(name, zoo, plain):
    spec, case = SPECS[name], zoo["qwen3_vl"]
    from floatline.techniques.batches.rows import cut_rows

    def halves(model, batch):
        return [cut_rows(model, batch, torch.tensor(rows)) for rows in ([0, 1], [2, 3])]

    step = make_step(case, [spec.on(case.name)], "auto" if name == "precision" else "32-true", clip=spec.clip)
    if not spec.lists:
        with pytest.raises(ConfigError, match="2 micro-batches"):
            step(halves(step.model, case.batch(0)))
        return
    precision = "bf16-mixed" if name == "precision" else "32-true"
    reference = make_step(case, [spec.on(case.name)] if spec.defines else [], precision, clip=spec.clip)
    ours, theirs = (contract.run(s, [halves(s.model, b) for b in batches_of(case)]) for s in (step, reference))
    start = plain(case.name, [spec.on(case.name)] if spec.defines else [], precision, spec.clip)[1]
    assert distance(ours.weights, theirs.weights, start) <= tolerance([spec], precision)


@pytest.mark.parametrize("name", SPECS)
def test_a_second_apply_is_refused(name, zoo):
    spec, case = SPECS[name], zoo["qwen3_vl"]
    model = case.build()
    technique = make_technique(spec.on(case.name))
    applied = technique.apply(model)
    try:
        with pytest.raises(ConfigError, match=f"{name} is already applied"):
            technique.apply(model)
    finally:
        applied.undo()
    technique.apply(model).undo()  # and once it is undone it may come again


@pytest.mark.parametrize("name", SPECS)
def test_state_loads_with_and_without(name, zoo):
    """Weights and optimizer state of a plain run go into one with the technique, and back; both go on as the plain."""
    spec, case = SPECS[name], zoo["qwen3_vl"]
    precision, plain_precision = ("auto", "bf16-mixed") if name == "precision" else ("32-true", "32-true")
    defining = [spec.on(case.name)] if spec.defines else []
    with_it = make_step(case, [spec.on(case.name)], precision, clip=spec.clip)
    without, unbroken = (make_step(case, defining, plain_precision, clip=spec.clip) for _ in range(2))
    start = {n: contract.whole(p) for n, p in unbroken.model.named_parameters()}
    for step in (with_it, without, unbroken):
        step(case.batch(0))
    there, back = copy.deepcopy(with_it.state_dict()), copy.deepcopy(without.state_dict())
    if name == "sharding":  # shards are read and written by distributed.checkpoint; tests/techniques/test_sharding.py
        return
    weights = copy.deepcopy(with_it.model.state_dict())
    with_it.model.load_state_dict(without.model.state_dict())
    without.model.load_state_dict(weights)
    with_it.load_state_dict(back)
    without.load_state_dict(there)
    assert all(bool(step(case.batch(1)).applied) for step in (with_it, without, unbroken))
    first, second, expected = (
        {n: contract.whole(p) for n, p in step.model.named_parameters()} for step in (with_it, without, unbroken)
    )
    for weights in (first, second):
        assert distance(weights, expected, start) <= tolerance([spec], plain_precision)


@pytest.mark.parametrize(("one", "other"), [_pair(*pair) for pair in PAIRS])
def test_pairs(one, other, zoo, plain):
    reason = contract.conflict(one, other)
    if reason is not None:
        assert len(reason) > 20  # a sentence, not a code
        with pytest.raises(ConfigError, match=r"cannot be combined: .*\nhint: "):
            Stack([one.on("gpt2"), other.on("gpt2")])
        return
    for name in sorted(one.models & other.models):
        check_same([one, other], zoo[name], "32-true", plain)
    if "precision" in (one.name, other.name):
        return
    for precision in ("bf16-mixed", "16-mixed"):
        if precision in one.precisions and precision in other.precisions:
            check_same([one, other], zoo["gpt2"], precision, plain)


def test_the_comparison_can_fail(zoo, plain):
    """Another learning rate is as far off as it is."""
    case = zoo["mlp"]
    expected, start = plain("mlp", [], "32-true", None)
    faster = make_step(case, [], "32-true", optimizer=lambda p: torch.optim.AdamW(p, lr=1.1e-2, eps=1e-4))
    assert 0.05 < distance(contract.run(faster, batches_of(case)).weights, expected.weights, start) < 0.2
