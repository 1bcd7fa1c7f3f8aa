"""Memory and speed techniques, one file each, all of one shape (base.py).

    import floatline as fl

    step = fl.TrainStep(model, optimizer, techniques=[fl.techniques.Checkpointing(every=2), "offload"])

A file here is a technique, but for a few: `base.py` is their shape, `registry.py` knows them by name, `stack.py` puts
several on one model, `layers.py` finds a model's repeated layers; `attention_hf.py`, `checkpointing_buffers.py`,
`compile_watch.py` and `offload_stash.py` belong to the technique that their name begins with. What several share, or
one is made of, lies in folders:

    batches/      rows, token counts, length buckets, packing rules, a sampler with a token budget
    logits/       the output head, logits that are not there yet, cross-entropy in chunks
    adapters/     LoRA's layers, and how adapters are saved, loaded and merged
    optim_steps/  steps of some parameters only, in fp32 on half weights, with low-bit state
    distributed/  groups of processes, what ranks tell each other, shards

`TokenBudgetSampler` and `padding_report` are for the data's side of batching; `save_adapter`, `merge` and others for
what LoRA has learnt.
"""

from importlib import import_module
from typing import Any

from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.distributed.groups import fake_ranks
from floatline.techniques.distributed.ranks import OneRank, RankGroup
from floatline.techniques.registry import HOMES, make_technique, technique_class
from floatline.techniques.stack import Stack

_CLASSES = {home.split(".")[1]: home.split(".")[0] for home in HOMES.values()}
_CLASSES |= {
    "TokenBudgetSampler": "batches.sampler",
    "PaddingReport": "batches.padding",
    "padding_report": "batches.padding",
    **dict.fromkeys(("adapter_state", "load_adapter", "merge", "plain_state_dict", "save_adapter"), "adapters.state"),
}

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
