"""Run directories as training writes them, without training: seeded, quick, with tiny pictures."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

MakeRun = Callable[..., Path]


def recipe(precision: str = "bf16-mixed", **train: Any) -> dict[str, Any]:
    return {
        "model": {"path": "models/tiny-qwen3-vl"},
        "data": {"train": "data/train.jsonl", "on_bad_sample": "skip"},
        "precision": precision,
        "hardware": "auto",
        "techniques": {},
        "train": {"lr": 0.002, "batch_size": 32, "schedule": "cosine", "max_grad_norm": 1.0, "seed": 0, **train},
        "eval": {"every": 100},
        "guard": {"max_faults_in_a_row": 5},
        "run": {"dir": "runs/digits"},
    }


def run_info(**changes: Any) -> dict[str, Any]:
    skipped = [{"file": "data/train.jsonl", "line": 17, "reason": "the image scene-17.png cannot be read"}]
    info = {
        "status": "finished",
        "started": "2026-03-01T10:00:00+00:00",
        "finished": "2026-03-01T10:02:05+00:00",
        "seconds": 125.3,
        "command": "floatline train examples/digits/recipe.yaml",
        "versions": {"floatline": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "transformers": "5.1.0"},
        "machine": {"device": "cpu", "name": "AMD EPYC", "cores": 2, "memory_bytes": 8 * 2**30},
        "choices": [
            {"key": "precision", "value": "bf16-mixed", "reason": "this CPU multiplies bfloat16 (avx512_bf16)"},
            {"key": "attention", "value": "sdpa", "reason": "torch picks the fastest kernel that is legal here"},
        ],
        "data": {
            "train": {"samples": 3999, "skipped": skipped},
            "validation": {"samples": 400, "skipped": []},
            "test": {"samples": 400, "skipped": []},
        },
        "parameters": {"total": 1_437_824, "trainable": 1_437_824},
        "peak_memory_bytes": 812 * 2**20,
        "result": {"best_step": 900, "metric": "validation accuracy", "value": 0.975},
        "resumed": [],
        "error": None,
    }
    return info | changes


def step_line(step: int, of: int, chance: random.Random, *, slower: float = 1.0) -> dict[str, Any]:
    course = 0.04 + 2.3 / (1 + math.exp(9 * (step / of - 0.35)))
    seconds = (0.11 + 0.01 * abs(chance.gauss(0, 1)) + (0.15 if chance.random() < 0.01 else 0)) * slower
    seconds += 1.8 if step == 1 else 0
    return {
        "kind": "step",
        "step": step,
        "epoch": step / 125,
        "loss": course * math.exp(chance.gauss(0, 0.25)),
        "grad_norm": (0.25 + course) * math.exp(chance.gauss(0, 0.4)),
        "lr": 0.002 * min(step / (0.1 * of), 0.5 + 0.5 * math.cos(math.pi * step / of)),
        "loss_scale": None,
        "applied": True,
        "samples": 32,
        "target_tokens": 64,
        "tokens": 900,
        "step_s": seconds,
        "tokens_per_s": 900 / seconds,
        "memory_bytes": int((640 + 172 * min(step / 40, 1)) * 2**20),
    }


def eval_line(step: int, of: int, split: str = "validation", total: int = 400) -> dict[str, Any]:
    share = 1 / (1 + math.exp(-9 * (step / of - 0.45)))
    digit, count = int(0.97 * share * total * 0.75), int(min(1.0, 1.1 * share) * total * 0.25)
    groups = {
        "digit": {"correct": digit, "total": int(total * 0.75)},
        "count": {"correct": count, "total": int(total * 0.25)},
    }
    accuracy = (digit + count) / total
    loss = 0.06 + 2.2 * (1 - share)
    head = {"kind": "eval", "step": step, "split": split, "loss": loss, "accuracy": accuracy}
    return {**head, "groups": groups, "samples": total, "seconds": 3.2}


def fault_line(step: int, what: str = "loss", reason: str = "") -> dict[str, Any]:
    reason = reason or f"the {what} was nan at update {step}"
    return {"kind": "fault", "step": step, "what": what, "action": "skip", "reason": reason}


def lines(steps: int, *, fp16: bool = False, seed: int = 0, slower: float = 1.0) -> list[dict[str, Any]]:
    """Metrics of a run that went well: an evaluation every tenth, a test at the end, fp16 with two overflows."""
    chance = random.Random(seed)
    result = []
    for step in range(1, steps + 1):
        line = step_line(step, steps, chance, slower=slower)
        if fp16:
            line["loss_scale"] = 65536.0 / 2 ** min(step - 1, 2) * 2 ** (step // max(steps // 3, 1))
            if step <= 2:
                line |= {"applied": False, "grad_norm": math.inf}
                result.append(fault_line(step, "overflow", "scaled fp16 gradients overflowed"))
        result.append(line)
        if step % max(steps // 10, 1) == 0:
            result.append(eval_line(step, steps))
    result.append(eval_line(steps, steps, "test"))
    return result


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def draw(path: Path, seed: int, size: tuple[int, int] = (32, 16)) -> Path:
    chance = random.Random(seed)
    image = Image.new("L", size)
    for x in range(size[0]):
        for y in range(size[1]):
            near = abs(math.hypot(x % 16 - 8, y - 8) - 4 - seed % 3)
            image.putpixel((x, y), max(0, int(240 - 110 * near + chance.randint(-15, 15))))
    image.save(path)
    return path


def sample_lines(folder: Path, count: int = 24) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    result = []
    for index in range(count):
        draw(folder / f"scene-{index}.png", index)
        right = index % 6 != 0
        counting = index % 4 == 3
        truth = "2" if counting else str(index % 10)
        result.append(
            {
                "images": [f"images/scene-{index}.png"],
                "question": "How many digits are there?" if counting else "Which digit is on the left?",
                "answer": truth if right else str((index + 3) % 10),
                "truth": truth,
                "correct": right,
                "kind": "count" if counting else "digit",
            }
        )
    return result


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run directory; `records=None` writes 200 updates, other parts may be left out."""

    def make(
        name: str = "digits",
        *,
        records: list[dict[str, Any]] | None = None,
        precision: str = "bf16-mixed",
        info: dict[str, Any] | None = None,
        samples: list[dict[str, Any]] | int = 6,
        leave_out: tuple[str, ...] = (),
    ) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        write_lines(path / "metrics.jsonl", lines(200) if records is None else records)
        (path / "recipe.yaml").write_text(yaml.safe_dump(recipe(precision), sort_keys=False))
        (path / "run.json").write_text(json.dumps(run_info(**(info or {}))))
        shown = sample_lines(path / "images", samples) if isinstance(samples, int) else samples
        write_lines(path / "samples.jsonl", shown)
        for file in leave_out:
            (path / file).unlink()
        return path

    return make
