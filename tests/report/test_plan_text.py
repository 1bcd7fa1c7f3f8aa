"""A plan as text: the whole of it against files, and what depends on the answer one by one."""

from dataclasses import replace

import pytest
import yaml

from floatline.errors import ConfigError
from floatline.plan.fit import fit_of
from floatline.report.plan_sections import headline, notes, odds, sections
from floatline.report.plan_text import comparison_text, plan_text

from . import plans
from .test_text import check


def test_a_plan_that_fits() -> None:
    check("plan_fits.txt", plan_text(plans.report()))


def test_a_plan_that_does_not() -> None:
    check("plan_too_large.txt", plan_text(plans.report(18.0)))


def test_all_gpus() -> None:
    check("plan_all.txt", comparison_text(plans.comparison()))


@pytest.mark.parametrize(
    ("gib", "verdict", "room"),
    [
        (10.0, "fits", "4.56 GiB spare."),
        (14.25, "tight", "317 MiB spare, 298 MiB of it kept for surprises."),
        (14.5, "does not fit", "61.4 MiB spare, 298 MiB of it kept for surprises."),
        (18.0, "does not fit", "3.44 GiB too much."),
    ],
)
def test_the_headline_has_verdict_and_margin(gib: float, verdict: str, room: str) -> None:
    said = headline(plans.report(gib))
    assert said.endswith(f"{verdict}, {room}") and "of 14.6 GiB on t4" in said


@pytest.mark.parametrize(("gib", "chance"), [(5.0, "over 99.9 %"), (18.0, "under 0.1 %")])
def test_odds_are_never_certain(gib: float, chance: str) -> None:
    said = odds(plans.report(gib))
    assert said.endswith(f"free is {chance}.")


def test_the_table_tells_both_figures_where_the_allocator_gives_back() -> None:
    table = next(section for section in sections(plans.report()) if section.name == "components")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["in all"][2] == "30.0 GiB" and rows["needs, at least"][2] == "29.0 GiB"
    assert rows["verdict"] == ("fits", "fits", "does not fit", "tight")
    assert list(rows)[-1] == "verdict" and table.headings[1:3] == ("inference, 32-true", "inference, 16-true")


def test_the_ladder_marks_first_fit_dropped_rungs_and_the_plan() -> None:
    ladder = next(section for section in sections(plans.report()) if section.name == "ladder")
    marks = {row[0]: row[-1] for row in ladder.rows}
    assert marks["+\u00a0chunked_loss"] == "saves too little: left out again"
    assert marks["+\u00a0accumulation(micro_batches=32)"] == "first fit"
    assert marks["the plan: accumulation(micro_batches=4)"] == "what is not needed taken off"
    saved = {row[0]: row[2] for row in ladder.rows}
    assert saved["+\u00a0accumulation(micro_batches=32)"] == "16.0 GiB"  # against the plain step, not the dropped rung


def test_a_technique_that_takes_more_is_shown_as_such() -> None:
    report = plans.report()
    assert report.plan is not None
    worse = plans.estimate(25, report.hardware)
    rungs = (report.plan.ladder[0], replace(report.plan.ladder[1], estimate=worse))
    ladder = next(section for section in sections(replace(report, plan=replace(report.plan, ladder=rungs)))
                  if section.name == "ladder")  # fmt: skip
    assert ladder.rows[1][2] == "-3.00 GiB"


def test_equal_reasons_are_told_once() -> None:
    rejected = next(section for section in sections(plans.report()) if section.name == "rejected")
    assert ("offload, checkpointing", "not needed, the run fits without it") in rejected.rows


def test_inference_has_no_ladder_and_no_recipe() -> None:
    report = plans.report()
    plain = replace(report, plan=None, settings={}, estimate=replace(report.estimate, mode="inference"))
    text = plan_text(plain)
    assert "ladder" not in text and "recipe" not in text and "a forward by a roofline" in text
    with pytest.raises(ConfigError, match="cannot be exported as 'trainer'"):
        plan_text(plain, export="trainer")


def test_settings_of_other_programs_instead_of_the_recipe() -> None:
    text = plan_text(plans.report(), export="trainer")
    block = text.partition("transformers TrainingArguments\n")[2]
    assert yaml.safe_load(block) == {"fp16": True, "gradient_accumulation_steps": 4}
    assert "The recipe's part" not in text


def test_what_another_program_cannot_say_stands_below_its_settings() -> None:
    gaps = {"trainer": {"chunked_loss": "use Floatline's step"}}
    text = plan_text(replace(plans.report(), gaps=gaps), export="trainer")
    assert text.endswith("# it has no setting for:\n# chunked_loss: use Floatline's step\n")
    assert "# none: the plan does not shard" in plan_text(replace(plans.report(), settings={"fsdp": {}}), export="fsdp")


def test_an_export_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="exported as 'trainr'") as raised:
        plan_text(plans.report(), export="trainr")
    assert raised.value.hint == "did you mean 'trainer'?"


def test_the_recipe_is_yaml_that_is_never_folded() -> None:
    report = plans.report()
    block = plan_text(report, width=40).partition("The recipe's part, for `floatline train`\n")[2]
    assert report.plan is not None and yaml.safe_load(block) == report.plan.recipe()


def test_host_memory_and_a_peak_out_of_view_are_told() -> None:
    report = plans.report()
    more = replace(report.estimate, host_peak=2**30, peak_allocated=2 * report.estimate.peak_allocated)
    said = " ".join(notes(replace(report, estimate=more)))
    assert "1.00 GiB of host memory" in said and "before the update that is shown" in said
    assert "host memory" not in " ".join(notes(report)) and "before" not in " ".join(notes(report))


def test_lines_keep_to_the_width_and_nothing_commands_a_terminal() -> None:
    evil = plans.estimate(10, plans.lookup("t4"), timeline=plans.timeline(2**33, module="\x1b[31mred[bold]" * 9))
    text = plan_text(replace(plans.report(), estimate=evil, settings={}))
    body = text.partition("The recipe's part")[0]
    assert max(map(len, body.splitlines())) <= 110
    assert all(char.isprintable() or char == "\n" for char in text) and "[bold]" in text


def test_nothing_fits_anywhere() -> None:
    found = plans.comparison()
    none = replace(found, rows=(replace(found.rows[0]), replace(found.rows[1])))
    assert comparison_text(none).startswith("tiny-gpt fits on no GPU of the catalog.\n")


def test_a_fit_under_pressure_is_what_counts() -> None:
    report = plans.report()
    pressed = replace(report.estimate, peak_total=15 * 2**30, fit=fit_of(13 * 2**30, 10 * 2**30, report.hardware))
    assert headline(replace(report, estimate=pressed)).startswith("tiny-gpt needs 13.0 GiB of 14.6 GiB on t4: fits")
