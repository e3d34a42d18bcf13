from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def golden():
    """Arrays that the published release produces with random weights; see golden/README.md."""
    return np.load(GOLDEN / "reference-expected.npz")


@pytest.fixture(scope="session")
def tensors(golden):
    return {name: torch.from_numpy(golden[name]) for name in golden}
