"""The table of the layers that are nearest to overflow."""

from floatline.report import load_run, render_text
from floatline.report.headroom import tightest
from floatline.report.page import render_html

from .conftest import MakeRun, fault_line, lines


def headroom_line(step: int, **bits: float | None) -> dict[str, object]:
    return {"kind": "headroom", "step": step, "modules": 40, "bits": {k.replace("_", "."): v for k, v in bits.items()}}


def test_the_least_of_all_samples_and_the_last(make_run: MakeRun) -> None:
    looks = [headroom_line(100, a_0=3.25, b=7.0), headroom_line(200, a_0=5.0, c=4.0, odd=None)]
    run = load_run(make_run(records=[*lines(200), *looks]))
    assert [tight.cells for tight in tightest(run)] == [
        ("a.0", "3.2", "100", "5.0"), ("c", "4.0", "200", "4.0"), ("b", "7.0", "100", "7.0"),
    ]  # fmt: skip
    assert [tight.module for tight in tightest(run, most=1)] == ["a.0"]
    text, page = render_text([run]), render_html([run])
    assert "Least headroom to overflow (2 steps sampled; 1 bit is a factor of 2)" in text
    assert "a.0" in text and "<code>a.0</code>" in page and 'id="r0-headroom"' in page


def test_a_run_that_was_not_sampled_has_no_table(make_run: MakeRun) -> None:
    run = load_run(make_run(records=[*lines(20), fault_line(3)]))
    assert tightest(run) == [] and "headroom" not in render_text([run]) and "-headroom" not in render_html([run])
