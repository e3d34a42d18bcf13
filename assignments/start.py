"""A student's starter tree: the project, with the functions of one assignment left to write.

    python assignments/start.py 1 DIR

In the files nothing marks what is taken out: the table below says it. A function keeps its
decorators, signature and docstring.
"""

import argparse
import ast
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# {assignment: {part: (file, function or Class.method)}}
BLANKS = {
    1: {"a": ("masks.py", "cover"),
        "b": ("masks.py", "MultiBlockMask.draw_frames"),
        "c": ("masks.py", "MultiBlockMask.is_enough"),
        "d": ("masks.py", "pick")},
    2: {"a": ("model.py", "gather_tokens"),
        "b": ("model.py", "sincos_positions"),
        "c": ("model.py", "cut_tubelets"),
        "d": ("model.py", "VisionTransformer.forward"),
        "e": ("model.py", "Predictor.forward")},
    3: {"a": ("model.py", "VJEPA.targets"),
        "b": ("model.py", "VJEPA.loss"),
        "c": ("ema.py", "momentum_at"),
        "d": ("ema.py", "update"),
        "e": ("metrics.py", "rankme")},
    4: {"a": ("heads.py", "CrossAttention.weights"),
        "b": ("heads.py", "CrossAttention.forward"),
        "c": ("heads.py", "knn_votes"),
        "d": ("heads.py", "balanced_subset"),
        "e": ("heads.py", "fit_linear")},
    5: {"a": ("findings.py", "mean_and_spread"),
        "b": ("findings.py", "verdict"),
        "c": ("ablations.py", "choose_rates")},  # part d is a report, not code
}
HANDOUTS = {1: "1-masks.md", 2: "2-model.md", 3: "3-objective.md", 4: "4-evaluation.md",
            5: "5-study.md"}
EXAMPLES = {5: "example"}  # folders that go along


def find(source, name):
    """The syntax tree of function "f" or "Class.f" in a file's text."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def body_lines(source, name):
    """Where a function's body stands, without its docstring: slice of the text's lines."""
    node = find(source, name)
    if ast.get_docstring(node) is None:
        raise ValueError(f"{name} has no docstring, so nothing would say what to write")
    # From the docstring's end on, as a comment above the first statement belongs to the solution.
    return slice(node.body[0].end_lineno, node.end_lineno)


def blank(source, name, message):
    """A file's text with one function's body replaced; all other lines stay as they are."""
    lines = source.split("\n")
    indent = " " * find(source, name).body[0].col_offset
    lines[body_lines(source, name)] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


def start(number, folder):
    """Write assignment `number`'s starter into a folder, which must be new or empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder")
    # What lies in the project is looked up first, as the folder may be inside of it.
    files = [ROOT / name for name in ("requirements.txt", "pyproject.toml", "LICENSE", "README.md")]
    files += sorted(ROOT.glob("*.py"))
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    # The assignments' own test has half-right solutions in it.
    hidden = shutil.ignore_patterns("__pycache__", ".*", "test_assignments.py")
    for name in ("tests", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=hidden)
    if number in EXAMPLES:
        shutil.copytree(HERE / EXAMPLES[number], folder / EXAMPLES[number], ignore=hidden)
    shutil.copyfile(HERE / HANDOUTS[number], folder / "assignment.md")
    (folder / "assignment.json").write_text(json.dumps({"assignment": number}) + "\n")
    for part, (file, name) in BLANKS[number].items():
        path = folder / file
        source = blank(path.read_bytes().decode(), name, f"Assignment {number}, part {part}")
        path.write_bytes(source.encode())  # bytes, so that no system changes line ends


def main(arguments=None):
    """Write a starter tree, and say what is left to write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assignment", type=int, choices=BLANKS)
    parser.add_argument("folder", metavar="DIR", help="a new or an empty folder")
    args = parser.parse_args(arguments)
    start(args.assignment, args.folder)
    print(f"{args.folder}: assignment {args.assignment}, described in assignment.md; to write:")
    for part, (file, name) in BLANKS[args.assignment].items():
        print(f"  {part}  {file}  {name}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
