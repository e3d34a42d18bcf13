import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from assignments import grade, start

ROOT = start.ROOT
BLANKS = [(number, part) for number, parts in start.BLANKS.items() for part in parts]

# {assignment: (part, file, the solution, what a student might write instead)}
WRONG = {
    1: ("a", "masks.py", "rng.integers(H - h + 1)", "rng.integers(H - h)"),  # never the last row
    2: ("b", "model.py",  # sines and cosines in turn
        "torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)",
        "torch.cat([torch.stack([a.sin(), a.cos()], -1).flatten(1) for a in angles], dim=1)"),
    3: ("a", "model.py", "features = self.target_encoder(clips)\n"  # no LayerNorm
        "        return F.layer_norm(features, features.shape[-1:])",
        "return self.target_encoder(clips)"),
    4: ("c", "runtime/metrics.py", "similarity.fill_diagonal_(-1e9)", "pass"),  # a clip votes
    5: ("b", "experiments/significance.py",  # the standard deviation instead of the standard error
        "statistics.variance(better) / n, statistics.variance(worse) / m",
        "statistics.variance(better), statistics.variance(worse)"),
}

# Writes its number into a file of a folder; its parent and its session are gone by then.
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open(f"{sys.argv[1]}/daemon-{os.getpid()}", "w"):
            pass
        os.closerange(0, 100)
        time.sleep(120)
    os._exit(0)
os.wait()
"""

LATER = [(1, "d"), (2, "e")]  # parts that call all earlier ones
EXAMPLE = ROOT / "assignments" / "example"
WORDS = ("Without an average the targets follow every step of the predictor, so I expect features "
         "that are easy to predict, and poor: by about a tenth. Three seeds should be enough to "
         "see such a large difference, if the seeds agree.")
# (changed entries of the report, points for its four tests)
REPORTS = [({"difference": 0.120003, "verdict": "disagree"}, [5, 10, 0, 0]),
           ({"prediction": "yes", "worse": "vjepa", "verdict": "unclear"}, [0, 0, 0, 10]),
           ({"explanation": "a" * 200}, [0, 10, 10, 10]),
           ({"explanation": "a " * 200}, [0, 10, 10, 10]),
           (json.loads((EXAMPLE / "report.json").read_text()), [0, 0, 0, 0])]


def reference(folder):
    """What a student hands in whose solutions are the project's own."""
    for file in start.code_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / file)
    shutil.copytree(EXAMPLE, folder / "example")
    report = json.loads((EXAMPLE / "report.json").read_text())
    report |= {"results": "mine.csv", "prediction": WORDS, "explanation": WORDS}
    (folder / "report.json").write_text(json.dumps(report))
    numbers = (EXAMPLE / "results.csv").read_text()
    (folder / "mine.csv").write_text(re.sub(r",(0\.\d\d)(?!\d)", r",\g<1>1", numbers))
    return folder


def edit(path, old, new):
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))


def begin_with(path, name, line):
    """Insert a line of code at the beginning of a function."""
    source = path.read_text()
    lines = source.split("\n")
    indent = " " * start.find(source, name).body[0].col_offset
    lines.insert(start.body_lines(source, name).start, indent + line)
    path.write_text("\n".join(lines))


def cheat(folder):
    """A starter in which nothing is written, with tests that always pass."""
    start.start(5, folder)
    for file in folder.glob("tests/**/test_*.py"):
        names = re.findall(r"(?m)^def (test_\w+)", file.read_text())
        file.write_text("\n".join(f"def {name}(): pass" for name in names))
    (folder / "conftest.py").write_text("def pytest_runtest_call(item):\n"
                                        "    item.obj = lambda **fixtures: None\n")
    shutil.copyfile(folder / "conftest.py", folder / "tests" / "conftest.py")
    edit(folder / "experiments/significance.py",
         'raise NotImplementedError("Assignment 5, part b")', "import pytest; pytest.skip()")
    (folder / "report.json").symlink_to(EXAMPLE / "report.json")
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All that is graded for the tests below, at once: {name: result}."""
    folder = tmp_path_factory.mktemp("handed-in")
    dies = reference(folder / "dies")
    begin_with(dies / "probe.py", "balanced_subset", "import os; os._exit(0)")
    begin_with(dies / "probe.py", "CrossAttention.weights",
               "while True: __import__('time').sleep(1)")
    floods = reference(folder / "floods")
    begin_with(floods / "probe.py", "balanced_subset", "while True: print('x' * 1_000_000)")
    daemon = reference(folder / "daemon")
    begin_with(daemon / "probe.py", "balanced_subset",
               f"__import__('subprocess').run({[sys.executable, '-c', DAEMON, str(daemon)]})")
    # The endless loop comes first and holds one of three workers.
    jobs = {"loops": grade.Job(dies, 4, ("a",), limit=5),
            "crashes": grade.Job(dies, 4, ("c", "d")), "floods": grade.Job(floods, 4, ("d",)),
            "daemon": grade.Job(daemon, 4, ("d",)),
            "cheat": grade.Job(cheat(folder / "cheat"), 5)}
    right = reference(folder / "right")
    for number, (part, file, old, new) in WRONG.items():
        jobs["right", number] = grade.Job(right, number)
        wrong = reference(folder / f"wrong{number}")
        edit(wrong / file, old, new)
        jobs["wrong", number] = grade.Job(wrong, number, (part,))
    for number in start.BLANKS:
        start.start(number, folder / f"blank{number}")
        jobs["blank", number] = grade.Job(folder / f"blank{number}", number,
                                          tuple(start.BLANKS[number]))
    for number, part in LATER:
        start.start(number, folder / f"later{number}")
        file, name = start.BLANKS[number][part]
        grade.solve(folder / f"later{number}" / file, name, (ROOT / file).read_text())
        jobs["later", number] = grade.Job(folder / f"later{number}", number, (part,))
    for i, (changes, _) in enumerate(REPORTS):
        path = reference(folder / f"report{i}") / "report.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        jobs["report", i] = grade.Job(path.parent, 5, ("d",))
    published = reference(folder / "published")
    shutil.copyfile(ROOT / "docs/ablations/results.csv", published / "mine.csv")
    jobs["published"] = grade.Job(published, 5, ("d",))
    # In a process of its own, because a process has one forkserver for all of its tests.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        done = pool.submit(grade.grade, list(jobs.values()), workers=3).result()
    return dict(zip(jobs, done, strict=True)) | {"daemon folder": daemon}


@pytest.mark.parametrize("number", start.BLANKS)
def test_the_projects_own_solutions_have_all_points(number, results, capsys):
    result = results["right", number]
    assert result["score"] == 80, [entry for entry in result["tests"] if not entry["score"]]
    grade.show(grade.Job(Path("handed-in"), number), result)
    assert "80 of 80 points" in capsys.readouterr().out


@pytest.mark.parametrize("number, part", BLANKS)
def test_a_function_that_is_not_written_has_no_points(number, part, results):
    entries = [entry for entry in results["blank", number]["tests"]
               if entry["name"].startswith(part)]
    assert entries and not any(entry["score"] for entry in entries)
    assert any(f"Assignment {number}, part {part}" in entry["output"] for entry in entries)


@pytest.mark.parametrize("number, part", LATER)
def test_a_later_part_has_its_points_when_the_earlier_ones_are_not_written(number, part, results):
    assert all(entry["status"] == "passed" for entry in results["later", number]["tests"])


@pytest.mark.parametrize("text", ["def f(:", "x = '\0'", "def g():\n    return 2\n"])
def test_a_file_without_the_function_or_that_does_not_parse_is_left_alone(text, tmp_path):
    (tmp_path / "file.py").write_text(text)
    grade.solve(tmp_path / "file.py", "f", "def f():\n    return 1\n")
    assert (tmp_path / "file.py").read_text() == text


def test_only_the_function_that_is_solved_changes(tmp_path):
    (tmp_path / "file.py").write_text("class A:\n    @b\n    def f(self):\n        no\n\n\nx = 1\n")
    grade.solve(tmp_path / "file.py", "A.f", "import c\n\n\nclass A:\n    def f(x):\n        yes\n")
    assert (tmp_path / "file.py").read_text() == (
        "class A:\n    def f(x):\n        yes\n\n\nx = 1\n")


@pytest.mark.parametrize("number", WRONG)
def test_a_solution_that_is_nearly_right_loses_points(number, results):
    result = results["wrong", number]
    assert result["score"] < sum(entry["max_score"] for entry in result["tests"])
    assert not any("SyntaxError" in entry["output"] or "NameError" in entry["output"]
                   for entry in result["tests"])


def test_a_report_that_does_not_fit_its_results_loses_points(results):
    for i, (_, points) in enumerate(REPORTS):
        assert [entry["score"] for entry in results["report", i]["tests"]] == points
    assert [entry["score"] for entry in results["published"]["tests"]] == [5, 0, 0, 0]


def test_a_crash_and_an_endless_loop_cost_only_their_own_points(results):
    assert grade.points_by_part(results["loops"]) == {"a": [0, 15]}
    assert grade.points_by_part(results["crashes"]) == {"c": [20, 20], "d": [0, 15]}
    assert "stopped after 5 s" in results["loops"]["tests"][0]["output"]
    assert "exit code 0" in results["crashes"]["tests"][-1]["output"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux finds processes without a parent")
def test_a_daemon_that_has_left_its_session_ends_with_its_test(results):
    assert grade.points_by_part(results["daemon"]) == {"d": [15, 15]}
    numbers = [int(file.name.split("-")[1]) for file in results["daemon folder"].glob("daemon-*")]
    assert len(numbers) >= 2  # one for each test and more
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_output_without_end_is_cut_and_earns_nothing(results):
    for entry in results["floods"]["tests"]:
        assert entry["score"] == 0 and len(entry["output"]) < 5000


def test_a_report_is_judged_by_the_projects_arithmetic(tmp_path):
    edit(reference(tmp_path / "mine") / "experiments/significance.py", "better) - stat",
         "better) + stat")
    for part, judge in ("b", tmp_path / "mine"), ("d", ROOT):
        grade.build_tree(grade.Job(tmp_path / "mine", 5), part, tmp_path / part)
        code = (tmp_path / part / "experiments/significance.py").read_text()
        assert ("better) + stat" in code) == (judge != ROOT)


def test_the_students_own_tests_and_skipped_ones_earn_nothing(results):
    assert results["cheat"]["score"] == 0 and len(results["cheat"]["tests"]) == 10
    assert all(entry["status"] == "failed" for entry in results["cheat"]["tests"])


def bare(text):
    return [line.strip() for line in text.split("\n") if line.strip()]


def holds(text, wanted):
    """Whether lines follow each other in a text, whatever their indent."""
    if not all(line in text for line in wanted):
        return False  # and most texts are long
    lines = bare(text)
    return any(lines[i:i + len(wanted)] == wanted for i in range(len(lines)))


@pytest.mark.parametrize("number", start.BLANKS)
def test_a_starter_is_the_project_without_the_solutions(number, tmp_path):
    folder = tmp_path / "starter"
    start.start(number, folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} - {"example"} == {
        "runtime", "video", "baselines", "experiments", "tools", "tests", "docs"}
    assert not [*folder.rglob("__pycache__"), *folder.rglob("test_assignments.py")]
    assert json.loads((folder / "assignment.json").read_text()) == {"assignment": number}
    bodies = {}
    for part, (file, name) in start.BLANKS[number].items():
        source = (ROOT / file).read_text()
        bodies[part] = "\n".join(source.split("\n")[start.body_lines(source, name)])
        assert holds(source, bare(bodies[part]))
    for file in start.code_files():  # with the bodies put back, all is as it was
        source = (folder / file).read_bytes().decode()
        for part, body in bodies.items():
            left = rf' +raise NotImplementedError\("Assignment {number}, part {part}"\)'
            source, count = re.subn(left, lambda _, body=body: body, source)
            assert count == (start.BLANKS[number][part][0] == str(file))
        assert source.encode() == (ROOT / file).read_bytes()
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_text(errors="ignore")
            assert not [part for part, body in bodies.items() if holds(text, bare(body))], path


@pytest.mark.parametrize("number", start.BLANKS)
def test_a_handout_has_the_points_that_are_given_and_commands_that_exist(number):
    text = (ROOT / "assignments" / start.HANDOUTS[number]).read_text()
    rows = re.findall(r"(?m)^\| (\w) \| ([\w/]+\.py): (\w+) \| (\d+) \|$", text)
    points = grade.POINTS[number]
    assert rows == [(part, file, test, str(worth)) for part, files in points.items()
                    for file, tests in files.items() for test, worth in tests.items()]
    assert sum(int(row[-1]) for row in rows) == 80
    commands = re.findall(r"python (\w+\.py|-m [\w.]+)", text)
    assert commands and all((ROOT / command.removeprefix("-m ").removesuffix(".py").replace(
        ".", "/")).with_suffix(".py").exists() for command in commands)
    for file, name in start.BLANKS[number].values():
        assert f"`{name}`" in text and file in text


def run(script, *arguments):
    command = [sys.executable, ROOT / "assignments" / script, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1")
    result = run("start.py", 1, tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == f"error: {tmp_path} is not an empty folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    result = run("start.py", 2, tmp_path / "new")
    assert result.returncode == 0 and "e  model.py  Predictor.forward" in result.stdout


def test_one_student_cannot_keep_others_from_being_graded(tmp_path):
    nameless, blocked, missing = (tmp_path / name for name in ("nameless", "blocked", "missing"))
    nameless.mkdir()
    (nameless / "assignment.json").write_text("[]")
    reference(blocked)
    (blocked / "assignment.json").write_text('{"assignment": 3}')
    (blocked / "results.json").mkdir()
    result = run("grade.py", nameless, blocked, missing)
    assert result.returncode == 1 and "80 of 80 points" in result.stdout
    errors = result.stderr.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert "nameless/assignment.json does not name an assignment: pass --ass" in errors[0]
    assert "missing is not a folder" in errors[1]
    assert "blocked/results.json: not written (Is a directory)" in errors[2]
    zero = json.loads((nameless / "results.json").read_text())
    assert zero["score"] == 0 and "does not name" in zero["output"]
