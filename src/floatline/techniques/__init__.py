"""Memory and speed techniques, one file each, all of one shape (base.py).

    import floatline as fl

    step = fl.TrainStep(model, optimizer, techniques=[fl.techniques.Checkpointing(every=2), "offload"])

`registry.py` knows them by name, `stack.py` puts several on one model, `layers.py` finds a model's repeated layers.
`TokenBudgetSampler` and `padding_report` are for the data's side of batching.
"""

from importlib import import_module
from typing import Any

from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.groups import fake_ranks
from floatline.techniques.ranks import OneRank, RankGroup
from floatline.techniques.registry import HOMES, make_technique, technique_class
from floatline.techniques.stack import Stack

_CLASSES = {home.split(".")[1]: home.split(".")[0] for home in HOMES.values()}
_CLASSES |= {"TokenBudgetSampler": "sampler", "PaddingReport": "padding", "padding_report": "padding"}

__all__ = [
    "HOMES",
    "Applied",
    "OneRank",
    "RankGroup",
    "Stack",
    "Stage",
    "Technique",
    "fake_ranks",
    "make_technique",
    "technique_class",
]


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module 'floatline.techniques' has no attribute {name!r}")
    return getattr(import_module(f"floatline.techniques.{_CLASSES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_CLASSES])
