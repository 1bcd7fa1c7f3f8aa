"""The house: who may import whom, and what `import floatline` costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import floatline

ROOT = Path(floatline.__file__).parent
FLOORS = [
    {"errors", "files", "formats", "select", "patch", "callable_module", "hardware"},
    {"precision", "techniques"},
    {"step"},
    {"observe"},
    {"plan", "diagnose", "audit", "bench"},
    {"train"},
    {"claims", "compare"},
    {"report", "integrations", "doctor"},
    {"cli", "__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"transformers", "peft", "lightning", "accelerate", "matplotlib", "gradio", "PIL", "torchdata", "tensorboard",
         "jinja2", "sklearn", "torchao", "optimi", "datasets", "pydantic", "typer"}  # fmt: skip


def imports_of(path: Path):
    """Dotted names of our own modules that a file imports, at top level or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("floatline"):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("floatline"))


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert rooms <= set(FLOOR_OF) | {"models"}


def test_imports_go_downward_only():
    upward = []
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":
            continue
        for name in imports_of(path):
            target = name.split(".")[1] if "." in name else "__init__"
            if target != "__init__" and FLOOR_OF[target] > FLOOR_OF[room]:
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert upward == []


def fresh(code: str) -> dict:
    """Run code in a new interpreter and return the JSON it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_floatline_loads_nothing_heavy():
    loaded = fresh("import floatline, sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))")
    assert not HEAVY & set(loaded) and "torch" not in loaded


def test_using_the_core_loads_torch_only():
    code = (
        "import floatline, sys, json; floatline.TrainStep, floatline.Policy, floatline.Workload, floatline.FORMATS;"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    assert not (HEAVY - {"pydantic"}) & set(fresh(code))


def test_help_does_not_load_torch():
    code = (
        "import sys, json\nfrom floatline.cli import main\nsys.argv = ['floatline', '--help']\n"
        "import io, contextlib\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    try: main()\n    except SystemExit as e: code = e.code\n"
        "print(json.dumps({'code': code, 'torch': 'torch' in sys.modules}))"
    )
    assert fresh(code) == {"code": 0, "torch": False}


def test_public_names_exist_and_are_documented():
    for name in floatline.__all__:
        assert getattr(floatline, name).__doc__ if name != "FORMATS" else floatline.FORMATS
    assert set(floatline.__all__) <= set(dir(floatline))
