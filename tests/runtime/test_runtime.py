import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

# Prints how long threads will spin, at the moment when torch would be loaded.
WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
import {module}
"""


@pytest.mark.parametrize("module", ["train", "probe", "tools.visualize", "experiments.ablations",
                                    "tests.conftest"])
@pytest.mark.parametrize("own, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                           ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_threads_are_kept_from_spinning_before_torch_is_loaded(module, own, expected):
    environment = {name: value for name, value in os.environ.items() if "SPINCOUNT" not in name}
    done = subprocess.run([sys.executable, "-c", WATCH.format(module=module)], cwd=ROOT, text=True,
                          env=environment | own, capture_output=True)
    assert done.stdout == f"{expected}\n", done.stderr
