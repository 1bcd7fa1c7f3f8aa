"""An audit as text: the whole of it against a file, and what depends on the answer one by one."""

import math

import pytest

from floatline.report.audit_sections import front_points, ops_section, sections, updates_section
from floatline.report.audit_sentences import headline, lists
from floatline.report.audit_text import audit_text
from floatline.report.audit_words import alike, error_text, grouped, short_op

from . import audits
from .test_text import check


def section(name: str, **changes):
    return next(s for s in sections(audits.report(**changes)) if s.name == name)


def test_an_audit() -> None:
    check("audit.txt", audit_text(audits.report()))


def test_an_audit_in_which_nothing_is_safe() -> None:
    check("audit_unsafe.txt", audit_text(audits.hopeless()))


def test_no_line_is_wider_than_a_terminal() -> None:
    assert max(map(len, audit_text(audits.report()).splitlines())) <= 100


def test_the_recipes_line_is_last_and_never_folded() -> None:
    long = "bf16-mixed; " + "; ".join(f"a.very.long.name.of.a.module.{n}=32" for n in range(9))
    report = audits.report(policy=long, candidates={"bf16": audits.candidate(policy=long)})
    assert audit_text(report).splitlines()[-1] == f'precision: "{long}"'


def test_the_headline_is_the_answer() -> None:
    assert headline(audits.report(updates={})) == "net on t4: bf16-mixed is safe with 4 modules in fp32."
    plain = audits.candidate(policy="bf16-mixed", islands=())
    assert headline(audits.report(candidates={"bf16": plain}, policy="bf16-mixed", updates={})).endswith(
        "is safe as it is."
    )
    assert headline(audits.hopeless()) == "net on t4: no lower format is safe, stay in 32-true."


def test_the_headline_warns_of_updates_that_are_lost() -> None:
    """A step may be precise and yet train nothing."""
    assert headline(audits.report()).endswith(
        "is safe with 4 modules in fp32, but 1 of 2 parameters lose optimizer updates (see the advice)."
    )


def test_repeated_layers_are_told_once() -> None:
    islands = section("islands-bf16")
    assert [row[0] for row in islands.rows] == ["count", "layers.*.norm (3)"]
    assert islands.rows[1][1] == "rounding" and islands.rows[1][3] == "model.py:12"
    ops = section("ops")
    assert [row[1] for row in ops.rows] == ["big: addmm, forward", "layers.*.norm (3): layer_norm, backward",
                                            "count: cumsum, forward"]  # fmt: skip
    assert ops.rows[1][3] == "30 %" and ops.rows[2][-1] == "37.0 %"


def test_an_island_whose_ops_do_not_fail_says_so() -> None:
    candidate = audits.candidate(islands=("head",), policy="bf16-mixed; head=32")
    (row,) = section("islands-bf16", candidates={"bf16": candidate}).rows
    assert row[:2] == ("head", "together") and "none of its ops by itself" in row[2]


def test_where_nothing_fails_the_nearest_are_shown() -> None:
    found = ops_section(audits.report(rows=(audits.row("a", failure=None, severity=0.5),)))
    assert found.title.startswith("No op fails by itself") and found.rows[0][2] == "no"


def test_long_lists_say_what_was_left_out() -> None:
    rows = tuple(audits.row(f"part{chr(97 + n)}") for n in range(20))
    found = ops_section(audits.report(rows=rows))
    assert len(found.rows) == 15 and found.rows[-1][1] == "6 more"
    assert all(len(row) == len(found.headings) for row in found.rows)
    wide = ops_section(audits.report(rows=rows), wide=True)
    assert all(len(row) == len(wide.headings) for row in wide.rows)


def test_every_row_fills_its_table() -> None:
    for wide in (False, True):
        for found in sections(audits.report(), wide=wide):
            assert all(len(row) == len(found.headings) for row in found.rows), found.name


def test_the_front_counts_what_fails_by_itself_in_every_trial() -> None:
    report = audits.report()
    points = front_points(report, report.candidates["bf16"])
    assert [(round(share, 3), len(names)) for share, _, names in points] == [(0.0, 0), (0.03, 4), (0.13, 5)]
    assert points[0][1] == pytest.approx(4.0) and points[1][1] == pytest.approx(0.2)


def test_updates_that_are_the_same_for_two_formats_are_told_once() -> None:
    found = [s for s in sections(audits.report()) if s.name.startswith("updates")]
    assert [s.title for s in found] == ["Optimizer updates lost on fp32 weights (bf16 and fp16): 1 of 2 parameters"]
    assert [row[0] for row in found[0].rows] == ["head.bias"]


def test_updates_without_a_loss_show_the_slowest() -> None:
    found = updates_section("bf16", audits.updates(audits.update("a", 0.99), audits.update("b", None)))
    assert found.title.endswith("0 of 2 parameters") and [row[0] for row in found.rows] == ["a", "b"]
    assert found.rows[1][3] == "–"


def test_fp8_layers_are_summed_up_by_kind() -> None:
    rows = section("fp8").rows
    assert [row[:3] for row in rows] == [("layers.*.up (2)", "50.0 %", "fp8 per tensor"),
                                         ("head", "25.0 %", "keep bf16")]  # fmt: skip


def test_files_in_sentences_are_short() -> None:
    assert lists(audits.report())[0][1][0].startswith("add at net/model.py:40 is in no module")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (math.inf, "not finite"), (math.nan, "not finite"), (0.25, "25 %"), (3e-6, "3e-06")],
)
def test_errors_as_text(value: float | None, text: str) -> None:
    assert error_text(value) == text


def test_names_that_are_alike() -> None:
    assert alike("") == "top" and alike("h.0.attn2.0") == "h.*.attn2.*"
    labels = [label for label, _ in grouped(["a.0", "b", "a.1"], lambda name: (name,))]
    assert labels == ["a.* (2)", "b"]
    assert [label for label, _ in grouped(["a.0", "a.1"], lambda name: (name, name))] == ["a.0", "a.1"]


def test_ops_by_their_plain_names() -> None:
    assert [short_op(op) for op in ("addmm", "_log_softmax", "native_batch_norm")] == ["addmm", "log_softmax",
                                                                                       "batch_norm"]  # fmt: skip


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in audit_text(audits.report(model="\x1b[31mnet"))
