"""Token lengths counted without encoding are those of the encoder."""

from __future__ import annotations

import pytest

from floatline.errors import DataError
from floatline.train.data import SampleEncoder, read_samples, token_lengths


def encoded(samples, encoder):
    return [len(encoder.encode(sample)["input_ids"]) for sample in samples]


@pytest.fixture
def samples(write, talk, picture):
    names = [picture(f"{n}.png", size) for n, size in enumerate([(64, 32), (100, 70), (33, 200), (32, 32), (400, 300)])]
    lines = [talk("Which?", str(n) * (n + 1), images=(name,)) for n, name in enumerate(names)]
    lines += [talk("How many?", "Two.", images=tuple(names[:3])), talk("Hi", "Hello", "And?", "So.")]
    return read_samples(write(*lines))


def test_counted_as_encoded(samples, processor, monkeypatch):
    encoder = SampleEncoder(processor)
    expected = encoded(samples, encoder)
    calls = []
    real = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda sample: calls.append(sample) or real(sample))
    assert token_lengths(samples, encoder) == expected
    assert len(set(expected)) > 4
    assert len(calls) == 4  # three and the one with the most images; the others were not opened


def test_text_only(write, talk, tokenizer, monkeypatch):
    samples = read_samples(write(talk("Hi", "Hello"), talk("Which digit?", "7")))
    encoder = SampleEncoder(tokenizer)
    expected = encoded(samples, encoder)
    monkeypatch.setattr(encoder, "encode", None)  # would fail if it were called
    assert token_lengths(samples, encoder) == expected


@pytest.mark.parametrize("answer", [AttributeError("none"), 7])
def test_a_processor_that_cannot_say_or_says_wrong_is_not_believed(samples, processor, monkeypatch, answer):
    class Wrong:
        num_image_tokens = (answer,)

    def ask(self, image_sizes):
        if isinstance(answer, Exception):
            raise answer
        return Wrong

    monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", ask)
    encoder = SampleEncoder(processor)
    assert token_lengths(samples, encoder) == encoded(samples, encoder)


def test_a_missing_image_is_named(write, talk, processor):
    samples = read_samples(write(talk("Which?", "7", images=("gone.png",))))
    with pytest.raises(DataError, match=r"data.jsonl:1: image .*gone.png"):
        token_lengths(samples, SampleEncoder(processor))
