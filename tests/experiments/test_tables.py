import importlib
from pathlib import Path

import baselines
from experiments.tables import RUNS, SEEDS, TABLES, TUNED, run_of, tuned_as


def test_every_table_compares_runs_that_are_in_it():
    assert sorted(TABLES) == list(range(1, 10))
    for table in TABLES.values():
        assert all(RUNS[run_of(row)] == command for row, command in table.runs.items())
        assert {run for claim in table.claims for run in claim.split(" > ")} <= set(table.runs)


def test_every_baseline_is_in_a_table():
    files = Path(baselines.__file__).parent.glob("[!_]*.py")
    modules = {command.split()[1] for command in RUNS.values() if command.startswith("-m ")}
    assert modules == {f"baselines.{file.stem}" for file in files}
    assert all(importlib.import_module(module).build for module in modules)
    assert {command.split()[0] for command in RUNS.values()} == {"-m", "train.py"}


def test_what_the_paper_says_names_its_source():
    for table in TABLES.values():
        assert table.paper.startswith(("Table ", "Figure ", "No table, but a figure",
                                       "Not in the paper"))


def test_a_learning_rate_is_that_of_the_run_of_its_method_or_of_vjepa():
    assert {*TUNED, *SEEDS} <= RUNS.keys() and set(map(tuned_as, RUNS)) == set(TUNED)
    for run, source in (("dino", "dino"), ("videomae-v2", "videomae"), ("random", "vjepa"),
                        ("pixels-noise-0.25", "pixels"), ("tube-masks", "vjepa")):
        assert tuned_as(run) == source
    assert tuned_as("mae", {"vjepa": {}, "dino": {}}) == "vjepa"
