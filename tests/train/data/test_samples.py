from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from floatline.errors import DataError
from floatline.train.data import BadSample, Sample, read_samples

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def line(*messages: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": list(messages), **keys}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_reads_text_images_kind_and_extra_keys(write, tmp_path):
    parts = ({"type": "image", "image": "img/a.png"}, {"type": "text", "text": "Which?"})
    path = write(line({"role": "system", "content": "Be brief."}, user(*parts), ANSWER, kind="digit", id=7))
    (sample,) = read_samples(path)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[1].parts == (tmp_path / "img/a.png", "Which?")
    assert sample.messages[1].text == "Which?"
    assert sample.images == (tmp_path / "img/a.png",)
    assert (sample.kind, sample.line, sample.file) == ("digit", 1, path)
    assert sample.extra == {"id": 7}
    assert sample.where == f"{path}:1"


def test_blank_lines_and_a_byte_order_mark_are_allowed(tmp_path):
    path = tmp_path / "data.jsonl"
    text = json.dumps(line(USER, ANSWER))
    path.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\n  \n{text}".encode())
    assert [sample.line for sample in read_samples(path)] == [1, 4]


def test_kind_key_can_be_renamed(write):
    (sample,) = read_samples(write(line(USER, ANSWER, task="count", kind="x")), kind_key="task")
    assert sample.kind == "count"
    assert sample.extra == {"kind": "x"}


@pytest.mark.parametrize(
    "url", ["a b.png", {"url": "a b.png"}, {"url": "file:{folder}/a%20b.png"}, {"url": "file://{folder}/a%20b.png"}]
)
def test_image_urls_are_files(write, tmp_path, url):
    url = json.loads(json.dumps(url).replace("{folder}", str(tmp_path)))
    part = {"type": "image_url", "image_url": url}
    assert read_samples(write(line(user(part), ANSWER)))[0].images == (tmp_path / "a b.png",)


def test_absolute_paths_stay(write, tmp_path):
    part = {"type": "image", "image": "/pictures/../a.png"}
    assert read_samples(write(line(user(part), ANSWER)))[0].images == (Path("/a.png"),)


def test_listed_images_stand_where_their_placeholders_are(write, tmp_path):
    question = {"role": "user", "content": "<image>First<image><image> and?"}
    (sample,) = read_samples(write(line(question, ANSWER, images=["a.png", "b.png", "c.png"])))
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    assert sample.messages[0].parts == (a, "First", b, c, " and?")


def test_listed_images_fill_bare_image_parts(write, tmp_path):
    (sample,) = read_samples(write(line(user({"type": "image"}), ANSWER, images=["a.png"])))
    assert sample.images == (tmp_path / "a.png",)


WRONG = [
    ('{"messages": [', "not valid JSON", '{"messages": [', "one complete JSON object"),
    ("[1, 2]", "not an object", "[1, 2]", '"messages"'),
    ({"text": "hi"}, "messages is missing", '"text"', '"messages"'),
    ({"conversations": []}, "messages is missing", '"conversations"', "turn its conversations into messages"),
    ({"messages": "hi"}, "not a list of turns", '"hi"', "write"),
    ({"messages": []}, "not a list of turns", "[]", "write"),
    (line("hi"), "messages[0]", '"hi"', "write"),
    (line({"role": "tool", "content": "x"}), "messages[0].role", '"tool"', "system, user, assistant"),
    (line({"content": "x"}), "messages[0].role", "null", "system, user, assistant"),
    (line({"role": "user"}, ANSWER), "messages[0].content", "null", "string"),
    (line({"role": "user", "content": 7}, ANSWER), "messages[0].content", "7", "string"),
    (line(user("x"), ANSWER), "messages[0].content[0]", '"x"', '"type": "text"'),
    (line(user({"type": "audio"}), ANSWER), "messages[0].content[0].type", '"audio"', "text, image, image_url"),
    (line(user({"type": "text"}), ANSWER), "messages[0].content[0].text", "null", "quotes"),
    (line(user({"type": "image", "image": 3}), ANSWER), "content[0].image", "3", "quotes"),
    (line(user({"type": "image", "image": ""}), ANSWER), "content[0].image", '""', "name the image file"),
    (line(user({"type": "image", "image": "a\0"}), ANSWER), "content[0].image", "a\\u0000", "name the image file"),
    (line(user({"type": "image_url", "image_url": {}}), ANSWER), "image_url.url", "null", "quotes"),
    (line(user({"type": "image", "image": "https://x/a.png"}), ANSWER), "not a file", "https://x/a.png", "download"),
    (line(user({"type": "image", "image": "file://[x/a"}), ANSWER), "content[0].image", "file://[x/a", "plain path"),
    (line(user({"type": "image"}), ANSWER), "names no image", "content[0]", '"images": ["a.png"]'),
    (line({"role": "user", "content": "<image>?"}, ANSWER), "no file left", "<image>", '"images": ["a.png"]'),
    (line(USER, ANSWER, images=["a.png"]), "images lists 1 files", "only 0", "write one <image>"),
    (line(USER, ANSWER, images="a.png"), "not a list of paths", '"a.png"', '"images": ["a.png"]'),
    (line(USER, ANSWER, images=[1]), "images[0]", "1", "quotes"),
    (line(USER, ANSWER, kind=3), "kind is 3", "3", '"3"'),
    (line(USER), "no assistant turn", "user", "answer"),
    (line(ANSWER), "no user turn", "first answer", "question before"),
    (line(USER, ANSWER, USER), "the last turn", "'user'", "assistant turn"),
    (line(USER, {"role": "assistant", "content": " \n"}), "messages[1] is an empty answer", " \\n", "write the answer"),
    (line(USER, {"role": "assistant", "content": []}), "messages[1] is an empty answer", '""', "write the answer"),
    (line(USER, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}), "with an image", "[1]", "user"),
    (line({"role": "user", "content": "\ud800"}, ANSWER), "surrogate", "\\ud800", "UTF-8"),
    ("[" * 100_000, "not valid JSON", "[[[", "one complete JSON object"),
    ("9" * 5000, "not valid JSON", "999", "one complete JSON object"),
]


@pytest.mark.parametrize(("text", "what", "value", "hint"), WRONG)
def test_a_wrong_line_is_one_error_with_file_line_value_and_hint(write, text, what, value, hint):
    path = write(line(USER, ANSWER), "", text)
    with pytest.raises(DataError) as caught:
        read_samples(path)
    error = caught.value
    assert error.message.startswith(f"{path}:3: ")
    assert what in error.message
    assert value in error.message
    assert hint in error.hint
    assert "\n" not in error.message


def test_bad_lines_can_be_collected(write):
    bad: list[BadSample] = []
    path = write(line(USER, ANSWER), "{", line(USER, ANSWER), {})
    assert [sample.line for sample in read_samples(path, bad=bad)] == [1, 3]
    assert [(found.file, found.line) for found in bad] == [(path, 2), (path, 4)]
    assert str(bad[0]).startswith(f"{path}:2: not valid JSON")


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(line(USER, ANSWER)).encode() + b'\n{"messages": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: byte 0xe9 at column 15 is not UTF-8"):
        read_samples(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty.jsonl holds no samples") as caught:
        read_samples(path)
    assert '"messages"' in caught.value.hint


def test_a_missing_file_and_a_directory_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl does not exist"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"is a directory") as caught:
        read_samples(tmp_path)
    assert caught.value.hint == "name the JSONL file in it"
    with pytest.raises(DataError, match=r"cannot be read"):
        read_samples("a\0b")


TEXT = st.sampled_from(["user", "assistant", "system", "text", "image", "image_url", "<image>", "a.png", "file:a", ""])
KEYS = st.sampled_from(["messages", "role", "content", "type", "text", "image", "image_url", "url", "images", "kind"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=15,
)
PART = st.fixed_dictionaries({"type": TEXT}, optional={"text": ANY, "image": ANY, "image_url": ANY}) | ANY
MESSAGE = st.fixed_dictionaries({"role": TEXT, "content": st.lists(PART, max_size=3) | TEXT | ANY}) | ANY
LINE = st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4) | ANY}, optional={"images": ANY, "kind": ANY})


@given(LINE | ANY)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_a_sample_or_a_data_error(tmp_path, value):
    path = tmp_path / "any.jsonl"
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    try:
        (sample,) = read_samples(path)
    except DataError as error:
        assert error.message.startswith(f"{path}:1: ")
    else:
        assert isinstance(sample, Sample)
        assert sample.messages[-1].text.strip()
        assert all(image.is_absolute() for image in sample.images)


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_data_error(tmp_path, content):
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_samples(path)
