import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from assignments import grade, start

ROOT = Path(start.__file__).parent.parent
BLANKS = [(number, part) for number, parts in start.BLANKS.items() for part in parts]

# {assignment: (part, file, what stands there, what a student might write instead)}
WRONG = {
    1: ("a", "masks.py", "(rows < top + h)", "(rows <= top + h)"),
    2: ("b", "model.py",  # sines and cosines in turn
        "torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)",
        "torch.cat([torch.stack([a.sin(), a.cos()], -1).flatten(1) for a in angles], dim=1)"),
    3: ("a", "model.py", "features = self.target_encoder(clips)\n"  # no LayerNorm
        "            return F.layer_norm(features, features.shape[-1:])",
        "return self.target_encoder(clips)"),
    4: ("c", "heads.py", "similarity.fill_diagonal_(-1e9)", "pass"),  # a clip votes for itself
    5: ("b", "findings.py",  # the standard deviation in place of the standard error
        "math.sqrt(sum(statistics.variance(v) / len(v) for v in (better, worse)))",
        "math.sqrt(sum(statistics.variance(v) for v in (better, worse)))"),
}


EXAMPLE = ROOT / "assignments" / "example"
# (changed entries of the report, what its four tests say then)
REPORTS = [({"difference": 0.120003, "verdict": "disagree"}, [5, 10, 0, 0]),
           ({"prediction": "yes", "worse": "vjepa", "verdict": "within noise"}, [0, 0, 0, 10])]


def reference(folder):
    """What a student hands in whose solutions are the project's own."""
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    shutil.copytree(EXAMPLE, folder / "example")
    shutil.copyfile(EXAMPLE / "report.json", folder / "report.json")
    return folder


def edit(path, old, new):
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))


def begin_with(path, name, line):
    """Put a line of code at the beginning of a function."""
    lines = path.read_text().split("\n")
    lines.insert(start.body_lines(path.read_text(), name).start, 4 * " " + line)
    path.write_text("\n".join(lines))


def cheat(folder):
    """A starter with nothing written, but tests that always pass."""
    start.start(5, folder)
    for file in folder.glob("tests/test_*.py"):
        names = re.findall(r"(?m)^def (test_\w+)", file.read_text())
        file.write_text("\n".join(f"def {name}(): pass" for name in names))
    (folder / "conftest.py").write_text("def pytest_runtest_call(item):\n"
                                        "    item.obj = lambda **fixtures: None\n")
    shutil.copyfile(folder / "conftest.py", folder / "tests" / "conftest.py")
    edit(folder / "findings.py", 'raise NotImplementedError("Assignment 5, part b")',
         "import pytest; pytest.skip()")
    (folder / "report.json").symlink_to(EXAMPLE / "report.json")
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Everything that is graded for the tests below, {name: result}. All at once, as processes that
    have imported torch are at hand then."""
    folder = tmp_path_factory.mktemp("handed-in")
    dies = reference(folder / "dies")
    begin_with(dies / "heads.py", "balanced_subset", "import os; os._exit(0)")
    edit(dies / "heads.py", "D, h = x.shape[-1], self.num_heads\n        key_weight",
         "import time\n        while True:\n            time.sleep(1)\n        key_weight")
    jobs = {"dies": grade.Job(dies, 4, ("a", "c", "d")),
            "cheat": grade.Job(cheat(folder / "cheat"), 5)}
    for number, (part, file, old, new) in WRONG.items():
        jobs["right", number] = grade.Job(reference(folder / f"right{number}"), number)
        wrong = reference(folder / f"wrong{number}")
        edit(wrong / file, old, new)
        jobs["wrong", number] = grade.Job(wrong, number, (part,))
    for number, part in BLANKS:
        file, name = start.BLANKS[number][part]
        path = reference(folder / f"blank{number}{part}") / file
        path.write_text(start.blank(path.read_text(), name, "not written yet"))
        jobs["blank", number, part] = grade.Job(path.parent, number, (part,))
    for i, (changes, _) in enumerate(REPORTS):
        path = reference(folder / f"report{i}") / "report.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        jobs["report", i] = grade.Job(path.parent, 5, ("d",))
    # In a process of its own, as the one that starts others is one for all of a process's tests.
    # The sleeping test holds one of three workers; others take a second.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        done = pool.submit(grade.grade, list(jobs.values()), limit=15, workers=3).result()
    return dict(zip(jobs, done, strict=True))


@pytest.mark.parametrize("number", start.BLANKS)
def test_the_projects_own_solutions_have_all_points(number, results, capsys):
    result = results["right", number]
    assert result["score"] == 80, [entry for entry in result["tests"] if not entry["score"]]
    grade.show(grade.Job(Path("handed-in"), number), result)
    assert "80 of 80 points" in capsys.readouterr().out


@pytest.mark.parametrize("number, part", BLANKS)
def test_a_function_that_is_not_written_has_no_points(number, part, results):
    result = results["blank", number, part]
    assert result["score"] == 0 and result["tests"]
    assert any("not written yet" in entry["output"] for entry in result["tests"])


@pytest.mark.parametrize("number", WRONG)
def test_a_solution_that_is_nearly_right_loses_points(number, results):
    result = results["wrong", number]
    assert result["score"] < sum(entry["max_score"] for entry in result["tests"])
    assert not any("SyntaxError" in entry["output"] or "NameError" in entry["output"]
                   for entry in result["tests"])


def test_a_report_that_does_not_fit_its_results_loses_points(results):
    for i, (_, points) in enumerate(REPORTS):
        assert [entry["score"] for entry in results["report", i]["tests"]] == points


def test_a_crash_and_an_endless_loop_cost_their_own_points_only(results):
    assert grade.points_by_part(results["dies"]) == {"a": [0, 15], "c": [20, 20], "d": [0, 15]}
    loops, *_, crashes = results["dies"]["tests"]
    assert "stopped after 15 s" in loops["output"] and "exit code 0" in crashes["output"]


def test_tests_of_the_students_own_and_skipped_ones_earn_nothing(results):
    assert results["cheat"]["score"] == 0 and len(results["cheat"]["tests"]) == 10
    assert all(entry["status"] == "failed" for entry in results["cheat"]["tests"])


def bare(text):
    return [line.strip() for line in text.split("\n") if line.strip()]


def holds(text, wanted):
    """Whether lines follow each other in a text, whatever their indent."""
    lines = bare(text)
    return any(lines[i:i + len(wanted)] == wanted for i in range(len(lines)))


@pytest.mark.parametrize("number", start.BLANKS)
def test_a_starter_is_the_project_without_the_solutions(number, tmp_path):
    folder = tmp_path / "starter"
    start.start(number, folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} <= {"tests", "docs", "example"}
    assert not [*folder.rglob("__pycache__"), *folder.rglob("test_assignments.py")]
    assert json.loads((folder / "assignment.json").read_text()) == {"assignment": number}
    bodies = {}
    for part, (file, name) in start.BLANKS[number].items():
        source = (ROOT / file).read_text()
        bodies[part] = "\n".join(source.split("\n")[start.body_lines(source, name)])
        assert holds(source, bare(bodies[part]))
    for file in ROOT.glob("*.py"):  # with the bodies put back, all is as it was
        source = (folder / file.name).read_bytes().decode()
        for part, body in bodies.items():
            left = rf' +raise NotImplementedError\("Assignment {number}, part {part}"\)'
            source, count = re.subn(left, lambda _, body=body: body, source)
            assert count == (start.BLANKS[number][part][0] == file.name)
        assert source.encode() == file.read_bytes()
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_text(errors="ignore")
            assert not [part for part, body in bodies.items() if holds(text, bare(body))], path


@pytest.mark.parametrize("number", start.BLANKS)
def test_a_handout_has_the_points_that_are_given_and_commands_that_exist(number):
    text = (ROOT / "assignments" / start.HANDOUTS[number]).read_text()
    rows = re.findall(r"(?m)^\| (\w) \| (\w+\.py): (\w+) \| (\d+) \|$", text)
    points = grade.POINTS[number]
    assert rows == [(part, file, test, str(worth)) for part, files in points.items()
                    for file, tests in files.items() for test, worth in tests.items()]
    assert sum(int(row[-1]) for row in rows) == 80
    commands = re.findall(r"python (\w+\.py)", text)
    assert all((ROOT / file).exists() for file in commands)
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


def test_a_folder_that_names_no_assignment_is_an_error(tmp_path):
    (tmp_path / "assignment.json").write_text("[]")
    result = run("grade.py", tmp_path)
    assert result.returncode == 1 and "pass --assignment" in result.stderr
    assert result.stderr.count("\n") == 1
