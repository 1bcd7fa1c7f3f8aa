"""How far the planner is off on a CUDA machine, and whether what it says to fit does fit. One command there:

    python benchmarks/plan_accuracy_cuda.py
    python benchmarks/plan_accuracy_cuda.py --only gpt2 --no-cards
    python benchmarks/plan_accuracy_cuda.py --rehearse t4        # no GPU: the estimates alone

It writes benchmarks/results/plan_cuda_GPU_DATE.json; tests/plan/test_recorded_cuda.py holds the planner against every
such file from then on, on any machine.

    rows     each setting in a fresh process: max_memory_allocated and max_memory_reserved of a few updates, against the
             estimate for the detected card. Held to: allocated median 2 %, worst 6 %; reserved median 5 %
    cards    16 GB and 40 GB imitated with set_per_process_memory_fraction, on a larger card: what is said to fit must
             run, what is over by more than the band must not; where it does not fit, the plan that does must run

"outside" is what the card has in use beyond this process's allocator, as the driver tells it: context, libraries, and
other processes, so have the card to yourself. Before the first update the cache is emptied: what building the model
left there is not the run's. Exit status 1: a limit is missed, a verdict was wrong, or a row failed.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from clean_process import Failed, in_clean_process
from common import print_table, progress, report
from cuda_record import (
    LIMITS,
    Setting,
    contradiction,
    error,
    figures,
    hardware_facts,
    missed,
    summary,
    work_of,
)
from floatline.hardware import Hardware, resolve

PACKAGES = ("floatline", "torch", "transformers", "torchao", "peft", "triton", "bitsandbytes")
RESULTS = Path(__file__).parent / "results"
GIB = 2**30
UPDATES, MOST_UPDATES = 3, 14
SHARE_TRIED = 0.92
"""Settings whose estimate is over this share of the card are not run as rows: they are no measurement of a peak."""
CARDS = {"16 GB": ("v100-16gb", 16), "40 GB": ("a100-40gb", 40)}
"""Imitated card -> the catalog entry whose memory it has."""

GPT2, LLAMA, VL = ("gpt2", {"batch": 8, "seq": 1024}), ("llama-3.2-1b", {"batch": 2, "seq": 2048}), "qwen3-vl-2b"
QWEN = ("qwen2.5-0.5b", {"batch": 4, "seq": 1024})
THRIFTY = ("checkpointing", "chunked_loss")


def _setting(workload: tuple[str, dict[str, Any]], precision: str = "half-mixed", *techniques: str) -> Setting:
    clip = None if "optimizer_in_backward" in techniques else 1.0
    return Setting(model=workload[0], shape=workload[1], precision=precision, techniques=techniques, max_grad_norm=clip)


SETTINGS = [
    *(_setting(GPT2, precision) for precision in ("32-true", "half-mixed", "16-mixed", "half-true")),
    _setting(GPT2, "half-mixed", "checkpointing"),
    _setting(GPT2, "half-mixed", "checkpointing(keep='matmul')"),
    _setting(GPT2, "half-mixed", "attention(kernel='math')"),
    _setting(GPT2, "half-mixed", "offload"),
    _setting(("bert-large", {"batch": 8, "seq": 512})),
    _setting(("roberta-base", {"batch": 16, "seq": 256}), "32-true"),
    _setting(("modernbert-base", {"batch": 8, "seq": 512})),
    _setting(QWEN),
    *(
        _setting(QWEN, "half-mixed", technique)
        for technique in ("chunked_loss", "accumulation(micro_batches=4)", "low_bit_optimizer", "optimizer_offload")
    ),
    *(_setting(QWEN, "bf16-true", technique) for technique in ("kahan", "stochastic_rounding")),
    _setting(QWEN, "32-true", "optimizer_in_backward"),
    _setting(LLAMA, "bf16-true", *THRIFTY),
    _setting(LLAMA, "bf16-true", "checkpointing"),
    _setting(LLAMA, "half-true", "checkpointing", "lora(rank=16)"),
    _setting(("smollm2-360m", {"batch": 4, "seq": 2048})),
    _setting(("gemma-2-2b", {"batch": 1, "seq": 1024}), "half-true", "lora(rank=16)", *THRIFTY),
    _setting(("t5-base", {"batch": 8, "seq": 512, "target": 128})),
    _setting(("bart-large", {"batch": 4, "seq": 512, "target": 128})),
    _setting(("vit-large", {"batch": 32})),
    _setting(("swin-base", {"batch": 32})),
    _setting(("convnext-base", {"batch": 32})),
    _setting(("resnet-50", {"batch": 64})),
    _setting(("resnet-50", {"batch": 64}), "32-true"),
    _setting(("clip-vit-large", {"batch": 16})),
    _setting(("whisper-small", {"batch": 4, "seq": 128})),
    _setting(("wav2vec2-base", {"batch": 4, "seconds": 10.0})),
    _setting(("smolvlm-256m", {"batch": 2, "image": (512, 512)})),
    _setting((VL, {"batch": 1, "image": (1024, 1024)}), "half-true", *THRIFTY, "lora(rank=16)"),
    _setting((VL, {"batch": 1, "image": (1024, 1024)}), "bf16-true", *THRIFTY),
]
ON_CARDS = [
    *(_setting(("gpt2-medium", {"batch": rows, "seq": 1024})) for rows in (4, 8, 16, 32)),
    *(_setting(("vit-large", {"batch": rows})) for rows in (32, 64, 128, 256)),
    *(_setting(("bert-large", {"batch": rows, "seq": 512})) for rows in (8, 16, 32, 64)),
    *(_setting(("llama-3.2-1b", {"batch": rows, "seq": 2048}), "bf16-true", *THRIFTY) for rows in (1, 4, 16)),
    _setting(("llama-3.2-1b", {"batch": 4, "seq": 2048})),
    _setting(("gpt2-xl", {"batch": 2, "seq": 1024})),
    _setting((VL, {"batch": 2, "image": (1024, 1024)})),
]


# ---------------------------------------------------------------------------------------------------------------------
# On the GPU, in a process of its own


def train_on_gpu(setting: Setting, allowed: int | None = None) -> dict[str, int] | None:
    """Run updates and return the peaks in bytes; None where memory ran out.

    Args:
        setting: What is trained.
        allowed: Bytes that the caching allocator may reserve; None for all there is.
    """
    device = torch.device("cuda", 0)
    if allowed is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)
    try:
        _updates(setting, device)
    except torch.OutOfMemoryError:
        return None
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "outside": total - free - torch.cuda.memory_reserved(device),
    }


def _updates(setting: Setting, device: torch.device) -> None:
    from floatline.step import TrainStep
    from floatline.step.batch import move

    work = work_of(setting)
    step = TrainStep(
        work.build_model().to(device), work.optimizer, setting.precision, work.loss, setting.max_grad_norm,
        techniques=setting.techniques,
    )  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    batch = work.build_batch()
    batch = [move(part, device) for part in batch] if isinstance(batch, list) else move(batch, device)
    applied = 0
    for _ in range(MOST_UPDATES):  # the first ones of 16-mixed find a loss scale
        applied += bool(step(batch).applied)
        if applied == UPDATES:
            break
    else:
        raise RuntimeError(f"{applied} of {MOST_UPDATES} updates were applied")
    torch.cuda.synchronize(device)


def detected() -> Hardware | None:
    """Return the facts of the card, asked in a process of its own; None without one."""
    return resolve("auto") if torch.cuda.is_available() else None


def planned(setting: Setting, hardware: Hardware) -> Setting | None:
    """Return the setting with the techniques of the plan that fits; None where there is none."""
    import floatline as fl

    torch.set_num_threads(1)
    found = fl.plan(
        work_of(setting), hardware, precision=setting.precision, techniques=setting.techniques, advice=False,
        max_grad_norm=setting.max_grad_norm,
    )  # fmt: skip
    return replace(setting, techniques=found.techniques) if found.fits else None


# ---------------------------------------------------------------------------------------------------------------------
# Rows

Train = Callable[..., dict[str, int] | None]


def isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` called in a fresh process each time."""
    return lambda *given: in_clean_process(function, *given, limit=900)


def accuracy_row(setting: Setting, hardware: Hardware, train: Train | None) -> dict[str, Any]:
    """Return one setting's estimate and, with `train`, its measured peaks."""
    row: dict[str, Any] = {"setting": asdict(setting), "said": {}, "measured": {}, "failure": "", "skipped": ""}
    try:
        began = time.perf_counter()
        row["said"] = isolated(figures)(setting, hardware)
        row["seconds"] = round(time.perf_counter() - began, 2)
        needed = row["said"]["needed"]
        if needed > SHARE_TRIED * hardware.memory:
            row["skipped"] = f"needs {needed / GIB:.1f} GiB of {hardware.memory / GIB:.1f}"
        elif train is not None:
            row["measured"] = train(setting) or {}
            row["failure"] = "" if row["measured"] else "ran out of memory"
    except Failed as failed:
        row["failure"] = str(failed)
    return row


def imitated(hardware: Hardware, name: str) -> Hardware:
    """Return the detected card with a smaller one's memory."""
    entry, _ = CARDS[name]
    return replace(hardware, name=f"{hardware.name} as {name}", memory=resolve(entry).memory)


def card_rows(setting: Setting, card: Hardware, train: Train | None) -> list[dict[str, Any]]:
    """Return the row of a setting on an imitated card and, where it does not fit, that of the plan that does."""
    first = _card_row(setting, card, train, "")
    if first["failure"] or first["said"]["verdict"] != "does not fit":
        return [first]
    try:
        thrifty = isolated(planned)(setting, card)
    except Failed as failed:
        return [first, {**first, "plan": True, "said": {}, "ran": None, "failure": f"plan: {failed}"}]
    return [first] if thrifty is None else [first, _card_row(thrifty, card, train, "plan")]


def _card_row(setting: Setting, card: Hardware, train: Train | None, kind: str) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": asdict(setting), "card": hardware_facts(card), "plan": kind == "plan",
                           "said": {}, "ran": None, "failure": "", "contradiction": ""}  # fmt: skip
    try:
        row["said"] = isolated(figures)(setting, card)
        if train is not None:
            row["ran"] = train(setting, card.memory - card.context) is not None
            row["contradiction"] = contradiction(row)
    except Failed as failed:
        row["failure"] = str(failed)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Output


def print_rows(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        said, measured = row["said"], row["measured"]
        line = [Setting(**row["setting"]).name, *(_gib(said, key) for key in ("allocated", "reserved"))]
        if measured:
            line += [_gib(measured, "allocated"), f"{error(row, 'allocated'):+.2%}", _gib(measured, "reserved"),
                     f"{error(row, 'reserved'):+.2%}", _gib(measured, "outside")]  # fmt: skip
        lines.append([*line, row["failure"] or row["skipped"]])
    header = ("setting", "said alloc", "said res", "alloc GiB", "error", "res GiB", "error", "outside", "")
    print_table(header, [[*line[:-1], *("-" for _ in range(len(header) - len(line))), line[-1]] for line in lines])


def _gib(facts: dict[str, Any], key: str) -> str:
    return f"{facts[key] / GIB:.2f}" if key in facts else "-"


def print_cards(rows: list[dict[str, Any]]) -> None:
    lines = [
        [
            ("plan: " if row["plan"] else "") + Setting(**row["setting"]).name,
            row["card"]["name"].rpartition(" as ")[2],
            _gib(row["said"], "needed"),
            row["said"].get("verdict", "-"),
            {None: "-", True: "ran", False: "out of memory"}[row["ran"]],
            row["failure"] or row["contradiction"],
        ]
        for row in rows
    ]
    print_table(("setting", "card", "needs GiB", "said", "", ""), lines)


def slug(name: str) -> str:
    """Return a GPU's name for a file name.

    >>> slug("NVIDIA A100-SXM4-40GB"), slug("Tesla T4")
    ('a100-sxm4-40gb', 'tesla-t4')
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia").strip()).strip("-")


def chosen(settings: list[Setting], words: list[str] | None, hardware: Hardware) -> list[Setting]:
    """Return the settings in which one of the words occurs, for a card; each once, and none in a format it lacks."""
    bf16 = (hardware.capability or (0, 0)) >= (8, 0)
    found = [setting.on(hardware) for setting in settings if bf16 or "bf16" not in setting.precision]
    kept = [setting for setting in found if not words or any(word in setting.name for word in words)]
    return list({setting.name: setting for setting in kept}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="settings in whose name one of these occurs")
    parser.add_argument("--no-cards", action="store_true", help="leave the imitated cards out")
    parser.add_argument("--rehearse", metavar="GPU", help="print the estimates for a GPU of the catalog; needs none")
    parser.add_argument("--json", type=Path, help="where the record goes (default: benchmarks/results)")
    options = parser.parse_args()
    # asked in another process: a forked one can use CUDA only where the parent has not
    hardware = resolve(options.rehearse) if options.rehearse else in_clean_process(detected)
    if hardware is None:
        raise SystemExit("torch sees no CUDA device here; --rehearse t4 prints the estimates without one")
    train = None if options.rehearse else isolated(train_on_gpu)
    rows, cards = [], []
    for setting in chosen(SETTINGS, options.only, hardware):
        progress(setting.name)
        rows.append(accuracy_row(setting, hardware, train))
    for name, (_, gigabytes) in {} if options.no_cards else CARDS.items():
        card = imitated(hardware, name)
        if card.memory > 0.95 * hardware.memory:
            print(f"{name} is not imitated: the card has {hardware.memory / GIB:.1f} GiB itself")
            continue
        for setting in chosen(ON_CARDS, options.only, hardware):
            progress(f"{gigabytes} GB: {setting.name}")
            cards += card_rows(setting, card, train)
    progress("")
    print_rows(rows)
    print()
    print_cards(cards)
    raise SystemExit(conclude(rows, cards, hardware, options.json, rehearsal=bool(options.rehearse)))


def conclude(
    rows: list[dict[str, Any]], cards: list[dict[str, Any]], hardware: Hardware, path: Path | None, *, rehearsal: bool
) -> int:
    """Print the summary, write the record, and return the exit status."""
    found = summary(rows)
    wrong = [*missed(found), *(row["contradiction"] for row in cards if row.get("contradiction"))]
    wrong += [row["failure"] for row in (*rows, *cards) if row["failure"]]
    print("\n" + ", ".join(f"{name} {value:.2%}" for name, value in found.items()))
    print("limits: " + ", ".join(f"{name} {limit:.0%}" for name, limit in LIMITS.items()))
    print("\n".join(wrong) or ("nothing is missed" if found else "nothing was measured"))
    default = None if rehearsal else RESULTS / f"plan_cuda_{slug(hardware.name)}_{time.strftime('%Y-%m-%d')}.json"
    more = {"hardware": hardware_facts(hardware), "cuda": torch.version.cuda, "summary": found, "cards": cards}
    report(rows, PACKAGES, path or default, **more)
    return int(bool(wrong))


if __name__ == "__main__":
    main()
