from __future__ import annotations

import pytest

from floatline.errors import ConfigError, DataError
from floatline.train.data import SampleEncoder, check_samples, load_samples, read_samples
from floatline.train.data import checks as module


@pytest.fixture
def mixed(write, picture, talk, tmp_path):
    """Line 1 and 5 are good; 2 names a missing file, 3 a truncated one, 4 a large one."""
    picture("good.png"), picture("large.png", size=(100, 80)), picture("cut.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(cut.read_bytes()[:-300])
    names = ("good.png", "none.png", "cut.png", "large.png", "good.png")
    return write(*(talk("Which?", "7", images=(name,)) for name in names))


def test_stop_names_the_first_and_counts_the_others(mixed):
    with pytest.raises(DataError) as caught:
        check_samples(read_samples(mixed), max_pixels=4000)
    message = caught.value.message
    assert message.startswith(f"{mixed}:2: image ")
    assert "none.png does not exist" in message
    assert message.endswith("(and 2 more bad samples)")
    assert "data.on_bad_sample=skip" in caught.value.hint


def test_skip_lists_the_bad_ones(mixed):
    found = check_samples(read_samples(mixed), max_pixels=4000, on_bad_sample="skip")
    assert [sample.line for sample in found.good] == [1, 5]
    assert [sample.line for sample in found.bad] == [2, 3, 4]
    assert "cannot be read" in found.bad[1].reason
    assert "100 x 80 = 8000 pixels, more than data.max_pixels=4000" in found.bad[2].reason
    assert "data.max_pixels=8000" in found.bad[2].hint


def test_a_single_bad_sample_counts_no_others(write, talk):
    with pytest.raises(DataError) as caught:
        check_samples(read_samples(write(talk("?", "1"), talk("?", "7", images=("none.png",)))))
    assert "more bad" not in caught.value.message


def test_all_bad_is_an_error_even_with_skip(write, talk):
    path = write(talk("?", "7", images=("none.png",)), talk("?", "7", images=("none.png",)))
    with pytest.raises(DataError, match=r"no sample of .* can be used, all 2 are bad; the first: .*:1: image"):
        check_samples(read_samples(path), on_bad_sample="skip")


def test_each_image_file_is_opened_once(write, talk, picture, monkeypatch):
    opened = []
    original = module.open_image
    monkeypatch.setattr(module, "open_image", lambda path, **keys: opened.append(path) or original(path, **keys))
    names = (picture("a.png"), picture("b.png"))
    check_samples(read_samples(write(*(talk("?", "1", images=names) for _ in range(3)))))
    assert len(opened) == 2


def test_long_answers_and_sequences_are_bad(write, talk, tokenizer):
    samples = read_samples(write(talk("Which?", "1"), talk("Which?", "zzzzzzzz")))
    found = check_samples(samples, encoder=SampleEncoder(tokenizer, max_answer_tokens=4), on_bad_sample="skip")
    assert [bad.line for bad in found.bad] == [2]
    assert found.bad[0].reason == "an answer has 9 tokens, more than data.max_answer_tokens=4"
    with pytest.raises(DataError, match=r"data.jsonl:2: the sample has \d+ tokens, more than data.max_length=20"):
        check_samples(samples, encoder=SampleEncoder(tokenizer, max_length=20))


def test_load_samples_skips_wrong_lines_and_bad_images_alike(write, talk):
    path = write("{", talk("?", "7", images=("none.png",)), talk("?", "7"))
    found = load_samples(path, on_bad_sample="skip")
    assert [sample.line for sample in found.good] == [3]
    assert [bad.line for bad in found.bad] == [1, 2]
    with pytest.raises(DataError, match=r"data.jsonl:1: not valid JSON .* \(and 1 more bad sample\)"):
        load_samples(path)


def test_a_file_of_wrong_lines_only_is_an_error(write):
    with pytest.raises(DataError, match=r"all 2 are bad"):
        load_samples(write("{", "{"), on_bad_sample="skip")


def test_an_unknown_reaction_is_an_error(write, talk):
    with pytest.raises(ConfigError, match=r"data.on_bad_sample='ignore'"):
        check_samples(read_samples(write(talk("?", "1"))), on_bad_sample="ignore")
