"""What happens between and in the middle of updates, with every technique: the next update must be the plain next one.

Each test makes the same updates twice, once with an incident: an evaluation and a generation between two of them, an
exception in the middle of an accumulation, an interrupt in the middle of a backward, a save and load, a copy.
"""

import copy
import gc
import io
import pickle

import contract
import pytest
import torch
from contract import SPECS, make_step

import floatline as fl
from floatline.techniques import make_technique

MODEL = "qwen3_vl"


def step_of(spec, case, loss=None):
    precision = "auto" if spec.name == "precision" else "32-true"
    techniques = [spec.on(case.name)]
    if loss is None:
        return make_step(case, techniques, precision, clip=spec.clip)
    return fl.TrainStep(
        case.build(), contract.adamw, precision=precision, loss=loss, max_grad_norm=spec.clip, techniques=techniques
    )


def weights(step):
    return {name: contract.whole(parameter) for name, parameter in step.model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=SPECS)
def spec(request):
    return SPECS[request.param]


@pytest.fixture
def model_case(zoo):
    return zoo[MODEL]


def test_evaluation_and_generation_between_updates(spec, model_case):
    case = model_case
    quiet, busy = step_of(spec, case), step_of(spec, case)
    prompt = {key: value for key, value in case.batch(9).items() if key != "labels"}
    for seed in range(3):
        quiet(case.batch(seed))
        busy(case.batch(seed))
        busy.model.eval()
        with torch.no_grad():
            assert torch.isfinite(busy.model(**case.batch(8)).logits).all()
            busy.model.generate(**prompt, max_new_tokens=2, do_sample=False)
        busy.model.train()
        with torch.no_grad():
            busy.model(**case.batch(7))
    assert same(weights(quiet), weights(busy))


def test_an_exception_in_the_middle_of_an_accumulation(spec, model_case):
    """Nothing of the failed update is in the next one: not its gradients, not those that FSDP keeps in shards."""
    case = model_case
    several = spec.name in ("accumulation", "batching") or (spec.lists and spec.name != "packing")
    given = several and spec.name not in ("accumulation", "batching")  # those two cut the batch themselves

    def updates(fail):
        good = [-1]  # losses until one fails, negative for none

        def loss(model, batch):
            value = model(**batch).loss
            good[0] -= 1
            if good[0] == -1:
                raise OSError("the data went away")
            return value

        step = step_of(spec, case, loss)
        batches = [[case.batch(seed), case.batch(seed + 50)] if given else case.batch(seed) for seed in range(3)]
        step(batches[0])
        if fail:
            good[0] = 1 if several else 0
            with pytest.raises(OSError, match="went away"):
                step(batches[1])
            assert all(parameter.grad is None for parameter in step.model.parameters())
        step(batches[2])
        return weights(step)

    assert same(updates(False), updates(True))


def test_an_interrupt_in_the_middle_of_a_backward(spec, model_case):
    if spec.name in ("sharding", "optimizer_in_backward"):  # test_sharding interrupts layers; updates were made already
        return
    case = model_case
    smooth, torn = step_of(spec, case), step_of(spec, case)
    for step in (smooth, torn):
        step(case.batch(0))
    trainable = [parameter for parameter in torn.model.parameters() if parameter.requires_grad]

    def interrupt(_):
        raise KeyboardInterrupt

    before = weights(torn)
    hook = trainable[len(trainable) // 2].register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        torn(case.batch(1))
    hook.remove()
    assert same(before, weights(torn)) and all(parameter.grad is None for parameter in trainable)
    for step in (smooth, torn):
        step(case.batch(2))
    assert same(weights(smooth), weights(torn))


def test_saved_and_loaded_in_the_middle(spec, model_case):
    """A checkpoint holds plain tensors, which torch reads without trusting the file; the run goes on to the bit."""
    if spec.name == "sharding":  # its checkpoints are distributed.checkpoint's
        return
    case = model_case
    first = step_of(spec, case)
    first(case.batch(0))
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "step": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = step_of(spec, case)
    second.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["step"])
    for step in (first, second):
        step(case.batch(1))
    assert same(weights(first), weights(second))


def test_a_copy_of_the_model_is_its_own(spec, model_case):
    if spec.name == "sharding":  # torch refuses to copy FSDP2 modules
        return
    case = model_case
    step = step_of(spec, case)
    step(case.batch(0))
    before = weights(step)
    copied = copy.deepcopy(step.model)
    copied(**case.batch(1)).loss.backward()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    assert same(before, weights(step)) and all(parameter.grad is None for parameter in step.model.parameters())


def test_settings_travel(spec, model_case):
    technique = make_technique(spec.on(MODEL))
    assert pickle.loads(pickle.dumps(technique)) == copy.deepcopy(technique) == technique
    assert make_technique(str(technique)) == technique


def test_twenty_updates_leave_nothing_behind(spec, model_case):
    """Neither tensors, nor cycles that would keep some until Python collects them."""
    step = step_of(spec, model_case)
    batches = [model_case.batch(seed) for seed in range(4)]

    def living():
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    for batch in batches:
        step(batch)
    gc.collect()
    gc.disable()
    try:
        before = living()
        for seed in range(20):
            step(batches[seed % 4])
        assert living() <= before
    finally:
        gc.enable()
