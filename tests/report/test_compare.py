from floatline.report import load_run
from floatline.report.compare import differences, labels, side_by_side

from .conftest import MakeRun, eval_line, lines


def test_labels_name_directory_and_precision_and_never_clash(make_run: MakeRun) -> None:
    a, b = load_run(make_run("one/digits")), load_run(make_run("two/digits"))
    c = load_run(make_run("digits-32", precision="32-true"))
    assert labels([a, b, c]) == [
        "one/digits · bf16-mixed",
        "two/digits · bf16-mixed",
        "digits-32 · 32-true",
    ]
    assert labels([c, c]) != [labels([c])[0]] * 2


def test_best_is_marked_where_it_means_something(make_run: MakeRun) -> None:
    fast = load_run(make_run("fast", info={"seconds": 50.0}))
    slow = load_run(make_run("slow", info={"seconds": 90.0}, records=lines(200, slower=2.0)))
    table = side_by_side([fast, slow])
    best = {heading: [row[i].best for row in table.rows] for i, heading in enumerate(table.headings)}
    assert best["time"] == [True, False]
    assert best["median step"] == [True, False]
    assert best["peak memory"] == [False, False]  # equal
    assert best["accuracy"] == [False, False]


def test_accuracy_wins_only_clear_of_the_others(make_run: MakeRun) -> None:
    good = load_run(make_run("good"))
    poor = load_run(make_run("poor", records=[*lines(200)[:-1], eval_line(100, 200, "test")]))
    close = load_run(make_run("close", records=[*lines(200)[:-1], eval_line(180, 200, "test")]))
    column = side_by_side([good, poor]).headings.index("accuracy")
    assert [row[column].best for row in side_by_side([good, poor]).rows] == [True, False]
    assert [row[column].best for row in side_by_side([good, close]).rows] == [False, False]


def test_recipes_differ_in_dotted_keys(make_run: MakeRun) -> None:
    a = load_run(make_run("a"))
    b = load_run(make_run("b", precision="16-mixed"))
    c = load_run(make_run("c", leave_out=("recipe.yaml",)))
    assert differences([a, b, c]) == [("precision", ["bf16-mixed", "16-mixed", "–"])]
    assert differences([a, c]) == []


def test_a_killed_run_does_not_win_on_time(make_run: MakeRun) -> None:
    whole = load_run(make_run("whole", info={"seconds": 50.0}))
    longer = load_run(make_run("longer", info={"seconds": 60.0}))
    killed = load_run(make_run("killed", info={"seconds": 5.0, "status": "running"}, records=lines(200)[:20]))
    table = side_by_side([whole, longer, killed])
    column = table.headings.index("time")
    assert [row[column].best for row in table.rows] == [True, False, False]
