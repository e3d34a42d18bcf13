"""Write a student's starter: the project without the solutions of one assignment.

    python assignments/start.py 1 DIR

Nothing in the files marks what was removed; BLANKS below lists it. The functions keep their
decorators, signatures and docstrings.
"""

import argparse
import ast
import json
import shutil
import sys
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# {assignment: {part: (file, function or Class.method)}}
BLANKS = {
    1: {"a": ("masks.py", "MultiBlockMask.sample_blocks"),
        "b": ("masks.py", "MultiBlockMask.is_usable"),
        "c": ("masks.py", "MultiBlockMask.sample_clip"),
        "d": ("masks.py", "MultiBlockMask.sample")},
    2: {"a": ("model.py", "gather_tokens"),
        "b": ("model.py", "sincos_pos_embed"),
        "c": ("model.py", "patchify"),
        "d": ("model.py", "VisionTransformer.forward"),
        "e": ("model.py", "Predictor.forward")},
    3: {"a": ("model.py", "VJEPA.targets"),
        "b": ("model.py", "VJEPA.forward"),
        "c": ("ema.py", "momentum_at"),
        "d": ("ema.py", "update"),
        "e": ("runtime/metrics.py", "rankme")},
    4: {"a": ("probe.py", "CrossAttention.weights"),
        "b": ("probe.py", "CrossAttention.forward"),
        "c": ("runtime/metrics.py", "knn_votes"),
        "d": ("probe.py", "balanced_subset"),
        "e": ("probe.py", "fit_linear")},
    5: {"a": ("experiments/report.py", "mean_and_spread"),
        "b": ("experiments/significance.py", "welch"),
        "c": ("experiments/ablations.py", "choose_rates")},  # part d is a report, not code
}
HANDOUTS = {1: "1-masks.md", 2: "2-model.md", 3: "3-objective.md", 4: "4-evaluation.md",
            5: "5-study.md"}
EXAMPLES = {5: "example"}  # folders that are copied along


def code_files():
    """The project's code without tests and assignments: sorted paths, relative to ROOT."""
    packages = [file.parent for file in ROOT.glob("*/__init__.py")]
    files = [file for folder in packages for file in folder.rglob("*.py")]
    return sorted(file.relative_to(ROOT) for file in [*ROOT.glob("*.py"), *files])


@lru_cache(1000)  # grading asks for the same functions again and again
def find(source, name):
    """The syntax tree of the function "f" or "Class.f" in a file's text.

    Raises SyntaxError if the text does not parse, LookupError if it has no such function.
    """
    node = ast.parse(source)
    for part in name.split("."):
        node = [child for child in node.body if getattr(child, "name", None) == part][0]
    return node


def function_lines(source, name):
    """Where a function is, with its decorators: slice of the text's lines."""
    node = find(source, name)
    return slice(min(n.lineno for n in [node, *node.decorator_list]) - 1, node.end_lineno)


def body_lines(source, name):
    """Where a function's body is, without its docstring: slice of the text's lines."""
    node = find(source, name)
    if ast.get_docstring(node) is None:
        raise ValueError(f"{name} has no docstring, so nothing would say what to write")
    # From the end of the docstring, because a comment above the first statement is part of the
    # solution.
    return slice(node.body[0].end_lineno, node.end_lineno)


def blank(source, name, message):
    """A file's text with one function's body replaced; all other lines stay as they are."""
    lines = source.split("\n")
    indent = " " * find(source, name).body[0].col_offset
    lines[body_lines(source, name)] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


def start(number, folder):
    """Write the starter of assignment `number` into a folder, which must be new or empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder")
    files = [*code_files(), *map(Path, ("requirements.txt", "pyproject.toml", "LICENSE",
                                        "README.md"))]
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / file)
    # The tests of the assignments contain half-right solutions; pages link to the assignments.
    hidden = shutil.ignore_patterns("__pycache__", ".*", "assignments", "test_readme.py",
                                    "test_docs.py")
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
    """Write a starter and list what is left to write."""
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
