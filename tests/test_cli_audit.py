"""`floatline audit`: exit codes, streams, files, JSON, and one clear error for each mistake."""

import json
from pathlib import Path

HERE = Path(__file__).parent
HEALTHY, COUNTING, OVERFLOWING, NOISY, NO_FACTORY = (f"{HERE / 'audit/audited_models.py'}:{name}"
    for name in ("healthy", "counting", "overflowing", "noisy", "no_factory"))  # fmt: skip
QUICK = ("--hardware", "a100-40gb", "--repeats", "1", "--probes", "2")


def fails(done, *texts):
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr, done.stderr


def test_safe_is_exit_code_0_and_ends_with_the_recipes_line(floatline) -> None:
    done = floatline("audit", COUNTING, *QUICK, "--candidate", "bf16", "--lr", "1e-5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("counting on a100-40gb: bf16-mixed is safe with 1 module in fp32.")
    assert done.stdout.splitlines()[-1] == 'precision: "bf16-mixed; count=32"'
    for part in ("Kept in fp32 under bf16-mixed", "stagnation", "audited_models.py:", "Optimizer updates", "Notes"):
        assert part in done.stdout, part
    assert "audit: loading the model" in done.stderr and "audit:" not in done.stdout


def test_no_is_exit_code_1(floatline) -> None:
    done = floatline("audit", OVERFLOWING, *QUICK, "--candidate", "fp16")
    assert done.returncode == 1 and "no lower format is safe" in done.stdout and "error:" not in done.stderr
    assert done.stdout.splitlines()[-1] == 'precision: "32-true"'


def test_json_and_page(floatline, tmp_path) -> None:
    page = tmp_path / "new/audit.html"
    done = floatline("audit", HEALTHY, *QUICK, "--batch", "3", "--fp8", "--out", page, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["written"] == [str(page)] and "<html" in page.read_text()
    assert {"policy", "verdict", "candidates", "rows", "modules", "updates", "fp8", "fp8_policy", "notes", "passes",
            "seconds", "tolerance", "safe"} <= set(told)  # fmt: skip
    assert floatline("audit", HEALTHY, *QUICK, "--out", page).stdout.splitlines()[-1] == str(page)


def test_a_recipe(floatline, recipe_file) -> None:
    done = floatline("audit", recipe_file, "train.batch_size=2", "--hardware", "t4", "--candidate", "fp16",
                     "--repeats", "0", "--probes", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("recipe on t4: 16-mixed is safe") and "samples from" in done.stdout


def test_what_a_model_prints_is_no_part_of_the_answer(floatline) -> None:
    done = floatline("audit", NOISY, "--hardware", "l4", "--candidate", "bf16", "--repeats", "0", "--json")
    assert json.loads(done.stdout)["policy"] == "bf16-mixed" and "a line of the model's own" in done.stderr


def test_mistakes(floatline, tmp_path) -> None:
    fails(floatline("audit", HEALTHY, "--candidate", "bf61"), "unknown candidate 'bf61'", "hint: did you mean")
    fails(floatline("audit", HEALTHY, "--probes", "many"), "--probes many is no number", "hint:")
    fails(floatline("audit", HEALTHY, "train.lr=1"), "train.lr=1 was given, but", "is no recipe")
    fails(floatline("audit", HEALTHY, "--seed", "-1"), "seed=-1", "hint: give a whole number")
    fails(floatline("audit", HEALTHY, "--out", "/dev/null"), "cannot write /dev/null: it is a device")
    fails(floatline("audit", NO_FACTORY), "a factory of no_factory raises ZeroDivisionError", "hint: run it on its own")
    fails(floatline("audit", "nowhere"), "no model called 'nowhere'", "hint:")
    fails(floatline("audit", tmp_path / "none.yaml"), "does not exist")
    fails(floatline("audit", HEALTHY, "--batches", "2"), "--batches 2 is for recipes")
    (tmp_path / "file").write_text("")
    fails(floatline("audit", HEALTHY, "--out", tmp_path / "file/a.html"), "file")
