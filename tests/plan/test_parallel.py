"""Helpers change how long a plan takes and nothing else; whatever becomes of them, the work is done."""

import io
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
from small_work import card

from floatline.errors import ConfigError, ModelError, PrecisionError
from floatline.hardware import lookup
from floatline.plan import command, helper
from floatline.plan.command import PlanRequest, answer, helpers_of
from floatline.plan.largest import largest
from floatline.plan.parallel import ALONE, Alone, Helpers, Outcome, together
from floatline.plan.plan import plan
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source
from floatline.plan.table import component_table, trials_of_table
from floatline.plan.trial import Trial

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 2048, "n_positions": 512,
        "architectures": ["GPT2LMHeadModel"]}  # fmt: skip
SHAPE = Shape(batch=4, seq=128)
T4 = lookup("t4")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2") / "config.json"
    path.write_text(json.dumps(GPT2))
    return str(path)


@pytest.fixture(scope="module")
def source(config):
    return load_source(config, SHAPE)


@pytest.fixture(scope="module")
def helpers(config):
    """One real helper process."""
    with Helpers((config, SHAPE, None), 1) as started:
        started.start()
        yield started


def never():
    raise AssertionError("made here, though a helper has it")


def settled(helpers, *trials):
    """Wait until a helper has done these."""
    helpers.prepare(*trials)
    with helpers._changed:
        assert helpers._changed.wait_for(lambda: all(helpers._outcomes.get(trial) for trial in trials), timeout=120)


def same(found, expected):
    """To the byte; in which order small temporaries are freed differs from trace to trace in one process too."""
    return {key: one.as_dict() for key, one in found.items()} == {key: one.as_dict() for key, one in expected.items()}


# A real helper


def test_a_helper_makes_the_same_estimates(source, helpers):
    trials = trials_of_table(T4)
    settled(helpers, *trials.values())
    found, here = component_table(source.work, T4, helpers=helpers), component_table(source.work, T4)
    assert same(found, here) and same({key: helpers.estimate(trial, never) for key, trial in trials.items()}, here)


def test_a_helper_knows_other_shapes_and_several_ranks(source, helpers):
    longer = Trial(hardware=T4, precision="16-mixed", shape=replace(SHAPE, seq=256))
    shards = Trial(hardware=T4, precision="16-mixed", techniques=("sharding",), ranks=2)
    settled(helpers, longer, shards)
    for trial, work in ((longer, source.reshaped(longer.shape).work), (shards, source.work)):
        assert helpers.estimate(trial, never).as_dict() == trial.estimate(work).as_dict()


@pytest.mark.parametrize(
    ("trial", "error"),
    [
        (Trial(hardware=T4, precision="bf16-mixed"), PrecisionError),
        (Trial(hardware=T4, precision="16-mixed", shape=replace(SHAPE, seq=1000)), ConfigError),
    ],
)
def test_an_error_of_a_helper_is_the_same_error(source, helpers, trial, error):
    settled(helpers, trial)
    with pytest.raises(error) as here:
        trial.estimate((source.reshaped(trial.shape) if trial.shape else source).work)
    with pytest.raises(error) as there:
        helpers.estimate(trial, never)
    assert (there.value.message, there.value.hint) == (here.value.message, here.value.hint)


def test_the_plan_is_the_same_beside_a_helper(source, helpers):
    tight = card(100)
    assert plan(source.work, tight, helpers=helpers).as_dict() == plan(source.work, tight).as_dict()


def test_none_is_left_afterwards_and_the_work_goes_on(config, source):
    trial = Trial(hardware=T4, precision="32-true")
    with Helpers((config, SHAPE, None), 1) as killed:
        killed.start()
        killed.foresee(trial)
        found = killed.estimate(trial, lambda: trial.estimate(source.work))
    assert found.as_dict() == trial.estimate(source.work).as_dict()
    assert all(process.poll() is not None for process in killed._processes)


# Helpers that go wrong


LOADED = f"sys.stdout.buffer.write({pickle.dumps('loaded')!r}); sys.stdout.flush();"


@pytest.mark.parametrize(
    "program",
    [
        "sys.exit(1)",
        f"{LOADED} sys.stdin.buffer.read(2000); sys.exit(1)",
        f"{LOADED} sys.stdin.buffer.read(2000); sys.stdout.buffer.write(b'no pickle at all')",
        f"{LOADED} sys.stdin.buffer.read(2000); sys.stdout.buffer.write({pickle.dumps('no outcome')!r})",
    ],
    ids=["does not load", "dies at work", "sends garbage", "sends something else"],
)
def test_what_a_helper_leaves_undone_is_made_here(program, monkeypatch):
    def launch(self):
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-c", f"import sys; {program}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
        return self._processes[-1]

    monkeypatch.setattr(Helpers, "_launch", launch)
    trial = Trial(hardware=T4, precision="32-true", told="x" * 2000)
    with Helpers(("model", SHAPE, None), 1) as helpers:
        helpers.foresee(trial)
        helpers.start()
        if LOADED in program:
            with helpers._changed:  # it was at work
                assert helpers._changed.wait_for(lambda: helpers._outcomes.get(trial), timeout=60)
        assert helpers.estimate(trial, lambda: "made here") == "made here"


def test_a_computer_that_starts_no_process_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    trial = Trial(hardware=T4, precision="32-true")
    with Helpers(("model", SHAPE, None), 2) as helpers:
        helpers.start()
        helpers.foresee(trial)
        assert helpers.estimate(trial, lambda: "made here") == "made here"


# Who gets helpers


def test_a_users_function_and_a_cpu_get_none(monkeypatch, source, config):
    monkeypatch.setattr(command, "room", lambda: 2)
    request = PlanRequest(model=config)
    assert helpers_of(request, source, T4).count == 2
    assert helpers_of(request, replace(source, kind="module"), T4) is ALONE
    assert helpers_of(request, source, replace(T4, kind="cpu")) is ALONE
    monkeypatch.setattr(command, "room", lambda: 0)
    assert helpers_of(request, source, T4) is ALONE


def test_helpers_start_when_a_trial_was_slow(monkeypatch):
    started = []
    monkeypatch.setattr(Helpers, "_serve", lambda self: started.append(self))
    trial = Trial(hardware=T4, precision="32-true")
    with Helpers(("model", SHAPE, None), 1, slow=1000) as patient, Helpers(("model", SHAPE, None), 1, slow=0) as eager:
        for helpers in (patient, eager, eager):
            assert helpers.estimate(trial, lambda: "made here") == "made here"
    assert started == [eager]


# Looking ahead changes nothing


class Perfect(Alone):
    """Helpers that have done at once whatever they hear of."""

    count = 3

    def __init__(self, source):
        self.source, self.done, self.used = source, {}, 0

    def foresee(self, *trials):
        for trial in trials:
            if trial not in self.done:
                work = self.source.work if trial.shape is None else self.source.reshaped(trial.shape).work
                try:
                    self.done[trial] = Outcome(estimate=trial.estimate(work))
                except ConfigError as error:
                    self.done[trial] = Outcome(error=error)

    prepare = foresee

    def first(self, trials):
        return next((place for place, trial in enumerate(trials) if trial in self.done), len(trials) - 1)

    def estimate(self, trial, make):
        if trial not in self.done:
            return make()
        self.used += 1
        if self.done[trial].error:
            raise self.done[trial].error
        return self.done[trial].estimate


@pytest.mark.parametrize("mib", [20, 100])
def test_the_answer_is_the_same_with_and_without(config, source, monkeypatch, mib):
    asked = PlanRequest(model=config, shape=Shape(seq=128), batch=8, vram=f"{700 + mib}MiB", capability="7.5")
    monkeypatch.setattr(command, "room", lambda: 0)
    alone = answer(asked)
    perfect = Perfect(load_source(config, Shape(batch=8, seq=128)))
    monkeypatch.setattr(command, "helpers_of", lambda *_: perfect)
    assert answer(asked).as_dict() == alone.as_dict()
    assert perfect.used >= 3


def test_the_largest_sizes_are_the_same(source):
    decided = plan(source.work, card(500), precision="bf16-mixed", advice=False)
    perfect = Perfect(source)
    assert largest(source, decided, helpers=perfect) == largest(source, decided)
    assert perfect.used > 0


def test_every_rung_is_foreseen_while_the_one_below_is_tried(source):
    """Where each rung stays, none but the first two has to be made when it is asked for."""
    perfect = Perfect(source)
    found = plan(source.work, card(20), precision="bf16-mixed", advice=False, helpers=perfect)
    kept = [rung for rung in found.ladder if rung.kept]
    assert len(kept) > 3 and perfect.used >= len(kept) - 2


# Pieces of work


def counting(name, trials, told):
    found = []
    for trial in trials:
        try:
            found.append((yield (trial,)))
        except ModelError as error:
            found.append(error.message)
        told.append(name)
    return found


def trials(*names):
    return [Trial(hardware=T4, precision="32-true", techniques=(name,)) for name in names]


def test_alone_the_pieces_run_one_after_the_other():
    told = []
    pieces = [counting("a", trials("1", "2"), told), counting("b", [], told), counting("c", trials("3"), told)]
    assert together(pieces, lambda trial: trial.techniques[0]) == [["1", "2"], [], ["3"]]
    assert told == ["a", "a", "c"]


def test_an_error_is_raised_in_the_piece_that_asked():
    def ask(trial):
        if trial.techniques == ("2",):
            raise ModelError("no such size")
        return trial.techniques[0]

    pieces = [counting("a", trials("1", "2", "3"), []), counting("b", trials("4"), [])]
    assert together(pieces, ask) == [["1", "no such size", "3"], ["4"]]


def test_this_process_takes_what_no_helper_is_at():
    done, at_work, free = trials("done", "at work", "free")
    helpers = Helpers(("model", SHAPE, None), 1)
    helpers._outcomes = {done: Outcome(), at_work: None}
    assert helpers.first([at_work, free]) == 1 and helpers.first([free, at_work, done]) == 2


# The helper's side


def test_serving_ends_with_the_input(config, source):
    trial = Trial(hardware=T4, precision="32-true")
    answers = io.BytesIO()
    helper.serve(io.BytesIO(pickle.dumps((config, SHAPE, None)) + pickle.dumps(trial)), answers)
    answers.seek(0)
    assert pickle.load(answers) == "loaded"
    assert pickle.load(answers) == Outcome(estimate=trial.estimate(source.work))
    assert answers.read() == b""


def test_a_foreign_error_is_left_to_the_asking_process(source, monkeypatch):
    def breaks(self, work, traces=None):
        raise RuntimeError("an error of torch")

    monkeypatch.setattr(Trial, "estimate", breaks)
    assert helper.answer(source, Trial(hardware=T4, precision="32-true"), None) == Outcome()


def test_trials_differ_in_what_is_tried_only():
    one, other = (Trial(hardware=T4, precision="32-true", told=told) for told in ("a", "b"))
    assert one == other and hash(one) == hash(other) and pickle.loads(pickle.dumps(one)) == one
    assert one != replace(one, ranks=2)
