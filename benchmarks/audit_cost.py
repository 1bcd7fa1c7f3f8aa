"""What an audit costs: seconds, forward passes by purpose, joint evaluations of the search.

    python benchmarks/audit_cost.py [--threads 2] [--json FILE]

Two transformers of 12 layers with random weights, `fl.audit(model, batch)` with its defaults (bf16 and fp16, backward
included) for an L4 on this CPU: once healthy, once with a planted fp16 overflow (a hidden layer of one MLP 40,000 or
400,000 times as large, the next matrix as much smaller, so that fp32 does not notice). "search" are the joint
evaluations of a candidate, beside 2 log2(N) + 10 for its N modules. "CPU s" is the time of all threads: with one thread
it is what the audit takes on a machine that has nothing else to do, whatever runs beside it here.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

import floatline as fl
from common import print_table, progress, report

PACKAGES = ("floatline", "torch", "transformers")
PLANTED = 4e4


def gpt2() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """GPT-2 small, 124 M parameters, 1 x 64 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config()).eval(), _tokens(50257)


def llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A Llama of 12 layers, width 512, 1 x 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8000, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), _tokens(8000)


def _tokens(vocabulary: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, vocabulary, (1, 64), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


@torch.no_grad()
def plant(model: torch.nn.Module) -> str:
    """Make one MLP overflow fp16 inside, with the same result in fp32; return the module whose result overflows."""
    named = dict(model.named_modules())
    if "transformer.h.7.mlp" in named:
        named["transformer.h.7.mlp.c_fc"].weight.mul_(PLANTED)
        named["transformer.h.7.mlp.c_proj"].weight.div_(PLANTED)
        return "transformer.h.7.mlp.c_fc"
    named["model.layers.7.mlp.up_proj"].weight.mul_(PLANTED * 10)
    named["model.layers.7.mlp.down_proj"].weight.div_(PLANTED * 10)
    return "model.layers.7.mlp.up_proj"


MODELS = {"gpt2": gpt2, "llama": llama}


def measure(name: str, planted: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Audit one model, and return the row."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    fault = plant(model) if planted else ""
    load, wall, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    found = fl.audit(model, batch, hardware="l4", **settings)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    modules = sum(1 for _ in model.modules())
    return {
        "model": name,
        "planted": fault,
        "parameters": sum(p.numel() for p in model.parameters()),
        "modules": modules,
        "seconds": wall,
        "cpu_seconds": cpu,
        "load": load,
        "passes": dict(found.passes),
        "forward_passes": found.forward_passes,
        "joint": {candidate: len(c.trials) for candidate, c in found.candidates.items()},
        "allowed": int(2 * math.log2(modules) + 10),
        "policies": {candidate: c.policy for candidate, c in found.candidates.items()},
        "found": not fault or any(row.module == fault and row.failure == "range" for row in found.failures),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--planted", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for name in given.models:
        for planted in {"no": (False,), "yes": (True,), "both": (False, True)}[given.planted]:
            progress(f"{name}{', planted' if planted else ''}")
            rows.append(measure(name, planted, {}))
    print_table(
        ["model", "planted", "modules", "s", "CPU s", "load", "passes", "by purpose", "search", "allowed", "policies"],
        [[
            r["model"], (r["planted"] + ("" if r["found"] else " MISSED")) or "-", str(r["modules"]),
            f"{r['seconds']:.1f}", f"{r['cpu_seconds']:.1f}", f"{r['load']:.1f}", str(r["forward_passes"]),
            ", ".join(f"{k} {v}" for k, v in r["passes"].items()),
            " / ".join(str(v) for v in r["joint"].values()), str(r["allowed"]),
            " / ".join(str(p) for p in r["policies"].values()),
        ] for r in rows],
    )  # fmt: skip
    report(rows, PACKAGES, given.json, threads=given.threads)


if __name__ == "__main__":
    main()
