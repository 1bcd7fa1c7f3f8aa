"""An audit as a page: self-contained, escaped, with the heat map and the front of each format."""

import math
import re
from html.parser import HTMLParser

import pytest

from floatline.errors import RunDirectoryError
from floatline.report.audit_front import front_plot
from floatline.report.audit_heat import COLUMNS, block_of, cells, heat, heat_table
from floatline.report.audit_page import audit_html, write_audit

from . import audits


class Balanced(HTMLParser):
    """Fails on a tag that is closed by another one."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("made", [audits.report, audits.hopeless])
def test_the_page_stands_alone(made) -> None:
    page = audit_html(made())
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:|#)', page)
    anchors = set(re.findall(r'href="#([^"]+)"', page))
    ids = re.findall(r'id="([^"]+)"', page)
    assert anchors <= set(ids) and len(ids) == len(set(ids))


def test_it_says_the_answer_and_the_line_for_a_recipe() -> None:
    page = audit_html(audits.report())
    assert "precision: &#34;bf16-mixed; layers.*.norm=32; count=32&#34;" in page
    assert "!</span> safe, but updates are lost" in page and "Cost against error, bf16-mixed" in page
    assert "✓</span> safe" in audit_html(audits.report(updates={}))
    assert "✗</span> stay in fp32" in audit_html(audits.hopeless())


def test_names_are_escaped() -> None:
    page = audit_html(audits.report(model="<b>net</b>"))
    assert "<b>net" not in page and "&lt;b&gt;net" in page


def test_writing(tmp_path) -> None:
    assert "<html" in write_audit(audits.report(), tmp_path / "new/a.html").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError):
        write_audit(audits.report(), tmp_path / "file/a.html")


def test_cells_are_coloured_by_what_is_allowed() -> None:
    allowed = audits.report().tolerance
    found = cells(audits.module_row("a", local=0.5, local_backward=2.0, weight_gradient=None, headroom=-1.0,
                                    loss_change=math.inf, gradient_change=0.001), allowed)  # fmt: skip
    assert len(found) == len(COLUMNS)
    assert [cell.heat for cell in found] == [4, 5, 0, 0, 0, 5, 5, 0, 0]
    assert [cell.text for cell in found] == ["50 %", "200 %", "", "", "1 %", "-1.0", "∞", "0.1 %", "10.0 %"]
    assert found[-1].bar == pytest.approx(10.0)


def test_heat_grows() -> None:
    ratios = [0.0, 0.03, 0.1, 0.3, 1.0, 10.0]
    assert [heat(ratio) for ratio in ratios] == list(range(6)) and heat(math.inf) == 5


def test_rows_stand_in_the_models_order_by_block() -> None:
    table = heat_table(audits.report(), "bf16")
    assert [block.name for block in table.blocks] == ["top of the model", "layers.0", "layers.1", "layers.2",
                                                      "top of the model"]  # fmt: skip
    assert [line.name for line in table.blocks[1].lines] == ["norm", "up"]
    assert table.blocks[0].lines[0].name == "(itself)" and table.blocks[1].lines[0].kept
    assert all(not block.left_out for block in table.blocks)


def test_of_a_large_model_the_gravest_are_shown_and_the_rest_is_summed_up() -> None:
    many = [audits.module_row(f"layers.{n}.{part}", local=0.2 if n == 7 else 1e-4, local_backward=1e-4, reached=1e-4,
                              weight_gradient=1e-4, gradient_change=None, loss_change=None)
            for n in range(60) for part in ("up", "down")]  # fmt: skip
    table = heat_table(audits.report(modules=tuple(many)), "bf16", most=10)
    shown = [line.full for block in table.blocks for line in block.lines]
    assert len(shown) == 10 and {"layers.7.up", "layers.7.down"} <= set(shown)
    assert len(table.blocks) == 60 and table.blocks[50].left_out == "2 more, below 3 % of what is allowed"
    assert "110 of 120 modules" in table.caption


def test_what_is_left_out_and_too_much_is_said() -> None:
    rows = (audits.module_row("a.x", local=0.2), audits.module_row("a.y", reached=0.9, local=0.0))
    (block,) = heat_table(audits.report(modules=rows), "bf16", most=1).blocks
    assert block.left_out == "1 more, some above what is allowed"


def test_blocks() -> None:
    assert block_of("h.3") == "h.3" and block_of("a.0.b.1.c") == "a.0.b.1" and block_of("head") == ""
    assert block_of("0.up") == "0" and block_of("conv1.weight") == "conv1"


def test_a_front_needs_two_points_of_which_one_is_finite() -> None:
    report = audits.report()
    plot = front_plot(report, report.candidates["bf16"])
    assert plot is not None and "<svg" in plot.svg and plot.caption.startswith("3 policies of 3 trials")
    assert front_plot(report, report.candidates["fp16"]) is None
