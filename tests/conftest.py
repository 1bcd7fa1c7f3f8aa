"""A small real data set and model for runs: a few digit scenes and the demo's model class, made once a session."""

import json
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES / "digits"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A directory with `data/{train,validation,test}.jsonl` and `model/`."""
    import scenes
    import tiny_vlm

    home = tmp_path_factory.mktemp("digits")
    scenes.write_scenes(home / "data", train=48, validation=8, test=8, seed=0)
    tiny_vlm.build(home / "model", scenes.read_texts(home / "data/train.jsonl"))
    return home


@pytest.fixture
def recipe_file(digits, tmp_path):
    """A recipe of 12 updates on the small data set, with run.dir in a fresh directory."""
    tree = {
        "model": {"path": str(digits / "model")},
        "data": {
            "train": str(digits / "data/train.jsonl"),
            "validation": str(digits / "data/validation.jsonl"),
            "test": str(digits / "data/test.jsonl"),
            "max_answer_tokens": 8,
        },
        "precision": "bf16-mixed",
        "train": {"steps": 12, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 4},
        "eval": {"every": 6, "max_samples": 8},
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def losses():
    """Reads (step, loss, gradient norm, learning rate) of every update in a run directory."""

    def read(run):
        records = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
        return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records if r["kind"] == "step"]

    return read
