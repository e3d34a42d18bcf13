import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("file, says, picture", [
    ("masks.py", "fixed size:  39", "out/masks.png"), ("ema.py", "0.99800", "out/ema.png"),
    ("data.py", "8 motions", "out/clips.png"), ("model.py", "(1, 784, 1024)", "out/model.png")])
def test_each_file_run_as_a_script_shows_its_idea(file, says, picture, tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / file)], cwd=tmp_path, capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 0 and not result.stderr
    assert says in result.stdout
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
