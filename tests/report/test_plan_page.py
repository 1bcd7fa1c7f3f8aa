"""The page of a plan: all parts, nothing from outside, nothing of a model's that becomes mark-up."""

from dataclasses import replace

from floatline.report.plan_page import comparison_html, plan_html

from . import plans
from .test_page import Page


def test_all_parts_are_on_the_page() -> None:
    html = plan_html(plans.report(18.0))
    page = Page(html)
    parts = {"timeline", "components", "ladder", "advice", "rejected", "peak", "held", "choices", "settings"}
    assert parts <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert {link for link in page.links if link.startswith("#")} >= {f"#{part}" for part in parts}
    for text in ("tiny-gpt on t4", "does not fit", "l4 in bf16-mixed", "Memory over one update", "micro_batches: 4",
                 "transformers TrainingArguments", "gradient_accumulation_steps: 4", "time is a roofline model",
                 "by aten.mm of model.layers.3.mlp", "4 micro-batches; by a roofline model"):  # fmt: skip
        assert text in page.text, text


def test_it_loads_nothing() -> None:
    for html in (plan_html(plans.report()), comparison_html(plans.comparison())):
        page = Page(html)
        assert all(link.startswith("#") for link in page.links)
        assert "script" not in page.tags and "default-src 'none'" in html


def test_verdicts_have_their_colour() -> None:
    assert 'class="badge good"' in plan_html(plans.report(10.0))
    assert 'class="badge warn"' in plan_html(plans.report(14.25))
    html = plan_html(plans.report(18.0))
    assert 'class="badge bad"' in html and '<span class="tag warn">tight</span>' in html


def test_names_are_escaped() -> None:
    evil = "<b>$x^2$</b>"
    report = plans.report()
    named = replace(report.estimate, timeline=plans.timeline(2**33, module=evil))
    html = plan_html(replace(report, estimate=named, source=replace(report.source, name=evil)))
    assert evil not in html and evil in Page(html).text


def test_all_gpus_on_a_page() -> None:
    page = Page(comparison_html(plans.comparison()))
    assert "fits from h200 on" in page.text and "bf16-mixed cannot run on t4" in page.text and "cannot run" in page.text
    assert "timeline" not in page.ids and "gpus" in page.ids


def test_inference_has_a_page_too() -> None:
    report = plans.report()
    forward = replace(report.estimate, mode="inference")
    page = Page(plan_html(replace(report, plan=None, estimate=forward, settings={}, table={}, largest=())))
    assert "Memory over one forward" in page.text and "settings" not in page.ids and "ladder" not in page.ids
