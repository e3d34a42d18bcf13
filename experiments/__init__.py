"""The paper's comparisons at laptop scale: tables.py says what is compared, ablations.py runs it,
report.py makes the page of the results."""

import runtime  # noqa: F401 (before torch)
