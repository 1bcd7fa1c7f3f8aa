import json
import math
import re
from typing import Any

import pytest

from floatline.report import load_run, render_html
from floatline.report.gradient_plots import clip_lines, element_curves, gradient_plots
from floatline.report.gradients import Gradients

from .conftest import MakeRun
from .gradient_records import bad_point, point, record
from .test_page import Page


def page_of(make_run: MakeRun, content: dict[str, Any] | None, name: str = "digits") -> tuple[Page, str]:
    path = make_run(name)
    if content is not None:
        (path / "gradients.json").write_text(json.dumps(content))
    html = render_html([load_run(path)])
    return Page(html), html


def test_the_section_of_a_run(make_run: MakeRun) -> None:
    page, html = page_of(make_run, record(bad=(5, 25), large_updates=3))
    for word in (
        "Gradient norms of 40 updates: half lie below 1.",
        "1.3 2.5 % 90 % lie below",
        "Elements of the gradients",
        "Norm against the clip value",
        "3 updates above ten times the clip value.",
        "2 updates of 40 (5.0 %) had NaN or Inf in a gradient, 192 elements in all.",
        "not finite (2 updates)",
        "Norm by layer",
        "update 31",
        "NaN or Inf",
    ):
        assert word in page.text, word
    assert "r0-gradients" in page.ids and 'href="#r0-gradients"' in html
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    body = html[html.index("</style>") :]
    assert set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", body)) == set()


def test_a_run_without_them_has_no_section(make_run: MakeRun) -> None:
    page, html = page_of(make_run, None)
    assert "r0-gradients" not in html and "Elements of the gradients" not in page.text


def test_a_healthy_run_says_so(make_run: MakeRun) -> None:
    page, _ = page_of(make_run, record())
    assert "No gradient was NaN or Inf in 40 updates." in page.text
    assert "had NaN or Inf" not in page.text


def test_several_runs_keep_their_sections_apart(make_run: MakeRun) -> None:
    runs = []
    for name in ("a", "b"):
        path = make_run(name)
        (path / "gradients.json").write_text(json.dumps(record(bad=(3,))))
        runs.append(load_run(path))
    page = Page(render_html(runs))
    assert len(page.ids) == len(set(page.ids)) and {"r0-gradients", "r1-gradients"} <= set(page.ids)


def test_names_of_others_are_shown_not_obeyed(make_run: MakeRun) -> None:
    evil = "<script>alert('x')</script>\"'>$x$"
    content = record(layers=1)
    content["rows"]["names"] = [evil]
    content["advice"] = {"text": evil, "candidates": [{"value": 1.0, "share": 0.1, "what": evil}]}
    page, html = page_of(make_run, content)
    assert "<script" not in html and page.text.count("alert('x')") >= 3


STRANGE = {
    "nothing": [],
    "one": [point(1)],
    "one bad": [bad_point(1)],
    "all bad": [bad_point(step) for step in range(1, 30)],
    "zeros": [point(step, norm=0.0, top_norm=0.0, largest=0.0, mean=0.0) for step in range(1, 5)],
    "infinite": [point(1), point(2, norm=math.inf, top_norm=math.inf, bad_updates=1, bad_elements=1)],
    "far apart": [point(1, largest=1e-30, mean=1e-38), point(2, largest=1e30)],
    "not looked at": [point(step, largest=math.nan, mean=math.nan) for step in range(1, 9)],
}


@pytest.mark.parametrize("points", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("limit", [None, 1e-9, 1e9])
def test_strange_courses_are_drawn(make_run: MakeRun, points: list[dict], limit: float | None) -> None:
    page, _ = page_of(make_run, record(points={"kept": points}, max_grad_norm=limit))
    assert "Gradients" in page.text


def test_elements_that_were_looked_at_now_and_then_make_a_line() -> None:
    points = [point(step) if step % 10 == 1 else point(step, largest=math.nan, mean=math.nan) for step in range(1, 41)]
    curves = element_curves(Gradients.read(record(points={"kept": points})))
    assert curves[0].xs == [1, 11, 21, 31] and all(map(math.isfinite, curves[0].ys))


def test_ten_times_the_clip_value_is_drawn_where_norms_come_near() -> None:
    assert [value for value, *_ in clip_lines(Gradients.read(record()))] == [1.0]
    assert [value for value, *_ in clip_lines(Gradients.read(record(max_grad_norm=0.1)))] == [0.1, 1.0]
    assert clip_lines(Gradients.read(record(max_grad_norm=None))) == []


def test_points_of_many_updates_are_named_stretches() -> None:
    plots = gradient_plots(
        Gradients.read(record(points={"kept": [point(step, updates=8) for step in range(1, 80, 8)]}))
    )
    assert {"mean of each stretch", "largest of each stretch"} <= {key.label for plot in plots for key in plot.keys}
