"""Every recipe of the README is applied to a copy of the project, and its commands are run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import FAST

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = re.findall(r"(?ms)\*\*([A-Z][\w ]+)\.\*\*.*?^```diff\n(.*?)^```\n```bash\n(.*?)^```",
                     README)


def apply(diff, folder):
    """Apply a diff without line numbers: `--- file`, which may be new, then hunks, with `@@` in
    between."""
    file, hunks = diff.split("\n", 1)
    path = folder / file.removeprefix("--- ")
    source = path.read_text() if path.exists() else ""
    for hunk in re.split(r"(?m)^@@.*\n", hunks):
        old, new = ("".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in kinds)
                    for kinds in (" -", " +"))
        assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {path.name}"
        source = source.replace(old, new)
    path.write_text(source)


@pytest.fixture
def project(tmp_path):
    """A copy of the project's code."""
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, tmp_path)
    for folder in ("runtime", "video", "baselines", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder,
                        ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


# Runs scripts one after the other in one process, which imports torch only once.
SCRIPTS = """
import pytest, runpy, sys
sys.path.insert(0, "")
for arguments in {commands}:
    print("<<<", arguments[0])
    if arguments[0] == "pytest":
        pytest.main(["-p", "no:cacheprovider", *arguments[1:]])
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
"""


def run(folder, commands):
    """Run scripts with their arguments in a folder -> {script: what it printed}."""
    result = subprocess.run([sys.executable, "-c", SCRIPTS.format(commands=commands)], cwd=folder,
                            capture_output=True, text=True, timeout=120,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return dict(part.split("\n", 1) for part in result.stdout.split("<<< ")[1:])


def test_there_are_recipes_for_everything_people_change():
    assert [name for name, *_ in RECIPES] == [
        "Change the loss", "Change the masks", "Change the predictor", "Add a method"]


@pytest.mark.parametrize("name, diff, commands", RECIPES, ids=[name for name, *_ in RECIPES])
def test_a_recipe_applies_and_its_commands_run(name, diff, commands, project):
    apply(diff, project)
    commands = [command.removeprefix("python ").split() for command in commands.split(" && ")]
    printed = run(project, [
        [*command, *[*FAST, "--steps", "2"] * (command[0] in ("train.py", "-m"))]
        for command in commands if command[0] != "probe.py"])  # tested elsewhere, and slow
    if name == "Change the loss":
        failed = re.findall(r"FAILED tests/test_model.py::(\w+)", printed["pytest"])
        assert failed == ["test_loss_and_gradients_agree_with_the_release",
                          "test_four_training_steps_agree_with_the_release",
                          "test_loss_is_the_mean_over_mask_sets_of_l1_to_normed_targets"]
    if name == "Change the masks":
        rows = printed["masks.py"].strip().splitlines()[1:15]
        assert all(token in "#·" for row in rows[4:-4] for token in row.split()[4:-4])


def anchors(page):
    """What the headings of a page are called in links, by GitHub's rules."""
    titles = re.findall(r"(?m)^#+ (.*)", re.sub(r"(?ms)^```.*?^```", "", page.read_text()))
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_link_has_its_file_and_heading():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("assignments/*.md")]:
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def test_every_picture_in_docs_is_on_a_page():
    pages = README + "".join(page.read_text() for page in ROOT.glob("docs/*.md"))
    for picture in [*ROOT.glob("docs/*.png"), *ROOT.glob("docs/*.gif")]:
        assert picture.name in pages, picture
