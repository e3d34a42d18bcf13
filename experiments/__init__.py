"""The paper's comparisons at laptop scale: tables.py says what is compared, ablations.py runs it,
report.py makes the page of the results, significance.py says which differences are clear.
references.py and oracle.py measure what can be reached on these clips."""

import runtime  # noqa: F401 (before torch)
