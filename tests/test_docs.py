"""docs/lesson.md is run from top to bottom, docs/questions.md as far as its commands can be."""

import importlib
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import probe
import train
from assignments import start
from tests.runs import FAST

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text()
         for name in ("lesson", "questions", "real")}


def blocks(page):
    """Code blocks of a page, in order: [(language, text)]."""
    return re.findall(r"(?ms)^```(\w+)\n(.*?)^```", page)


def commands(text):
    """The commands in a text, as (module, arguments): those of bash blocks and those in lines."""
    found = [line for language, block in blocks(text) if language == "bash"
             for line in block.splitlines()]
    found += re.findall(r"(?<!`)`(python [^`]+)`", text)
    for line in found:
        program, *arguments = shlex.split(line, comments=True)[1:]
        if program == "-m":
            program, *arguments = arguments
        yield importlib.import_module(program.removesuffix(".py")), arguments


def expanded(text):
    """The commands that the bash blocks of a page run, loops and variables expanded by bash."""
    script = "\n".join(block for language, block in blocks(text) if language == "bash")
    lines = subprocess.run(["bash", "-ec", 'python() { echo "python $*"; }\n' + script],
                           capture_output=True, text=True, check=True).stdout
    return commands(f"```bash\n{lines}```")


def is_method(module):
    """Whether it trains: train.py, or a baseline."""
    return module is train or module.__name__.startswith("baselines.")


def run_briefly(module, arguments):
    """Run a command in this process, with a small model, for two steps."""
    if is_method(module):
        config, run_dir, _ = train.parse_args([*arguments, *FAST, "--steps", "2"], module.Config)
        train.main(config, run_dir, build=module.build)
    elif module is probe:
        probe.main(probe.parse_args([*arguments, "--controls", "one_frame", "--label-fraction"]))
    else:
        module.main(*[arguments] * bool(arguments))


def test_every_block_of_the_lesson_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("video.synthetic.Synthetic.splits", {"train": 40, "val": 8, "test": 16})
    monkeypatch.setattr("tools.predictor.SURPRISE_CLIPS", 4)
    monkeypatch.setattr("probe.MIN_STEPS", 2)
    for language, text in blocks(PAGES["lesson"]):
        if language == "python":
            exec(text.replace("400", "4").replace("range(32)", "range(4)"), {})
        else:
            for module, arguments in commands(f"```bash\n{text}```"):
                run_briefly(module, arguments)
    printed = capsys.readouterr().out
    # What holds for any sizes: nothing is visible behind blocks, nor to the context encoder.
    assert re.search(r"MultiBlockMask +0.00", printed)
    assert re.search(r"context_features +change by up to 0.00", printed)
    assert re.search(r"predictions +change by up to 0.00", printed)
    assert "without positions by 0.00" in printed
    for picture in ("positions.png", "runs/fixed/curves.png", "runs/tiny-seed0/readouts.png"):
        assert Path(picture).exists(), picture


def test_clips_and_masks_give_the_numbers_in_the_lesson(capsys):
    seen = re.findall(r"(?m)^- \*\*You should have seen\*\* (.*)", PAGES["lesson"])
    scripts = [text for language, text in blocks(PAGES["lesson"]) if language == "python"]
    for script, line in zip(scripts[:2], seen, strict=False):
        exec(script, {})
        for number in re.findall(r"\b\d\.\d\d$", capsys.readouterr().out, re.M):
            assert number in line


@pytest.mark.parametrize("name", PAGES)
def test_commands_have_flags_that_exist(name, capsys):
    for module, arguments in expanded(PAGES[name]) if name == "real" else commands(PAGES[name]):
        if module is probe:
            probe.parse_args(arguments)
        elif is_method(module):
            train.parse_args(arguments, module.Config)
        elif any(word.startswith("--") for word in arguments):
            with pytest.raises(SystemExit):
                module.main(["--help"])
            text = capsys.readouterr().out
            assert all(f"{word} " in text for word in arguments if word.startswith("--")), arguments


def test_own_clips_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = next(text for _, text in blocks(PAGES["questions"]) if "DepthClips" in text)
    config, *_ = train.parse_args([*FAST, "--img-size", "60", "--patch-size", "20", "--num-frames",
                                   "16", "--steps", "3"])
    monkeypatch.setitem(train.PRESETS, "tiny", config)
    monkeypatch.setattr(train, "open_datasets", None)  # so that it is restored
    exec(script, {})
    assert (tmp_path / "runs/depth/checkpoint-0000003.pt").exists()


def test_code_within_lines_runs():
    model, _ = train.build(train.parse_args(FAST)[0])
    past, future = torch.arange(32).expand(2, -1).split(16, dim=1)
    names = {"model": model, "encoder": model.encoder, "past": past, "future": future,
             "clips": torch.zeros(2, 3, 4, 16, 16), "frame": torch.zeros(2, 3, 16, 16)}
    snippets = re.findall(r"`((?:encoder|model\.predictor)\([^`]+)`", PAGES["questions"])
    shapes = [eval(code, names).shape for code in snippets]
    assert (2, 16, 24) in shapes and (2, 24) in shapes and (2, *model.encoder.grid, 24) in shapes


def test_an_encoder_is_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_briefly(train, [])
    script = next(text for _, text in blocks(PAGES["questions"]) if "torch.export" in text)
    if not find_spec("onnxscript"):
        script = script.rsplit("\n", 2)[0]
    exec(script.replace("16, 60, 60", "4, 16, 16"), {})
    assert Path("encoder.pt2").exists()


@pytest.mark.parametrize("name", PAGES)
def test_functions_are_where_they_are_linked(name):
    for function, file in re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", PAGES[name]):
        start.find((ROOT / file).read_text(), function)
