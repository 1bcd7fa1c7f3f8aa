"""How far training in fp8 is from bf16 on a small language model, and what the audit says of it afterwards.

    python benchmarks/fp8_training.py [--steps 300]

A Llama of width 64 with two layers learns a random language in which each of 96 words has four successors (entropy
ln 4 = 1.386), in five precisions from the same weights and batches. All linear layers but the head compute in fp8,
emulated on a CPU. Printed: the mean loss of the last 20 updates, and for each layer the errors of its products in fp8
after training in fp32, in units of what rounding has to cost.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import floatline as fl
from floatline.audit.fp8 import what_if

WORDS, SUCCESSORS, ROWS, LENGTH = 96, 4, 16, 48
FP8 = ("fp8-mixed", "fp8-rowwise-mixed", "fp8-rowwise-gw-hp-mixed")
POLICIES = ("32-true", "bf16-mixed", *(f"{name}; model.layers=fp8" for name in FP8))


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, max_position_embeddings=64, **sizes))


def batches(steps: int):
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(0, WORDS, (WORDS, SUCCESSORS), generator=torch.Generator().manual_seed(9))
    for _ in range(steps):
        words = [torch.randint(0, WORDS, (ROWS,), generator=generator)]
        for _ in range(LENGTH):
            words.append(successors[words[-1], torch.randint(0, SUCCESSORS, (ROWS,), generator=generator)])
        yield {"input_ids": (ids := torch.stack(words, 1)), "labels": ids}


def train(policy: str, steps: int) -> tuple[list[float], LlamaForCausalLM]:
    trained = model()
    step = fl.TrainStep(trained, torch.optim.AdamW(trained.parameters(), lr=1e-3), precision=policy)
    return [float(step(batch).loss) for batch in batches(steps)], trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    first = None
    for policy in POLICIES:
        losses, trained = train(policy, steps)
        last = sum(losses[-20:]) / len(losses[-20:])
        first = first or (last, trained)
        print(f"{policy:45} loss {last:.4f}  {last / first[0] - 1:+.2%}")
    batch = list(batches(steps))[-1]
    for row in what_if(first[1], lambda: first[1](**batch).loss):
        units = "  ".join(f"{scheme} {row.excess(scheme)[0]:.2f}" for scheme in ("bf16", "tensor", "row", "block"))
        bare = row.operands["gradient", "fp8-e4m3", "none"].underflow
        print(f"{row.name:32} {row.verdict}  {units}  gradients lost by a bare cast to e4m3 {bare:.0%}")


if __name__ == "__main__":
    main()
