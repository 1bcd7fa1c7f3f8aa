"""What stands in the report beside curves: the tiles of the head, the data, the machine. Plain values, no markup."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from floatline.report.load import RunData
from floatline.report.records import as_list, as_mapping, as_number, as_text
from floatline.report.summary import Summary, interval_text
from floatline.report.units import DASH, bytes_text, count_text, number_text, percent_text, seconds_text, times


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One headline number: what it is, its value, what else to know; `tone` is good, bad, warn or empty."""

    name: str
    value: str
    small: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of the data and the samples that were left out of it, as (where, reason)."""

    name: str
    samples: str
    skipped: int
    listed: tuple[tuple[str, str], ...]


def tiles(run: RunData, summary: Summary) -> list[Tile]:
    """Return the headline numbers in the order they are asked for; what the run does not know has a dash.

    Args:
        run: The run.
        summary: Its numbers.

    Returns:
        The tiles.
    """
    best = ""
    if summary.best_validation_step is not None:
        best = f"best {number_text(summary.best_validation_loss)} at update {summary.best_validation_step}"
    spread = f"95 % of updates under {seconds_text(summary.step_p95)}" if math.isfinite(summary.step_p95) else ""
    result = [
        *_accuracy_tiles(summary),
        Tile(name="validation loss", value=number_text(summary.validation_loss), small=best),
        Tile(name="train loss", value=number_text(summary.train_loss), small="mean of the last updates"),
        Tile(name="time", value=seconds_text(summary.seconds), small=f"{count_text(summary.updates)} updates"),
        Tile(name="median update", value=seconds_text(summary.step_median), small=spread),
        Tile(name="tokens per second", value=count_text(summary.tokens_per_s), small="median"),
        Tile(name="peak memory", value=bytes_text(summary.peak_memory)),
        Tile(name="precision", value=summary.precision or DASH),
        _skipped_tile(summary),
    ]
    return [replace(tile, small="") if tile.value == DASH and tile.name != "accuracy" else tile for tile in result]


def _accuracy_tiles(summary: Summary) -> list[Tile]:
    final = summary.final
    if final is None:
        return [Tile(name="accuracy", value=DASH, small="no evaluation yet")]
    answers = summary.answers
    small = f"{answers.correct} of {answers.total} right; 95 % interval {interval_text(answers)}" if answers else ""
    result = [Tile(name=f"{final.split} accuracy", value=percent_text(final.accuracy), small=small)]
    if len(final.groups) > 1 or not answers:
        for kind, tally in final.groups.items():
            result.append(
                Tile(
                    name=f"{kind} questions", value=percent_text(tally.share), small=f"{tally.correct} of {tally.total}"
                )
            )
    return result


def _skipped_tile(summary: Summary) -> Tile:
    if not summary.updates:
        return Tile(name="skipped updates", value=DASH)
    small = ", ".join(
        text
        for count, text in (
            (summary.faults, times(summary.faults, "fault")),
            (summary.overflows, f"{times(summary.overflows, 'overflow')} (routine)"),
        )
        if count
    )
    tone = "bad" if summary.faults else "" if summary.skipped else "good"
    return Tile(name="skipped updates", value=str(summary.skipped), small=small or "all updates finite", tone=tone)


def splits(run: RunData) -> list[Split]:
    """Return what run.json says of the data.

    Args:
        run: The run.

    Returns:
        One entry a split, empty when nothing is recorded.
    """
    result = []
    for name, split in as_mapping(run.info.get("data")).items():
        skipped = as_mapping(split).get("skipped")
        listed = [as_mapping(item) for item in as_list(skipped)]
        result.append(
            Split(
                name=str(name),
                samples=count_text(as_number(as_mapping(split).get("samples"))),
                skipped=len(listed),
                listed=tuple((_where(item), as_text(item.get("reason"))) for item in listed),
            )
        )
    return result


def _where(item: Mapping[str, Any]) -> str:
    line = item.get("line")
    return f"{as_text(item.get('file'))}:{line}" if line is not None else as_text(item.get("file"))


def _moment(value: object) -> str:
    try:
        return f"{datetime.fromisoformat(as_text(value)):%Y-%m-%d %H:%M:%S %Z}".strip()
    except ValueError:
        return as_text(value)


def facts(run: RunData) -> list[tuple[str, str]]:
    """Return command, machine, versions and model size as (name, text).

    Args:
        run: The run.

    Returns:
        What is known of them.
    """
    info = run.info
    machine = as_mapping(info.get("machine"))
    parameters = as_mapping(info.get("parameters"))
    cores = as_number(machine.get("cores"))
    memory = as_number(machine.get("memory_bytes"))
    hardware = [
        as_text(machine.get("name") or machine.get("device")),
        f"{cores:.0f} cores" if math.isfinite(cores) else "",
        f"{bytes_text(memory)} memory" if math.isfinite(memory) else "",
    ]
    total, trainable = (as_number(parameters.get(key)) for key in ("total", "trainable"))
    size = f"{count_text(total)} in all, {count_text(trainable)} trained" if math.isfinite(total) else ""
    resumed = [
        f"at update {as_text(as_mapping(item).get('at_step'))} ({_moment(as_mapping(item).get('time'))})"
        for item in as_list(info.get("resumed"))
    ]
    result = as_mapping(info.get("result"))
    best = f"{as_text(result.get('metric'))} {number_text(as_number(result.get('value')))}" if result else ""
    rows = [
        ("command", as_text(info.get("command"))),
        ("directory", run.name),
        ("started", _moment(info.get("started"))),
        ("finished", _moment(info.get("finished"))),
        ("resumed", "; ".join(resumed)),
        ("best checkpoint", f"update {as_text(result.get('best_step'))}, {best}" if best else ""),
        ("parameters", size),
        ("machine", ", ".join(part for part in hardware if part)),
        ("device", as_text(machine.get("device"))),
        *((str(name), as_text(version)) for name, version in as_mapping(info.get("versions")).items()),
    ]
    return [(name, text) for name, text in rows if text]
