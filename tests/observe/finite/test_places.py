"""The user's own line, and the library's below it."""

import sys

import torch
from torch import nn
from torch.optim import SGD

from floatline.observe.finite import places as module
from floatline.observe.finite.places import nearest_line, place_in_backward, place_of_optimizer, places, variable_of

SGD_FILE = sys.modules[SGD.__module__].__file__


def line():
    return sys._getframe(1).f_lineno


def test_the_innermost_line_of_the_user():
    user, library = places()
    here = line() - 1
    assert (user.file, user.line, library) == (__file__, here, None)
    assert user.code.startswith("user, library = places()") and user.function.startswith("test_the_innermost")
    assert str(user) == f"{__file__}:{here}  {user.code}"
    assert nearest_line() == (__file__, line())


def test_a_library_below_the_user_is_told_as_well(monkeypatch):
    import copy  # of the standard library: not the user's to change

    found = []
    monkeypatch.setattr(copy, "_deepcopy_dispatch", {**copy._deepcopy_dispatch, complex: torch_like(found)})
    copy.deepcopy(1j)
    user, library = found[0]
    assert user.function == "test_a_library_below_the_user_is_told_as_well" and "copy.deepcopy(1j)" in user.code
    assert library.file == copy.__file__ and library.function == "deepcopy"


def torch_like(found):
    """A function that asks where it is from a file of torch's."""
    code = compile("def ask(x, memo):\n    found.append(places())\n    return x", torch.__file__, "exec")
    scope = {"found": found, "places": places}
    exec(code, scope)
    return scope["ask"]


def test_torch_is_not_the_users():
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            return Inner()(x)

    class Inner(nn.Module):
        def forward(self, x):
            seen.append(places()[0])
            return x

    nn.Sequential(Net())(torch.ones(1))
    assert seen[0].function == "forward" and "seen.append" in seen[0].code


def test_frames_from_the_root_on_are_not_looked_at():
    assert places(sys._getframe()) == (None, None)

    def inside():
        return places(sys._getframe(1))

    assert inside()[0].function == "inside"


def test_only_code_of_others_has_a_line_inside_of_the_engine():
    seen = {}

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            seen["own"] = place_in_backward()
            return gradient

    x = torch.ones(2, requires_grad=True)
    Own.apply(x).sum().backward()
    assert seen["own"].function == "backward"


def test_the_line_of_an_optimizer_is_torchs_where_the_user_has_none(monkeypatch):
    seen, root = [], sys._getframe()
    scope = {"seen": seen, "ask": lambda: None, "place_of_optimizer": place_of_optimizer, "root": root}
    exec(compile("def step():\n    seen.append(place_of_optimizer(root))", SGD_FILE, "exec"), scope)
    scope["step"]()
    assert seen[0].file == SGD_FILE and seen[0].line == 2

    def step_by_hand():
        scope["step"]()

    step_by_hand()
    assert seen[1].function == "step_by_hand"


def test_variables_are_found_by_their_storage():
    batch = {"x": torch.ones(2), "n": 3}
    views = [torch.zeros(1), torch.zeros(2)]
    alone = torch.ones(3)
    assert variable_of(batch["x"][:1]) == "batch['x']"
    assert variable_of(views[1]) == "views[1]"
    assert variable_of(alone) == "alone"
    assert variable_of(torch.ones(1)) == ""


def test_owners():
    assert module._owner(torch.nn.functional.__file__) == "torch"
    assert module._owner(module.__file__) == "ours"
    assert module._owner(sys.modules["random"].__file__) == module._owner("<frozen x>") == "library"
    assert module._owner("<eval_with_key>.3") == "torch"
    assert module._owner(module._OURS + "models/arr_coc/model.py") == "library"
    assert module._owner(__file__) == module._owner("<stdin>") == "user"
