"""`floatline plan`: exit codes, streams, files, JSON, and one clear error for each mistake."""

import json
from pathlib import Path

import pytest
import yaml

from floatline.train.recipe import Recipe

HERE = Path(__file__).parent
DEEP, WIDE = (f"{HERE / 'plan/planned_models.py'}:{name}" for name in ("deep", "wide"))
CARD = ("--vram", "2GiB", "--capability", "8.6")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """A directory with the config.json of a GPT-2 of two layers."""
    home = tmp_path_factory.mktemp("tiny-gpt2")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes, "bos_token_id": 0, "eos_token_id": 0}
    (home / "config.json").write_text(json.dumps(config))
    return home


def test_it_fits(floatline, tiny_gpt2):
    done = floatline("plan", tiny_gpt2, "--hardware", "t4", "--batch", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tiny_gpt2.name} needs ") and "of 14.6 GiB on t4: fits," in done.stdout
    for part in ("Memory by component", "The ladder", "Not used, and why", "At the peak", "Largest that fits",
                 "Chosen for you", "Notes", "Assumed", "The recipe's part"):  # fmt: skip
        assert part in done.stdout, part
    assert "the longest it takes (n_positions)" in done.stdout
    assert "plan: the plain step on t4" in done.stderr and "plan:" not in done.stdout


def test_quick_leaves_the_dear_parts_out(floatline, tiny_gpt2):
    done = floatline("plan", tiny_gpt2, "--hardware", "t4", "--quick")
    assert done.returncode == 0
    assert "Memory by component" not in done.stdout and "Largest that fits" not in done.stdout


def test_no_is_exit_code_1_and_says_what_would_fit(floatline):
    done = floatline("plan", WIDE, *CARD, "--quick")
    assert done.returncode == 1 and ": does not fit, " in done.stdout and " too much." in done.stdout
    assert "error:" not in done.stderr


def test_a_search_ends_with_a_recipe_that_train_reads(floatline):
    done = floatline("plan", DEEP, *CARD, "--quick", "--batch", "128", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["verdict"] == "fits" and any(text.startswith("accumulation") for text in told["techniques"])
    assert told["ladder"][0]["verdict"] == "does not fit" and told["recipe"]["techniques"]["accumulation"]
    Recipe.model_validate({"model": {"path": "x"}, "data": {"train": "x"}, **told["recipe"]})


def test_json_has_plain_numbers(floatline, tiny_gpt2):
    done = floatline("plan", tiny_gpt2, "--hardware", "t4", "--json")
    told = json.loads(done.stdout)
    assert {"model", "hardware", "verdict", "precision", "precision_reason", "techniques", "estimate", "ladder",
            "rejected", "advice", "recipe", "source", "table", "largest", "settings",
            "written"} <= set(told)  # fmt: skip
    assert {"peak_allocated", "peak_reserved", "peak_total", "margin", "chance", "band", "categories",
            "seconds"} <= set(told["estimate"])  # fmt: skip
    assert isinstance(told["estimate"]["peak_total"], int) and told["source"]["shape"]["seq"] == 64
    assert {row["key"] for row in told["largest"]} <= {"batch", "seq"} and len(told["table"]) == 4


def test_files_are_written_and_named(floatline, tiny_gpt2, tmp_path):
    page, picture = tmp_path / "new/plan.html", tmp_path / "plan.png"
    done = floatline("plan", tiny_gpt2, "--hardware", "t4", "--quick", "--out", page, "--png", picture)
    assert done.stdout.splitlines()[-2:] == [str(page), str(picture)]
    assert "<html" in page.read_text() and picture.read_bytes().startswith(b"\x89PNG")
    told = json.loads(floatline("plan", tiny_gpt2, "--hardware", "t4", "--quick", "--out", page, "--json").stdout)
    assert told["written"] == [str(page)]


def test_all_gpus(floatline, tiny_gpt2, tmp_path):
    page = tmp_path / "all.html"
    done = floatline("plan", tiny_gpt2, "--hardware", "all", "--batch", "1", "--out", page)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines() if "fits" in line]
    assert rows[1:4] == ["t4", "v100-16gb", "p100-16gb"] and rows[-1] == "b200"
    assert "on all GPUs" in page.read_text() and "GPU 1 of " in done.stderr
    told = json.loads(floatline("plan", tiny_gpt2, "--hardware", "all", "--json").stdout)
    assert told["fits"] and {"hardware", "memory", "precision", "plain_peak_total", "peak_total", "verdict",
                             "techniques", "seconds"} <= set(told["hardware"][0])  # fmt: skip


def test_inference(floatline, tiny_gpt2):
    done = floatline("plan", tiny_gpt2, "--hardware", "t4", "--mode", "inference")
    assert done.returncode == 0 and "In 16-true; about" in done.stdout and "The ladder" not in done.stdout


def test_sizes_reach_the_model(floatline, tiny_gpt2):
    asked = (
        "--seq",
        "16",
        "--batch",
        "2",
        "--global-batch",
        "8",
        "--precision",
        "32-true",
        "--technique",
        "checkpointing",
    )
    told = json.loads(floatline("plan", tiny_gpt2, "--hardware", "t4", "--quick", "--json", *asked).stdout)
    assert told["source"]["shape"] == {"batch": 8, "seq": 16}
    assert told["techniques"] == ["checkpointing", "accumulation(micro_batches=4)"] and told["precision"] == "32-true"
    assert told["estimate"]["micro_batches"] == 4


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--hardware", "rtx-3080"], ["unknown hardware 'rtx-3080'", "rtx-3090", "--vram 24GiB --capability 8.6"]),
        (["--vram", "24", "--capability", "8.6"], ["--vram '24' is not an amount of memory", "write 24GiB"]),
        (["--vram", "24GiB", "--capability", "ampere"], ["capability 'ampere' is not", "write 8.6"]),
        (["--capability", "8.6"], ["--capability 8.6 was given without --vram"]),
        (["--seq", "65"], ["seq=65 is over the 64 positions", "use seq=64 or less"]),
        (["--seq", "0"], ["seq=0 is not a whole number of 1 or more"]),
        (["--image", "big"], ["image 'big' is not HEIGHTxWIDTH", "write it like 1024x1024"]),
        (["--image", "32x32"], ["takes no image", "leave image out"]),
        (["--batch", "3", "--global-batch", "8"], ["--global-batch 8 is no multiple of --batch 3", "2 or 4"]),
        (["--technique", "checkpointin"], ["checkpointin", "checkpointing"]),
        (["--exclude", "offlod"], ["offlod", "offload"]),
        (["--precision", "bf16-mixed"], ["bf16-mixed cannot run on t4", "Turing"]),
        (["--precision", "fp7"], ["fp7", "hint:"]),
        (["--task", "masked-lm"], ["masked-lm", "hint:"]),
        (["--mode", "eval"], ["mode is 'eval'", "train, inference"]),
        (["--export", "keras"], ["cannot be exported as 'keras'", "hint:"]),
        (["--hardware", "all", "--vram", "8GiB"], ["--vram describes one GPU"]),
        (["--hardware", "all", "--png", "x.png"], ["--png is for one GPU"]),
        (["--hardware", "all", "--export", "fsdp"], ["--export is for one GPU"]),
        (["--mode", "inference", "--export", "fsdp"], ["--export is for training"]),
        (["--out", "/dev/null/plan.html"], ["cannot write /dev/null/plan.html", "may write to"]),
        (["--png", "/"], ["cannot write /: it is a directory"]),
    ],
    ids=lambda value: " ".join(value[:2]) if str(value[0]).startswith("--") else "",
)
def test_mistakes(floatline, tiny_gpt2, options, texts):
    done = floatline("plan", tiny_gpt2, "--hardware", "t4", *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.count("error:") == 1
    for text in texts:
        assert text in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("model", "text"),
    [("gpt22", "did you mean"), ("./absent", "no such file"), (f"{HERE}:x", "no module"), (f"{DEEP}er", "no 'deeper'")],
)
def test_models_that_are_none(floatline, model, text):
    done = floatline("plan", model, "--hardware", "t4")
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr


def test_the_recipe_in_the_text_is_yaml(floatline):
    done = floatline("plan", DEEP, *CARD, "--quick", "--batch", "8", "--technique", "checkpointing(every=2)")
    tree = yaml.safe_load(done.stdout.partition("for `floatline train`\n")[2])
    assert tree["techniques"] == {"checkpointing": {"every": 2}}
