"""Progress of a plan: lines without a terminal, one bar with one."""

import io
import os

from rich.console import Console

from floatline.report.plan_progress import planning


def test_lines_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    with planning(Console(file=file)) as progress:
        for trial in range(50):
            progress(f"[bold] trial {trial}", trial)
    assert file.getvalue() == "plan: [bold] trial 0 (0 s)\n"  # not one a trial: at most one every two seconds


def test_a_bar_on_a_terminal_that_is_gone_afterwards() -> None:
    file = io.StringIO()
    with planning(Console(file=file, force_terminal=True, width=100)) as progress:
        progress("checkpointing [x] on t4", 3)
    shown = file.getvalue()
    assert "checkpointing [x] on t4" in shown and "\x1b[2K" in shown


def test_what_the_users_code_prints_goes_to_stderr_and_the_directory_comes_back(capsys, tmp_path) -> None:
    before = os.getcwd()
    with planning(Console(file=io.StringIO())):
        print("from a forward")
        os.chdir(tmp_path)
    assert capsys.readouterr() == ("", "from a forward\n")
    assert os.getcwd() == before
