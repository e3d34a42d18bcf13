"""Import this before torch: OpenMP's threads read how long to wait for work when it is loaded.

By default they spin for milliseconds between two operations. If anything else runs on the machine,
that takes the cores from those that have work. What the user has set stays as it is.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU: iterations (docs/speed.md)
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # LLVM and Intel (macOS, conda): milliseconds
