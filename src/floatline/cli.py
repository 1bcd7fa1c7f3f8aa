"""The command line, thin: one function a command. Data goes to stdout, progress and logs to stderr.

Exit codes: 0 fine, 1 the answer is "no" (a run stopped by its guard, a plan that does not fit), 2 the user's mistake.
Nothing heavy is imported before a command needs it, so `floatline --help` does not load torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from floatline.errors import ConfigError, FloatlineError

if TYPE_CHECKING:
    from floatline.audit.command import AuditRequest
    from floatline.audit.report import AuditReport
    from floatline.plan.command import PlanReport, PlanRequest
    from floatline.plan.side_by_side import Comparison
    from floatline.train.replay import Replayed
    from floatline.train.run import RunResult

app = typer.Typer(
    name="floatline",
    help="Mixed-precision training that fits, stays finite and runs fast; measured, not assumed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Files = list[tuple[Path | None, Callable[[Path], object]]]
"""Files that were asked for, if they were, with what writes each."""
OTHERS_SHOW_IT_S = 30.0
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        app(prog_name="floatline")
    except FloatlineError as error:
        if error.told:
            _wait_to_be_ended()
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    sys.exit(0)


def _wait_to_be_ended() -> None:
    """Leave an error to the rank that shows it, which must be the first to go: torchrun ends all ranks then.

    Who is still here after that time was left alone with the error, and shows it.
    """
    try:
        time.sleep(OTHERS_SHOW_IT_S)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, e.g. train.lr=1e-4.")] = None,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe, or resume a run.

    Killed, stopped or full disk: the same command goes on from the newest sound checkpoint.
    """
    from floatline.train import load_recipe
    from floatline.train import train as run_training
    from floatline.train.launch import told_by_the_first

    with told_by_the_first():
        loaded = load_recipe(recipe, overrides or [])
    command = " ".join(["floatline", "train", str(recipe), *(overrides or [])])
    result = run_training(loaded, command=command)
    if result.rank == 0:
        _report_run(result, as_json)
    if result.status == "interrupted":
        raise typer.Exit(130)


def _report_run(result: RunResult, as_json: bool) -> None:
    page = _try_report(result.path)
    if as_json:
        _print_json({"run": str(result.path), "status": result.status, "result": result.evaluation, "report": page})
    else:
        print(_train_summary(result.path, result.status))
        print(f"report: {page}" if page else f"run: {result.path}")


def _train_summary(path: Path, status: str) -> str:
    from floatline.report import load_run, render_text

    return f"{path}: {status}\n{render_text([load_run(path)])}"


def _try_report(path: Path) -> str | None:
    """Write the page; a missing plotting package must not fail a run that is done."""
    from floatline.report import load_run, write_html

    target = path / "report.html"
    try:
        write_html([load_run(path)], target)
    except FloatlineError as error:
        print(f"no report: {error}", file=sys.stderr)
        return None
    return str(target)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are set side by side.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; report.html in the one run.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the report as text, write no page.")] = False,
    as_json: Json = False,
) -> None:
    """Write an HTML page about one run or several.

    The page is self-contained: one file, no network.
    """
    from floatline.report import load_run, render_text, write_html

    loaded = [load_run(path) for path in runs]
    if text:
        print(render_text(loaded))
        return
    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_html(loaded, target)
    if as_json:
        _print_json({"report": str(target), "runs": [str(path) for path in runs]})
    else:
        print(target)


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="Directory, config.json, hub id, module:function, bundled name, or a recipe (.yaml).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to a recipe, e.g. train.batch_size=16.")
    ] = None,
    hardware: Annotated[str, typer.Option(help="t4, a100-40gb ...; auto: this machine; all: side by side.")] = "auto",
    seq: Annotated[int | None, typer.Option(help="Tokens a sample.")] = None,
    image: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of an image in pixels.")] = None,
    images: Annotated[int | None, typer.Option(help="Images a sample.")] = None,
    target: Annotated[int | None, typer.Option(help="Tokens a sample of a decoder beside an encoder.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of an audio sample.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples of a micro-batch; alone: of an update.")] = None,
    global_batch: Annotated[int | None, typer.Option(help="Samples of an update.")] = None,
    task: Annotated[str | None, typer.Option(help="How to train, e.g. masked-lm; default: by its config.")] = None,
    mode: Annotated[str, typer.Option(help="train or inference.")] = "train",
    precision: Annotated[str, typer.Option(help="One to keep, e.g. 32-true; auto: the GPU's best.")] = "auto",
    technique: Annotated[list[str] | None, typer.Option(help="One to keep, e.g. 'lora(rank=16)'; repeat it.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A technique not to use; repeat it.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Leave the numbers of training as they are.")] = False,
    vram: Annotated[str | None, typer.Option(help="Memory of a GPU that is not listed, e.g. 24GiB.")] = None,
    capability: Annotated[str | None, typer.Option(help="Its compute capability, e.g. 8.6.")] = None,
    expandable_segments: Annotated[
        bool, typer.Option("--expandable-segments", help="With this setting of torch's allocator.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="No component table, largest sizes or advice.")] = False,
    out: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    png: Annotated[Path | None, typer.Option(help="Picture of the memory over one update to write.")] = None,
    export: Annotated[str | None, typer.Option(help="Print settings of trainer, accelerate or fsdp.")] = None,
    as_json: Json = False,
) -> None:
    """Say whether a training run fits a GPU, with which techniques, and at what cost. No GPU is needed.

    The real step runs on tensors without data. Exit code 0: it fits; 1: it does not, or only just.
    """
    from floatline.plan.command import PlanRequest
    from floatline.plan.shape import Shape, parse_image
    from floatline.report.plan_output import check_outputs, text_of, write_page, write_picture

    size = None if image is None else parse_image(image)
    request = PlanRequest(
        model=model,
        hardware=hardware,
        vram=vram,
        capability=capability,
        shape=Shape(seq=seq, target=target, image=size, images=images, seconds=seconds),
        batch=batch,
        global_batch=global_batch,
        task=task,
        mode=mode,
        precision=precision,
        techniques=tuple(technique or ()),
        exclude=tuple(exclude or ()),
        exact=exact,
        expandable_segments=expandable_segments,
        quick=quick,
    )
    check_outputs(request, out, png, export)
    answer = _planned(request, overrides or [])
    files: Files = [
        (out, lambda path: write_page(answer, path)),
        (png, lambda path: write_picture(cast("PlanReport", answer), path)),
    ]
    _show(text_of(answer, export), answer.as_dict, files, as_json)
    raise typer.Exit(0 if answer.fits else 1)


def _planned(request: PlanRequest, overrides: list[str]) -> PlanReport | Comparison:
    from floatline.plan.command import answer
    from floatline.plan.side_by_side import compare
    from floatline.report.plan_progress import planning

    if request.model.endswith((".yaml", ".yml")):
        from floatline.train.plan_report import report_on_recipe

        with planning() as progress:
            return report_on_recipe(request, overrides, progress)
    _refuse_overrides(request.model, overrides)
    with planning() as progress:
        return compare(request, progress) if request.hardware == "all" else answer(request, progress)


def _show(text: str, tree: Callable[[], dict[str, Any]], files: Files, as_json: bool) -> None:
    """Write the files that were asked for and print the answer; a file that cannot be written must not cost it."""
    written: list[str] = []
    try:
        for path, write in files:
            if path is not None:
                write(path)
                written.append(str(path))
    finally:
        if as_json:
            _print_json({**tree(), "written": written})
        else:
            print(text, *written, sep="\n", end="\n" if written else "")


@app.command()
def audit(
    model: Annotated[
        str, typer.Argument(help="A recipe (.yaml), directory, config.json, hub id, module:function or bundled name.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to a recipe, e.g. train.lr=1e-5.")] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(help="Format to try: bf16 or fp16, the preferred first; repeat it.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="mixed (autocast) or true (weights cast); default: the recipe's, else mixed.")
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="Whose autocast lists: t4, a100-40gb ...; auto: this machine.")
    ] = "auto",
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error of the gradient; 0.1.")] = None,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Audit no backward.")] = False,
    optimizer: Annotated[str | None, typer.Option(help="Which of its updates are lost: adamw, sgd ...")] = None,
    lr: Annotated[float | None, typer.Option(help="Its learning rate; 1e-4.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Also say which linear layers could multiply in fp8.")] = False,
    repeats: Annotated[int, typer.Option(help="Runs with stochastic rounding for each confidence.")] = 3,
    probes: Annotated[str, typer.Option(help="Modules lowered one at a time: a number at most, or all.")] = "12",
    most_trials: Annotated[int | None, typer.Option(help="Joint evaluations of the search at most.")] = None,
    batches: Annotated[int, typer.Option(help="Batches of a recipe's data.")] = 1,
    batch: Annotated[int | None, typer.Option(help="Samples of a bare model's batch.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens a sample.")] = None,
    image: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of an image in pixels.")] = None,
    images: Annotated[int | None, typer.Option(help="Images a sample.")] = None,
    target: Annotated[int | None, typer.Option(help="Tokens a sample of a decoder beside an encoder.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of an audio sample.")] = None,
    task: Annotated[str | None, typer.Option(help="How it is trained, e.g. masked-lm; default: by its config.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers that the model draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    as_json: Json = False,
) -> None:
    """Say what must stay fp32, op by op against fp64, and print the cheapest policy that is safe.

    The real step runs with its real weights. Exit code 0: a lower format is safe; 1: none is.
    """
    from floatline.audit.command import AuditRequest, parse_probes
    from floatline.files import check_writable
    from floatline.plan.shape import Shape, parse_image
    from floatline.report.audit_page import write_audit
    from floatline.report.audit_text import audit_text

    size = None if image is None else parse_image(image)
    request = AuditRequest(
        model=model,
        candidates=tuple(candidate or ("bf16", "fp16")),
        mode=mode,
        hardware=hardware,
        tolerance=tolerance,
        shape=Shape(batch=batch, seq=seq, target=target, image=size, images=images, seconds=seconds),
        task=task,
        backward=not forward_only,
        fp8=fp8,
        repeats=repeats,
        probes=parse_probes(probes),
        most_trials=most_trials,
        optimizer=optimizer,
        lr=lr,
        batches=batches,
        seed=seed,
    )
    if out is not None:
        check_writable(out)
    found = _audited(request, overrides or [])
    _show(audit_text(found), found.as_dict, [(out, lambda path: write_audit(found, path))], as_json)
    raise typer.Exit(0 if found.safe else 1)


def _audited(request: AuditRequest, overrides: list[str]) -> AuditReport:
    from floatline.audit.command import answer
    from floatline.report.plan_progress import planning

    if request.model.endswith((".yaml", ".yml")):
        from floatline.train.audit_recipe import audit_recipe

        with planning(word="audit") as progress:
            return audit_recipe(request, overrides, progress)
    _refuse_overrides(request.model, overrides)
    with planning(word="audit") as progress:
        return answer(request, progress)


def _refuse_overrides(model: str, overrides: list[str]) -> None:
    if overrides:
        raise ConfigError(f"{' '.join(overrides)} was given, but {model} is no recipe", hint="use options, see --help")


@app.command()
def diagnose(
    path: Annotated[Path, typer.Argument(help="Run directory, or one below its findings/.")],
    recipe: Annotated[Path | None, typer.Option(help="The run's resolved recipe, where it is not beside it.")] = None,
    as_json: Json = False,
) -> None:
    """Find the first bad op of updates that were not finite, name the cause, try the cure.

    Each kept update is run again, on its own weights, batch and random numbers. Exit code 1 where a fault is found, 0
    where none is, 2 where something could not be read.
    """
    from floatline.train.replay import find_bundles, replay_findings

    note = find_bundles(path).note
    if note:
        print(note, file=sys.stderr)
    found: list[Replayed] = []
    try:
        for replayed in replay_findings(path, recipe):
            found.append(replayed)
            _tell(replayed, as_json, gap=len(found) > 1)
    finally:  # what ends the third replay must not cost the answer of the first two
        if as_json and found:
            _print_json([replayed.as_dict() for replayed in found])
    if as_json and not found:
        _print_json([])
    for replayed in found:
        _write(replayed)
    codes = {replayed.exit_code for replayed in found}
    raise typer.Exit(1 if 1 in codes else max(codes, default=0))


def _tell(replayed: Replayed, as_json: bool, gap: bool) -> None:
    if replayed.error is not None:
        print(f"error: {replayed.error.message}\nhint: {replayed.error.hint}", file=sys.stderr)
    elif not as_json:
        print(f"\n{replayed}" if gap else replayed, flush=True)


def _write(replayed: Replayed) -> None:
    """Keep a finding beside its bundle; a disk that cannot be written must not cost the answer, which is told."""
    try:
        replayed.write()
    except FloatlineError as error:
        print(f"warning: the finding is not kept: {error.message}", file=sys.stderr)


@app.command()
def doctor(
    hardware: Annotated[str, typer.Option(help="auto is this machine; or cpu, t4, a100-40gb, h200, ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Say what this machine, or a known GPU, can do and why."""
    from floatline.doctor import diagnose_machine, doctor_text

    facts = diagnose_machine(hardware)
    if as_json:
        _print_json(facts)
    else:
        print(doctor_text(facts))


@app.command()
def formats(as_json: Json = False) -> None:
    """Print the table of number formats.

    It is computed from their bit layout, not typed.
    """
    from floatline.formats import format_rows, format_text

    if as_json:
        _print_json(format_rows())
        return
    print(format_text())


if __name__ == "__main__":
    main()
