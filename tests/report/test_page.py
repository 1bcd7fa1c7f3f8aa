import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from floatline.errors import ConfigError, RunDirectoryError
from floatline.report import RunData, load_run, render_html, write_html

from .conftest import MakeRun, eval_line, fault_line, lines, step_line

VOID = {"meta", "img", "input", "br", "hr", "link", "path", "circle", "use", "rect"}


class Page(HTMLParser):
    """Checks that elements nest and collects what the page points to, its ids and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.links += [named[key] or "" for key in ("src", "href", "xlink:href", "srcset", "data") if key in named]
        if named.get("id"):
            self.ids.append(named["id"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_run_on_one_page(make_run: MakeRun) -> None:
    run = load_run(make_run())
    page = Page(render_html([run]))
    for word in (
        "digits ✓ finished",
        "97.0 % of the unseen test questions answered right",
        "388 of 400 right; 95 % interval 94.8–98.3 %",
        "Learning rate",
        "Gradient norm",
        "clipped to 1",
        "Which digit is on the left?",
        "this CPU multiplies bfloat16",
        "data/train.jsonl:17 the image scene-17.png cannot be read",
        "max_grad_norm: 1.0",
        "812 MiB",
        "AMD EPYC, 2 cores, 8.00 GiB memory",
        "1.92 s (×16: warm-up), not counted",
    ):
        assert word in page.text, word
    assert "Loss scale" not in page.text
    assert "Not everything is here" not in page.text


def test_it_stands_alone(make_run: MakeRun) -> None:
    runs = [load_run(make_run("a")), load_run(make_run("b", records=lines(200, fp16=True)))]
    html = render_html(runs)
    page = Page(html)
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert not re.search(r"https?://|@import|<script|<link|<iframe", html)
    assert not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html
    assert len(page.ids) == len(set(page.ids))
    inside = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert inside <= set(page.ids)


def test_every_picture_and_drawing_says_what_it_shows(make_run: MakeRun) -> None:
    html = render_html([load_run(make_run())])
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", html))
    drawings = re.findall(r"<svg[^>]*>", html)
    assert all('aria-label="' in tag or "aria-hidden" in tag for tag in drawings)
    assert 'aria-label="Training loss over 200 updates' in html


def test_drawings_take_their_colours_from_the_page(make_run: MakeRun) -> None:
    html = render_html([load_run(make_run())])
    body = html[html.index("</style>") :]
    strange = set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", body))
    assert strange == set()
    style = html[: html.index("</style>")]
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= set(re.findall(r"(--[\w-]+):", style))


def test_several_runs(make_run: MakeRun) -> None:
    runs = [
        load_run(make_run("bf16")),
        load_run(make_run("fp32", precision="32-true", records=lines(200, slower=2), info={"seconds": 300.0})),
        load_run(make_run("dead", records=[], leave_out=("run.json", "recipe.yaml", "samples.jsonl"))),
    ]
    page = Page(render_html(runs))
    for word in ("3 runs side by side", "bf16 · bf16-mixed", "fp32 · 32-true", "Loss over time", "×2.", "5 min 00 s"):
        assert word in page.text, word
    assert page.text.index("Side by side") < page.text.index("Resolved recipe")
    assert "Where the recipes differ" in page.text


@pytest.mark.parametrize("leave_out", [("run.json",), ("recipe.yaml",), ("samples.jsonl",), ("metrics.jsonl",)])
def test_what_is_missing_is_said(make_run: MakeRun, leave_out: tuple[str, ...]) -> None:
    page = Page(render_html([load_run(make_run(leave_out=leave_out))]))
    assert f"Not everything is here {leave_out[0]} is missing" in page.text


def test_nothing_but_a_path() -> None:
    page = Page(render_html([RunData(path=Path("empty"))]))
    assert "No update and no evaluation has been recorded yet." in page.text


def records_of(losses: list[float]) -> list[dict]:
    chance = random.Random(0)
    return [
        {**step_line(step, len(losses), chance), "loss": loss, "grad_norm": loss, "applied": math.isfinite(loss)}
        for step, loss in enumerate(losses, 1)
    ]


STRANGE = {
    "one point": [1.0],
    "one nan": [math.nan],
    "all nan": [math.nan] * 50,
    "infinite": [math.inf, 1.0],
    "zero": [0.0] * 3,
    "negative": [-1.0, 2.0],
    "every other": [1.0, math.nan] * 20,
    "far apart": [1e30, 1e-30],
}


@pytest.mark.parametrize("losses", STRANGE.values(), ids=STRANGE)
def test_strange_curves_are_drawn(make_run: MakeRun, losses: list[float]) -> None:
    run = load_run(make_run(records=records_of(losses), samples=[]))
    page = Page(render_html([run]))
    Page(render_html([run, run]))
    bad = sum(not math.isfinite(loss) for loss in losses)
    assert (f"not finite ({bad})" in page.text) == bool(bad)
    assert (f"update skipped ({bad})" in page.text) == bool(bad)


def test_all_nan_says_so(make_run: MakeRun) -> None:
    assert "no finite value" in render_html([load_run(make_run(records=records_of([math.nan] * 5)))])


QUANTITIES = ["grad_norm", "lr", "step_s", "tokens_per_s", "memory_bytes", "loss_scale", "loss"]


@pytest.mark.parametrize("keys", [QUANTITIES, ["step_s"], ["loss"]], ids="-".join)
@pytest.mark.parametrize("value", [None, 0, math.nan, -1])
def test_any_quantity_may_be_absent_or_nonsense(make_run: MakeRun, keys: list[str], value: float | None) -> None:
    records = [line | {key: value for key in keys if line["kind"] == "step"} for line in lines(12)]
    Page(render_html([load_run(make_run(records=records, samples=[]))]))


def test_evaluations_without_accuracy_or_groups(make_run: MakeRun) -> None:
    records = [{**eval_line(step, 20), "accuracy": None, "groups": {}} for step in (10, 20)]
    page = Page(render_html([load_run(make_run(records=[*lines(20)[:-3], *records]))]))
    assert "validation accuracy –" in page.text


def test_text_of_others_is_shown_not_obeyed(make_run: MakeRun) -> None:
    evil = "<script>alert('x')</script>\"'><img src=http://example.org/x>"
    sample = {"images": [evil], "question": evil, "answer": evil, "truth": evil, "correct": False, "kind": evil}
    info = {
        "status": evil,
        "error": evil,
        "command": evil,
        "choices": [{"key": evil, "value": evil, "reason": evil}],
        "techniques": [{"technique": evil, "touched": [evil], "notes": [evil]}],
        "data": {evil: {"samples": 1, "skipped": [{"file": evil, "line": evil, "reason": evil}]}},
        "versions": {evil: evil},
        "machine": {"name": evil},
    }
    group = {**eval_line(100, 200), "groups": {evil: {"correct": 1, "total": 2}, "b": {"correct": 1, "total": 2}}}
    records = [*lines(100)[:-1], group, fault_line(50, evil, evil)]
    path = make_run("a$b & _<i>", samples=[sample], info=info, records=records, precision=evil)
    runs = [load_run(path), load_run(path)]
    for html in (render_html(runs[:1]), render_html(runs)):
        page = Page(html)
        assert "script" not in page.tags and "i" not in page.tags
        assert all(not link.startswith("http") for link in page.links)
        assert html.count("&lt;script&gt;") >= 10


def test_a_long_run_stays_a_small_page(make_run: MakeRun, tmp_path: Path) -> None:
    records = lines(100_000, fp16=True)
    for index in range(0, len(records), 7):
        if records[index]["kind"] == "step":
            records[index] |= {"loss": math.nan, "applied": False}
    records += [fault_line(step) for step in range(2000)]
    run = load_run(make_run(records=records, samples=300))
    path = write_html([run], tmp_path / "report.html")
    assert path.stat().st_size < 1_500_000
    assert "The first 100 of 2002 are shown." in path.read_text(encoding="utf-8")


def test_the_page_appears_whole_or_not_at_all(make_run: MakeRun, tmp_path: Path) -> None:
    run = load_run(make_run())
    path = write_html([run], tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [child.name for child in path.parent.iterdir()] == ["report.html"]


def test_half_a_character_in_an_answer_does_not_stop_the_writing(make_run: MakeRun, tmp_path: Path) -> None:
    sample = {"question": "q", "answer": "\ud83d", "truth": "t", "correct": False}
    path = write_html([load_run(make_run(samples=[sample]))], tmp_path / "report.html")
    assert "</html>" in path.read_text(encoding="utf-8")


def test_a_path_that_cannot_be_written(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    run = load_run(make_run())
    for target in (tmp_path / "file" / "report.html", tmp_path / "folder.html"):
        with pytest.raises(RunDirectoryError, match="cannot write") as caught:
            write_html([run], target)
        assert "give a path" in caught.value.hint
    assert not list(tmp_path.glob(".*"))


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to report"):
        write_html([], tmp_path / "report.html")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_names_the_extra(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    run = load_run(make_run())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=package) as caught:
        write_html([run], tmp_path / "report.html")
    assert caught.value.hint == 'pip install "floatline[report]"'
    assert not (tmp_path / "report.html").exists()


def test_the_import_is_light() -> None:
    heavy = ("torch", "numpy", "matplotlib", "jinja2", "yaml", "PIL", "rich", "transformers", "floatline.train")
    code = f"import sys, floatline.report; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_same_run_gives_the_same_page(make_run: MakeRun) -> None:
    run = load_run(make_run())
    assert render_html([run]) == render_html([run])
