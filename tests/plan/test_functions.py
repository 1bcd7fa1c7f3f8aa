"""Functions of the user's: where they are found, what they may return, and what is said when they cannot be used."""

import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from floatline.errors import ConfigError, ModelError
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source
from floatline.step.batch import default_loss

CODE = """
import torch
from torch import nn
from floatline.step.workload import Workload

answer = 42

def squares(model, batch):
    return model(batch).square().mean()

def work(batch=2, seq=3):
    return Workload(model=lambda: nn.Linear(4, 1), batch=lambda: torch.ones(batch, seq, 4), loss=squares)

def pair():
    return nn.Linear(4, 1), torch.ones(2, 4), squares

def factories():
    return lambda: nn.Linear(4, 1), lambda: torch.ones(2, 4), squares

def hf(**sizes):
    return lambda: nn.Linear(4, 1), lambda: torch.ones(sizes.get("batch", 1), 4), squares

def broken():
    raise RuntimeError("no data")

def nothing():
    return None
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A module of that name in the working directory, under a name no other test imports."""
    name = f"toys_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(CODE))
    monkeypatch.chdir(tmp_path)
    return name


def loss_of(source):
    model = source.work.build_model()
    return (source.work.loss or default_loss)(model, source.work.build_batch())


@pytest.mark.parametrize("function", ["work", "pair", "factories", "hf"])
def test_every_kind_of_answer_trains(toys, function):
    source = load_source(f"{toys}:{function}")
    loss_of(source).backward()
    assert (source.kind, source.name, source.parameters) == ("module", function, None)


def test_a_file_works_like_a_module(toys):
    loss_of(load_source(f"./{toys}.py:work")).backward()


def test_the_working_directory_does_not_stay_on_the_path(toys):
    import sys

    before = list(sys.path)
    load_source(f"{toys}:work")
    assert sys.path == before


def test_sizes_reach_the_parameters_of_their_name(toys):
    source = load_source(f"{toys}:work", Shape(batch=5))
    assert source.work.build_batch().shape == (5, 3, 4)
    assert source.reshaped(Shape(batch=7, seq=2)).work.build_batch().shape == (7, 2, 4)
    assert load_source(f"{toys}:hf", Shape(batch=6)).work.build_batch().shape == (6, 4)


def test_a_size_without_parameter_is_refused(toys):
    with pytest.raises(ConfigError, match=f"batch=2 was given, but {toys}:pair has no parameter 'batch'"):
        load_source(f"{toys}:pair", Shape(batch=2))


def test_a_built_model_is_told_and_built_anew_under_fake_tensors(toys):
    source = load_source(f"{toys}:pair")
    assert "built its model in real memory" in source.notes[0]
    assert load_source(f"{toys}:work").notes == ()
    with FakeTensorMode():
        model = source.work.build_model()
    assert isinstance(model.weight, FakeTensor)


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("no_such_module:work", "no module 'no_such_module'", "file.py:function"),
        ("no_such.py:work", "no file no_such.py", "file.py:function"),
        ("TOYS:wrk", "has no 'wrk'", "did you mean 'work'"),
        ("TOYS:answer", "is a int, not a function", "name a function"),
        ("TOYS:broken", "failed: RuntimeError: no data", "run it on its own"),
        ("TOYS:nothing", "returned a NoneType", "floatline.Workload"),
    ],
)
def test_what_cannot_be_used_is_named(toys, text, said, hint):
    with pytest.raises(ModelError) as caught:
        load_source(text.replace("TOYS", toys))
    assert said in caught.value.message and hint in caught.value.hint


def test_a_missing_dependency_of_the_module_is_not_called_a_missing_module(toys, tmp_path):
    (tmp_path / "needy_module.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModelError, match="needy_module needs not_installed_anywhere"):
        load_source("needy_module:work")


def test_a_module_that_fails_says_so(toys, tmp_path):
    (tmp_path / "failing_module.py").write_text("1 / 0\n")
    with pytest.raises(ModelError, match="importing failing_module failed: ZeroDivisionError: division by zero"):
        load_source("failing_module:work")
    with pytest.raises(ModelError, match=r"failing_module\.py failed: ZeroDivisionError"):
        load_source("failing_module.py:work")


def test_torch_is_untouched():
    assert not isinstance(torch.empty(1), FakeTensor)
