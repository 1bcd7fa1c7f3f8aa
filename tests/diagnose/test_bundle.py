"""Bundles: a condemned step goes into a file and comes out as it was; from what is no bundle nothing runs."""

import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.diagnose.bundle import FILE, MANIFEST, bundle_of, load_bundle, put_into, save_bundle
from floatline.diagnose.replay import replay
from floatline.errors import BundleError


def step_of(techniques=(), precision="bf16-mixed"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    return fl.TrainStep(
        model,
        torch.optim.AdamW(model.parameters()),
        precision,
        loss=lambda m, b: (m(b["x"]).float().square().mean() - b["shift"]).log(),
        techniques=techniques,
    )


def batch(shift, seed=0):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "shift": torch.tensor(float(shift)), "file": "a.png", "note": {"line": 3, "tags": ["a", None]}}


def failed(step, **settings):
    """Train a little, fail, and return the bundle."""
    kept = []
    step.sentinel.on_fault = lambda skip, judged: kept.append(bundle_of(step, skip, judged, **settings))
    for number in range(3):
        step(batch(0, number))
    step([batch(0, 8), batch(50, 9)])
    return kept[0]


BATCH = 8 * 3 * 4 + 4  # x and shift
BUFFERS = 8 * 4 * 2 + 8  # of the batch norm
WEIGHTS = 4 * (3 * 8 + 8 + 2 * 8 + 8 + 1)
PLENTY = 2 * BATCH + BUFFERS + 2 * torch.get_rng_state().numel()  # for all but the weights


def test_there_and_back(tmp_path):
    bundle = failed(step_of())
    path = save_bundle(bundle, tmp_path)
    assert path.name == "update-00000004" and os.listdir(tmp_path) == ["update-00000004"]
    again = load_bundle(path)
    assert (again.update, again.what, again.suspects, again.precision) == (4, "loss", (1,), "bf16-mixed")
    for ours, theirs in zip(again.reruns, bundle.reruns, strict=True):
        assert torch.equal(ours.batch["x"], theirs.batch["x"]) and ours.batch["note"] == theirs.batch["note"]
        assert torch.equal(ours.random[0], theirs.random[0])
    assert all(torch.equal(again.weights[name], value) for name, value in bundle.weights.items())
    assert load_bundle(path / FILE).update == 4


def test_a_replay_fails_as_the_step_did(tmp_path):
    path = save_bundle(failed(step_of()), tmp_path)
    other, bundle = step_of(), load_bundle(path)
    put_into(bundle, other.model)
    found = replay(bundle, other)
    assert found.outcome == "reproduced" and found.micro_batch == 1
    assert found.finding.op == "log" and found.finding.cause_name == "log of a negative number"
    assert str(found).startswith("update 4: reproduced") and found.as_dict()["finding"]["op"] == "log"


def test_the_random_numbers_are_those_of_the_step():
    """The replay's loss is the loss to the bit, with dropout in the model."""
    step = step_of()
    losses = []
    plain = step.loss
    step.loss = lambda m, b: losses.append(plain(m, b)) or losses[-1]
    kept = []
    step.sentinel.on_fault = lambda skip, judged: kept.append(judged)
    step(batch(-0.5, 3))
    step.loss = lambda m, b: losses.append(plain(m, b)) or losses[-1] * float("nan")
    step(batch(-0.25, 4))
    step.loss = plain
    assert torch.equal(step.rerun(kept[0].reruns[0], scaled=False), losses[-1])


def test_what_does_not_fail_any_more_says_why(tmp_path):
    bundle = failed(step_of())
    mended = step_of()
    put_into(bundle, mended.model)
    mended.loss = lambda m, b: m(b["x"]).float().square().mean()
    found = replay(bundle, mended)
    assert found.outcome == "not reproduced" and "look at the hardware" in found.note
    small = failed(step_of(), cap=PLENTY, checkpoint="checkpoints/step-00000002")
    assert small.weights is None and small.checkpoint
    assert "the weights are those of a checkpoint" in replay(small, mended).note


def test_what_fails_only_when_compiled_is_told():
    bundle = failed(step_of())
    step = step_of(techniques=["compile(scope='model', backend='eager')"])
    put_into(bundle, step.model)

    def only_compiled(model, given):
        loss = model(given["x"]).float().square().mean()
        return loss * float("nan") if torch.compiler.is_compiling() or not eager() else loss

    step.loss = only_compiled
    assert replay(bundle, step).outcome == "only compiled"


def eager():
    """Say whether the present stance forbids compiled code, as a diagnosis does."""
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance == "force_eager"


def test_what_cannot_be_kept_is_named():
    step = step_of()
    kept = []
    step.sentinel.on_fault = lambda skip, judged: kept.append(bundle_of(step, skip, judged))
    step(batch(50) | {"image": object()})
    assert kept[0].left_out == ("micro-batch 0.image (object)",)
    assert "the batch is not whole" in replay(kept[0], _harmless()).note


def _harmless():
    step = step_of()
    step.loss = lambda m, b: m(b["x"]).float().square().mean()
    return step


def test_another_model_is_refused():
    with pytest.raises(BundleError, match=r"of another model: 0.weight of shape \(8, 3\) is not in this one"):
        put_into(failed(step_of()), nn.Linear(2, 2))


@pytest.mark.parametrize(("cap", "without"), [
    (2**20, []),
    (PLENTY + WEIGHTS, []),
    (PLENTY + WEIGHTS - 1, ["the weights"]),
    (PLENTY, ["the weights"]),
    (PLENTY - 1, ["the buffers", "the weights"]),
    (PLENTY - BUFFERS - 1, ["micro-batch 0"]),  # micro-batch 1 is at fault; what is smaller fits then
    (10, ["micro-batch 1", "micro-batch 0", "the buffers", "the weights"]),
])  # fmt: skip
def test_everything_counts_and_what_does_not_fit_is_told(tmp_path, cap, without):
    path = save_bundle(failed(step_of(), cap=cap), tmp_path)
    bundle, manifest = load_bundle(path), json.loads((path / MANIFEST).read_text())
    assert [each.partition(" (")[0] for each in bundle.left_out] == without
    assert manifest["left_out"] == list(bundle.left_out) and all("MiB were left)" in each for each in bundle.left_out)
    assert manifest["holds"]["weights"] is ("the weights" not in without) is (bundle.weights is not None)
    assert manifest["holds"]["buffers"] == len(bundle.buffers) == (0 if "the buffers" in without else 3)
    assert manifest["holds"]["micro_batches"] == [p for p in (0, 1) if f"micro-batch {p}" not in without]
    assert (path / FILE).stat().st_size < cap + 20_000  # names and the like come on top


def test_a_bundle_without_a_part_of_the_batch_says_so():
    found = replay(failed(step_of(), cap=PLENTY - BUFFERS - 1), step_of())
    assert found.outcome == "reproduced" and found.note.startswith("the bundle is without micro-batch 0 (")
    found = replay(failed(step_of(), cap=10), step_of())
    assert found.outcome == "not run" and found.finding is None and "micro-batch 1 (0.0 MiB" in found.note


def test_a_view_of_something_large_is_kept_without_it(tmp_path):
    step, kept = step_of(), []
    step.sentinel.on_fault = lambda skip, judged: kept.append(bundle_of(step, skip, judged, cap=2**20))
    step(batch(50) | {"x": torch.randn(10**6, 3)[:8]})
    path = save_bundle(kept[0], tmp_path)
    assert not kept[0].left_out and (path / FILE).stat().st_size < 2**16


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/floatline-was-here",)


@pytest.mark.parametrize("content", ["evil", "cut short", "empty", "other", "list"])
def test_nothing_runs_from_a_file_that_is_no_bundle(tmp_path, content):
    path = save_bundle(failed(step_of()), tmp_path)
    file = path / FILE
    if content == "evil":
        torch.save({"version": 1, "reruns": Evil()}, file)
    elif content == "cut short":
        file.write_bytes(file.read_bytes()[:500])
    elif content == "empty":
        file.write_bytes(b"")
    elif content == "other":
        torch.save({"version": 1, "reruns": [], "surprise": 1}, file)
    else:
        file.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(BundleError):
        load_bundle(path)
    assert not os.path.exists("/tmp/floatline-was-here")


@pytest.mark.parametrize(("field", "value", "said"), [("update", "x", "its update is a str"),
                                                      ("weights", {"a": 1}, "are tensors"),
                                                      ("suspects", (7,), "its suspects are \\(7,\\), of 2"),
                                                      ("buffers", [1], "its buffers is a list"),
                                                      ("versions", None, "its versions is a NoneType")])  # fmt: skip
def test_a_field_of_another_kind_is_refused(tmp_path, field, value, said):
    file = save_bundle(failed(step_of()), tmp_path) / FILE
    torch.save({**torch.load(file, weights_only=True), field: value}, file)
    with pytest.raises(BundleError, match=said):
        load_bundle(file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_damage_is_a_bundle_error(tmp_path):
    file = save_bundle(failed(step_of()), tmp_path) / FILE
    with zipfile.ZipFile(file) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        body = bytearray(members[pickled])
        body[draw.randrange(len(body))] = draw.randrange(256)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as damaged:
            for name, content in members.items():
                damaged.writestr(name, bytes(body) if name == pickled else content)
        try:
            load_bundle(file)
        except BundleError:
            refused += 1
    assert refused > 20


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(BundleError, match="could not be written"):
        save_bundle(failed(step_of()), tmp_path)
    assert os.listdir(tmp_path) == []


def test_odd_content_of_a_batch_is_kept_as_plain_values_and_loads(tmp_path):
    import enum
    from collections import namedtuple

    import numpy as np

    from floatline.diagnose.bundle import Bundle, _plain, load_bundle, save_bundle
    from floatline.step.sentinel import Rerun

    Pair = namedtuple("Pair", "a b")
    kind = enum.IntEnum("Kind", "ONE TWO")
    batch = {"flag": True, "none": None, "large": 2**80, "pair": Pair(torch.ones(2), 1), 3: "by number",
             "enum": kind.TWO, "numpy": np.float64(0.5), "array": np.ones(2),
             "nested": [({"x": torch.zeros(1)},)]}  # fmt: skip
    left_out = []
    plain = _plain(batch, "micro-batch 0", left_out)
    assert left_out == ["micro-batch 0.array (ndarray)"]
    bundle = Bundle(update=1, what="loss", reason="", reruns=(Rerun(plain, (torch.get_rng_state(),)),))
    read = load_bundle(save_bundle(bundle, tmp_path)).reruns[0].batch
    assert read["flag"] is True and read["none"] is None and read["large"] == 2**80 and read[3] == "by number"
    assert read["pair"][1] == 1 and read["enum"] == 2 and read["numpy"] == 0.5
    assert type(read["nested"][0]) is tuple
