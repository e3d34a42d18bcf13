"""The rule of the house: imports only point downwards, and train.py needs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top to the bottom. A file may import what is below its own layer, and files of its own
# folder; it may not import what is above, or another file or folder of its own layer.
LAYERS = [
    {"assignments"},
    {"tools", "experiments"},
    {"baselines"},
    {"train", "probe"},
    {"runtime"},
    {"data", "model"},
    {"video", "masks", "ema"},
]
LAYER_OF = {name: height for height, names in enumerate(reversed(LAYERS)) for name in names}
FILES = [file.relative_to(ROOT) for name in LAYER_OF
         for file in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")]]


def imported(file):
    """Names of the files and folders of the project that a file imports, anywhere in its text."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & LAYER_OF.keys()


def test_every_file_and_folder_has_a_layer():
    code = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert code == LAYER_OF.keys(), "give new files a layer; keep scripts of your own elsewhere"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_only_point_downwards(file):
    own = file.parts[0].removesuffix(".py")
    for name in imported(file) - {own}:
        assert LAYER_OF[name] < LAYER_OF[own], f"{file} imports {name}, which is not below {own}"


def test_train_py_needs_16_files_besides_packages_and_none_above_it():
    code = "import sys, train; print(*(getattr(m, '__file__', None) for m in sys.modules.values()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    paths = [Path(path) for path in done.stdout.split()]
    files = {path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT)}
    files = {file for file in files if file.parts[0].removesuffix(".py") in LAYER_OF}
    names = {file.parts[0].removesuffix(".py") for file in files}
    assert all(LAYER_OF[name] <= LAYER_OF["train"] for name in names) and "probe" not in names
    assert len([file for file in files if file.name != "__init__.py"]) == 16, sorted(files)
