import os
from pathlib import Path

import pytest

from floatline.errors import ConfigError
from floatline.report import RunData, load_run, render_text

from .conftest import MakeRun, fault_line, lines

GOLDEN = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    """Compare with the file; FLOATLINE_UPDATE_GOLDEN=1 writes it anew."""
    path = GOLDEN / name
    if os.environ.get("FLOATLINE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_one_run(make_run: MakeRun) -> None:
    check("one.txt", render_text([load_run(make_run(records=[*lines(200), fault_line(60)]))]))


def test_several_runs(make_run: MakeRun) -> None:
    runs = [
        load_run(make_run("digits-bf16")),
        load_run(make_run("digits-fp32", precision="32-true", records=lines(200, slower=2), info={"seconds": 240.0})),
        load_run(make_run("digits-fp16", precision="16-mixed", records=lines(200, fp16=True))),
        load_run(make_run("killed", records=lines(200)[:90], leave_out=("run.json", "samples.jsonl"))),
        load_run(make_run("empty", records=[], leave_out=("run.json", "recipe.yaml", "samples.jsonl"))),
    ]
    check("several.txt", render_text(runs))


def test_colour_settings_of_the_environment_change_nothing(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(make_run())
    plain = render_text([run])
    for name, value in {
        "FORCE_COLOR": "1",
        "COLORTERM": "truecolor",
        "TERM": "xterm-256color",
        "COLUMNS": "40",
    }.items():
        monkeypatch.setenv(name, value)
    assert render_text([run]) == plain
    assert "\x1b" not in plain


def test_nothing_in_it_commands_a_terminal(make_run: MakeRun) -> None:
    evil = "\x1b[31mred\x1b]0;title\x07[bold]:smile:\r\n\x9b2J"
    sample = {"images": [], "question": evil, "answer": evil, "truth": evil, "correct": False, "kind": "digit"}
    info = {
        "error": evil,
        "choices": [{"key": evil, "value": evil, "reason": evil}],
        "techniques": [{"technique": evil, "touched": [evil], "notes": [evil]}],
    }
    text = render_text([load_run(make_run(samples=[sample], info=info, precision=evil))])
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "[bold]:smile:" in text


def test_lines_keep_to_the_width(make_run: MakeRun) -> None:
    run = load_run(make_run("a" * 200, records=[*lines(50), fault_line(3, reason="long " * 60)]))
    for runs in ([run], [run] * 6):
        assert max(len(line) for line in render_text(runs, width=80).splitlines()) <= 80


def test_nothing_but_a_path() -> None:
    assert render_text([RunData(path=Path("empty"))]).startswith("empty\nStatus unknown, no update.\n")


def test_no_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no run to report"):
        render_text([])
