"""The techniques on models that they were not written for (other_models.py): the plain step's numbers, or a clear word.

Random state is set before each update, so that dropout and stochastic depth draw the same numbers with a technique and
without it.
"""

import warnings

import contract
import pytest
import torch
from contract import distance, make_step
from other_models import OTHERS
from test_techniques import shape_of

from floatline.errors import ConfigError, FloatlineWarning

EXACT = ("checkpointing", "checkpointing(keep=['matmul', 'attention'])", "offload(to=disk, min_bytes=0)",
         "optimizer_offload(bucket_bytes=2000)", "optimizer_in_backward")  # fmt: skip
CLOSE = ("attention(kernel=math)", "chunked_loss(chunk_tokens=8)", "kahan")
PACKABLE = {"llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "neox", "mixtral", "qwen3_moe", "qwen25_vl",
            "llava"}  # fmt: skip
NO_TOKENS = {"vit", "segformer", "convnext", "wav2vec2", "unet", "self_attention", "stochastic_depth", "reused",
             "stateful", "bare"}  # fmt: skip
NOT_REPEATED = {"lstm", "gru", "bare"}
NO_ATTENTION = {"mamba", "convnext", "unet", "lstm", "gru", "stochastic_depth", "reused", "stateful", "bare"}
NOT_ADAPTABLE = {"unet", "lstm", "gru", "self_attention", "bare"}


@pytest.fixture(params=OTHERS, ids=[case.name for case in OTHERS], scope="module")
def other(request):
    return request.param


def batches(case):
    for seed in range(2):
        batch = case.batch(seed)
        torch.manual_seed(100 + seed)
        yield batch


@pytest.fixture(scope="module")
def plain(other):
    """(clip) -> a plain run's step, undone, its result and its first weights."""
    cache = {}

    def run_plain(clip):
        if clip not in cache:
            step = make_step(other, [], "32-true", clip=clip)
            start = {name: contract.whole(parameter) for name, parameter in step.model.named_parameters()}
            result = contract.run(step, batches(other))
            step.undo()
            cache[clip] = step, result, start
        return cache[clip]

    return run_plain


def check_undone(model, reference, result):
    """A forward alone leaves marks on some models (hooks of transformers), so a plain model that ran is compared."""
    spelled = [
        {name: (kind.__name__, *rest) for name, (kind, *rest) in shape_of(one).items()} for one in (model, reference)
    ]
    assert spelled[0] == spelled[1]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == reference.get_parameter(name).requires_grad
        if name in result.weights:
            assert torch.equal(contract.whole(parameter), result.weights[name])


@pytest.mark.parametrize("text", [*EXACT, *CLOSE])
@pytest.mark.filterwarnings("ignore::floatline.errors.FloatlineWarning")
def test_the_plain_steps_numbers(text, other, plain):
    clip = None if text == "optimizer_in_backward" else 0.05
    reference, expected, start = plain(clip)
    step = make_step(other, [text], "32-true", clip=clip)
    result = contract.run(step, batches(other))
    allowed = 0.0 if text in EXACT else contract.ROUNDING["32-true"]
    assert distance(result.weights, expected.weights, start) <= allowed
    assert distance(result.buffers, expected.buffers, {}) <= allowed
    for ours, plain_ones in ((result.losses, expected.losses), (result.norms, expected.norms)):
        assert distance(dict(enumerate(ours)), dict(enumerate(plain_ones)), {}) <= 3 * allowed
    step.undo()
    check_undone(step.model, reference.model, result)


@pytest.mark.parametrize("text", ["lora(rank=2)", "freezing(modules=['*'], keep=['{last}'])"])
@pytest.mark.filterwarnings("ignore::floatline.errors.FloatlineWarning")
def test_what_is_trained_can_be_chosen_and_put_back(text, other, plain):
    reference, _, start = plain(0.05)
    text = text.format(last=list(start)[-1].split(".")[0])
    step = make_step(other, [text], "32-true", clip=0.05)
    result = contract.run(step, batches(other))
    step.undo()
    check_undone(step.model, reference.model, result)


def said(other, text):
    """What a technique that changes nothing of a model says: its error, its warnings, or nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FloatlineWarning)
        try:
            make_step(other, [text], "32-true", clip=0.05)
        except ConfigError as error:
            return f"{error}"
    return " ".join(str(w.message) for w in caught if issubclass(w.category, FloatlineWarning))


@pytest.mark.parametrize(
    ("text", "models", "words"),
    [
        ("checkpointing", NOT_REPEATED, "no layers repeat in"),
        ("compile(backend=eager)", NOT_REPEATED, "no layers repeat in"),
        ("attention", NO_ATTENTION, "seems to have no attention"),
        ("lora", NOT_ADAPTABLE, "set targets"),
        ("batching(max_tokens=40)", NO_TOKENS, "has no token embedding"),
        ("packing", {case.name for case in OTHERS} - PACKABLE, "packing cannot be applied"),
    ],
)
def test_where_it_does_nothing_it_says_so(text, models, words, other):
    words_said = said(other, text)
    assert (words in words_said) == (other.name in models), words_said
