import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data import DataError
from tools import figures

ROOT = Path(figures.__file__).parent.parent


def run(folder, *arguments):
    command = [sys.executable, "-m", "tools.figures", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment,
                          timeout=120)


def test_masks_are_drawn_and_their_context_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures.main(["masks"])
    printed = capsys.readouterr().out.splitlines()
    fixed, truncated = ([float(n) for n in line.split(":")[-1].split()]
                        for line in printed if line.startswith("short range"))
    assert max(fixed) - min(fixed) < 1 and 38.5 < fixed[0] < 39.8  # 313 tokens in 8 time steps
    assert truncated[0] > 60 and truncated[-1] < 10  # hardly anything of the last time step
    assert Image.open("out/masks.png").width > 800


def test_a_data_set_is_summarised_and_drawn(videos, tmp_path):
    done = run(tmp_path, "clips", videos, "--img-size", 32, "--out", tmp_path / "a.png")
    assert "2 classes: a (6), b (6)" in done.stdout and "1 unreadable" in done.stdout
    assert "h264, 30 frames/s" in done.stdout and done.stderr == ""
    assert Image.open(tmp_path / "a.png").width > 400
    assert run(tmp_path, "clips", "nowhere").stderr == "error: nowhere: no such file or folder\n"


def test_synthetic_clips_are_drawn_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures.main(["clips", "--img-size", "40", "--num-frames", "4"])
    assert "motion: 8 classes" in capsys.readouterr().out
    assert Image.open("out/clips.png").height > 400


def test_clips_that_all_fail_are_an_error(videos):
    dataset = figures.open_clips([str(videos)], 4, 1, 32, train=False)
    for path in dataset.paths:
        Path(path).write_text("not a video")
    with pytest.raises(DataError, match="none of 8 clips can be read: .*mp4"):
        figures.draw_clips(dataset, "unused.png")


def test_a_picture_without_a_suffix_is_a_png_and_an_error_leaves_no_folder(
        videos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures.main(["clips", str(videos), "--img-size", "32", "--out", "new/x"])
    assert capsys.readouterr().out.endswith("drawn: new/x.png\n")
    assert [file.name for file in Path("new").iterdir()] == ["x.png"]
    with pytest.raises(SystemExit):
        figures.main(["clips", str(videos), "--out", "other/x.txt"])
    assert "--out other/x.txt must end in .png" in capsys.readouterr().err
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        figures.main(["clips", "nowhere", "--out", "other/x.png"])
    assert not Path("other").exists()


def test_sizes_below_1_exit_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        figures.main(["clips", "--num-frames", "0"])
    assert error.value.code == 2 and "--num-frames" in capsys.readouterr().err
