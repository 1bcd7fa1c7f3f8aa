"""The command line: exit codes, streams, and one clear error for each mistake."""

import json

import pytest
from PIL import Image


def fails(done, *texts, code=2):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr.replace("\n", " "), done.stderr
    assert done.stderr.count("error:") == 1


def test_formats_and_doctor(floatline):
    rows = json.loads(floatline("formats", "--json").stdout)
    assert next(row for row in rows if row["format"] == "fp16")["max"] == 65504
    assert "bf16" in floatline("formats").stdout
    facts = json.loads(floatline("doctor", "--json").stdout)
    assert facts["hardware"]["kind"] in ("cpu", "cuda") and facts["auto"]["reason"]
    t4 = floatline("doctor", "--hardware", "t4").stdout
    assert "precision auto = 16-mixed" in t4 and "bf16 units start at 8.0" in t4


def test_mistakes_on_the_command_line(floatline):
    fails(floatline("doctor", "--hardware", "t5"), "unknown hardware 't5'", "hint:")
    fails(floatline("train", "none.yaml"), "recipe none.yaml does not exist")
    fails(floatline("report", "none"), "none", "hint:")
    assert floatline("nonsense").returncode == 2


def test_train_to_report(floatline, recipe_file, tmp_path):
    done = floatline("train", recipe_file, "train.steps=4", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["status"] == "finished" and printed["result"]["split"] == "test"
    assert "precision = " not in done.stdout and "validation at update" in done.stderr
    page = (tmp_path / "run/report.html").read_text()
    assert "<html" in page and "http" not in page.split("<body")[0].replace("http-equiv", "").replace("www.w3.org", "")
    text = floatline("report", tmp_path / "run", "--text")
    assert "bf16-mixed" in text.stdout and "\x1b[" not in text.stdout
    both = floatline("report", tmp_path / "run", tmp_path / "run", "--out", tmp_path / "both.html")
    assert both.returncode == 0 and (tmp_path / "both.html").exists()


@pytest.fixture
def bad_data(digits, tmp_path):
    """Write a JSONL with one bad sample among good ones; returns the override that uses it."""

    def make(line, image=None):
        if image is not None:
            image(tmp_path / "bad.png")
        good = (digits / "data/train.jsonl").read_text().splitlines()[:16]
        tree = [json.loads(text) for text in good]
        for sample in tree:
            for message in sample["messages"]:
                for part in message["content"] if isinstance(message["content"], list) else []:
                    if part["type"] == "image":
                        part["image"] = str(digits / "data" / part["image"])
        file = tmp_path / "bad.jsonl"
        file.write_text("\n".join([*map(json.dumps, tree[:2]), line, *map(json.dumps, tree[2:])]) + "\n")
        return f"data.train={file}"

    return make


def sample(image="bad.png", answer="7", question="Which digit?"):
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return json.dumps({"messages": turns})


def test_each_kind_of_bad_sample_names_file_and_line(floatline, recipe_file, bad_data):
    cases = [
        ("{", None, "bad.jsonl:3"),
        ('{"text": "x"}', None, "messages"),
        (sample("absent.png"), None, "absent.png"),
        (sample(), lambda path: path.write_bytes(b"not an image"), "bad.png"),
        (sample(), lambda path: Image.new("RGB", (900, 900)).save(path), "900"),
        (sample(answer="7 " * 50), lambda path: Image.new("RGB", (64, 64)).save(path), "max_answer_tokens"),
    ]
    for line, image, text in cases:
        done = floatline("train", recipe_file, bad_data(line, image), "data.max_pixels=100000")
        fails(done, "bad.jsonl:3", text, "hint:")


def test_bad_samples_can_be_skipped_and_are_listed(floatline, recipe_file, bad_data, tmp_path):
    done = floatline("train", recipe_file, bad_data(sample("absent.png")), "data.on_bad_sample=skip", "train.steps=1")
    assert done.returncode == 0, done.stderr
    skipped = json.loads((tmp_path / "run/run.json").read_text())["data"]["train"]["skipped"]
    assert len(skipped) == 1 and skipped[0]["line"] == 3
    assert "absent.png" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["train.lrr=1"], ["unknown key train.lrr", "hint: did you mean 'lr'"]),
        (["precision=bf16-mixed", "hardware=t4"], ["Turing", "use precision=16-mixed"]),
        (["precision=bf16-mixed; model.vissual=32"], ["matches no module", "model.visual"]),
        (["precision=16-mixed", "model.dtype=fp16"], ["GradScaler cannot unscale", "16-true"]),
        (["model.path=./absent"], ["./absent"]),
        (["data.train=absent.jsonl"], ["absent.jsonl"]),
        (["run.dir=/proc/floatline"], ["/proc/floatline", "choose another run.dir"]),
        (["train.batch_size=4096"], ["train.batch_size=4096 is more than the"]),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_mistakes_in_a_recipe(floatline, recipe_file, overrides, texts):
    fails(floatline("train", recipe_file, *overrides), *texts)
