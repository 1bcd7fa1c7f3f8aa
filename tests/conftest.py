"""What tests share: a small real data set and model for runs (made once a session), and the zoo of tiny models."""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import settings

EXAMPLES = Path(__file__).parent.parent / "examples"
HERE = Path(__file__).parent
sys.path[:0] = [
    *(str(EXAMPLES / name) for name in ("digits", "weights", "texture")), str(HERE), str(HERE / "contracts")
]  # fmt: skip

import zoo as models  # noqa: E402

# The same examples in every run, so that a red suite is the change's doing; `make soak` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("new")
settings.load_profile(os.environ.get("FLOATLINE_EXAMPLES", "same"))

# One fork server serves all tests, whichever starts it: with what a worker needs imported once, not by each worker.
multiprocessing.set_forkserver_preload(
    ["floatline.train.hub", "floatline.train.data", "torchdata.stateful_dataloader", "transformers.modeling_utils"]
)


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
def floatline(monkeypatch, capsys):
    """Runs a command line in this process: importing transformers anew for each would take minutes."""
    from floatline.cli import main

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["floatline", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture
def losses():
    """Reads (step, loss, gradient norm, learning rate) of every update in a run directory."""

    def read(run):
        records = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
        return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records if r["kind"] == "step"]

    return read


@pytest.fixture(scope="session")
def zoo():
    """The tiny models by name (zoo.py)."""
    return {case.name: case for case in models.CASES}


@pytest.fixture(params=[case.name for case in models.CASES])
def case(request, zoo):
    """Each of the tiny models in turn."""
    return zoo[request.param]


@pytest.fixture(scope="session")
def kept_bytes():
    """(model, batch, loss=None, around=nullcontext) -> bytes that the graph keeps after the forward."""
    return models.kept_bytes
