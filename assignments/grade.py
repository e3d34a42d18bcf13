"""Grade a student's code by the project's own tests.

    python assignments/grade.py DIR [DIR ...]               the assignment is in DIR/assignment.json
    python assignments/grade.py DIR --assignment 1 --out results.json

Prints the points of each part and writes DIR/results.json, in Gradescope's format. The tests are
the reference's, never the student's, and each runs in a process and a tree of its own: a test that
crashes or never ends costs only its own points. Every part is graded with the project's solutions
of the other parts, so a mistake in one part costs nothing in the next.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for any way to run this file
from assignments.start import BLANKS, HERE, ROOT, code_files, function_lines

# {assignment: {part: {file in tests/: {test: points}}}}; a test with parameters counts as one.
POINTS = {
    1: {"a": {"test_masks.py": {
            "test_blocks_of_a_clip_have_one_size_and_lie_where_they_were_drawn": 14,
            "test_a_block_is_equally_likely_in_every_position": 8,
            "test_a_block_is_at_least_one_token_and_at_most_the_frame": 4,
            "test_aspect_ratios_are_those_that_were_asked_for": 4}},
        "b": {"test_masks.py": {
            "test_a_mask_is_usable_up_to_exactly_the_tokens_to_keep": 15}},
        "c": {"test_masks.py": {
            "test_context_and_targets_are_disjoint_sorted_in_range_and_of_exact_size": 10,
            "test_every_block_spans_all_time": 5,
            "test_every_token_and_every_pair_of_tokens_is_kept_equally_often": 7,
            "test_it_gives_up_if_no_try_is_usable": 3}},
        "d": {"test_masks.py": {
            "test_a_mask_depends_on_sample_id_and_seed_only": 10}}},
    2: {"a": {"test_model.py": {
            "test_gathered_tokens_are_those_at_each_clips_own_indices": 10}},
        "b": {"test_model.py": {
            "test_position_table_is_the_published_one": 14,
            "test_positions_tell_every_token_apart_on_any_grid": 6}},
        "c": {"test_model.py": {
            "test_a_token_is_made_of_its_tubelet_and_tokens_go_by_time_row_column": 8,
            "test_patch_projection_is_the_convolution_it_stands_for": 7}},
        "d": {"test_model.py": {
            "test_features_agree_with_the_release": 7,
            "test_context_features_do_not_see_masked_pixels": 6,
            "test_larger_clips_agree_with_the_release": 4,
            "test_a_clip_that_cannot_be_cut_into_tubelets_is_an_error": 3}},
        "e": {"test_model.py": {
            "test_predictions_agree_with_the_release": 8,
            "test_each_mask_set_has_its_own_mask_token": 7}}},
    3: {"a": {"test_model.py": {
            "test_targets_are_the_target_encoders_normed_features_without_gradients": 14,
            "test_features_agree_with_the_release": 6}},
        "b": {"test_model.py": {
            "test_loss_is_the_mean_over_mask_sets_of_l1_to_normed_targets": 12,
            "test_loss_and_gradients_agree_with_the_release": 8}},
        "c": {"test_ema.py": {
            "test_cosine_runs_from_start_to_end_and_is_steepest_in_the_middle": 5,
            "test_linear_agrees_with_the_release": 3,
            "test_constant_stays_and_another_schedule_is_an_error": 2}},
        "d": {"test_ema.py": {
            "test_update_averages_parameters_and_floating_buffers_and_copies_counters": 8,
            "test_after_a_half_life_half_of_a_weight_is_left": 3},
              "test_model.py": {
            "test_four_training_steps_agree_with_the_release": 4}},
        "e": {"runtime/test_metrics.py": {
            "test_rank_is_that_of_the_features": 11,
            "test_rank_of_features_that_are_not_finite_is_nan": 4}}},
    4: {"a": {"test_probe.py": {
            "test_attention_weights_are_those_of_multi_head_attention": 15}},
        "b": {"test_probe.py": {
            "test_one_query_is_attention_over_all_tokens": 10,
            "test_logits_agree_with_the_release": 5}},
        "c": {"runtime/test_metrics.py": {
            "test_a_neighbours_vote_weighs_exp_of_its_cosine_over_0_07": 10,
            "test_nearest_neighbours_vote_and_leave_themselves_out": 10}},
        "d": {"test_probe.py": {
            "test_balanced_subsets_take_the_same_share_of_each_class": 10,
            "test_which_clips_are_in_a_balanced_subset_is_up_to_the_generator": 5}},
        "e": {"test_probe.py": {
            "test_the_linear_probe_is_where_loss_and_decay_balance": 10,
            "test_the_linear_probe_learns_separable_classes_and_keeps_leading_axes": 5}}},
    5: {"a": {"experiments/test_report.py": {
            "test_means_and_deviations_are_over_the_seeds_of_a_run": 6,
            "test_the_spread_of_a_single_value_is_0": 4}},
        "b": {"experiments/test_significance.py": {
            "test_welch_gives_each_side_a_variance_of_its_own": 15,
            "test_a_single_value_has_no_variance": 5}},
        "c": {"experiments/test_ablations.py": {
            "test_the_learning_rate_with_the_best_validation_accuracy_is_chosen": 6,
            "test_each_run_has_a_learning_rate_of_its_own_trials": 9}},
        "d": {"test_written_report.py": {
            "test_the_report_has_every_entry_and_words_enough": 5,
            "test_both_runs_were_trained_with_three_seeds_or_more": 10,
            "test_the_difference_is_that_of_the_results": 10,
            "test_the_verdict_is_that_of_the_results": 10}}},
}

# With forkserver a test's process starts with these imported. The first optimizer imports
# torch._dynamo.
PRELOAD = ["torch", "torch._dynamo", "torch.testing", "torchvision.transforms.v2", "pytest",
           "numpy", "av", "tqdm", "PIL.Image"]
LONGEST_OUTPUT = 4000  # bytes of a test's output that are kept
LARGEST_FILE = 2 ** 26  # bytes that student code can write into a file, such as its output
PR_SET_CHILD_SUBREAPER = 36  # Linux: the number of a command of prctl


class Job(NamedTuple):
    """A student's folder and what to grade in it: all parts, if none are named."""

    folder: Path
    assignment: int
    parts: tuple = ()
    limit: float = 60  # seconds per test


def build_tree(job, part, tree):
    """Make a folder with the student's solution of one part and the reference's tests."""
    shutil.copytree(ROOT / "tests", tree / "tests",
                    ignore=shutil.ignore_patterns("__pycache__", "assignments"))
    for test in (HERE / "tests").glob("*.py"):
        shutil.copyfile(test, tree / "tests" / test.name)
    shutil.copyfile(ROOT / "pyproject.toml", tree / "pyproject.toml")
    source = job.folder
    if (job.assignment, part) == (5, "d"):  # a report is judged by the project's own code
        source = ROOT
        for name in report_files(job.folder):
            copy_inside(job.folder, name, tree)
        shutil.copytree(HERE / "example", tree / "reference_example", dirs_exist_ok=True)
        shutil.copyfile(ROOT / "docs/ablations/results.csv",
                        tree / "reference_example/published.csv")
    # Only files that the project has: a student's conftest.py or torch.py could fake any result.
    for name in code_files():
        copy_inside(source, name, tree)
    for other, (file, name) in BLANKS[job.assignment].items():
        if other != part:
            solve(tree / file, name, (ROOT / file).read_text(encoding="utf-8"))


def solve(file, name, reference):
    """Replace a function in a student's file by the reference's, if the file has it at all."""
    with suppress(OSError, SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
        source = file.read_text(encoding="utf-8")
        lines = source.split("\n")
        solution = reference.split("\n")[function_lines(reference, name)]
        lines[function_lines(source, name)] = solution
        file.write_text("\n".join(lines), encoding="utf-8")


def report_files(folder):
    """report.json and the results that it names."""
    try:
        results = json.loads((folder / "report.json").read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return ["report.json"]
    is_csv = isinstance(results, str) and results.endswith(".csv")
    return ["report.json", results] if is_csv else ["report.json"]


def copy_inside(folder, name, tree):
    """Copy a file if it is really in the folder: a link or a path could lead to the reference."""
    folder = folder.resolve()
    file = folder / name
    with suppress(OSError):  # a name may be too long for a file
        if file.is_file() and file.resolve() == file and file.is_relative_to(folder):
            copy = tree / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


class Outcomes:
    """A pytest plugin that counts outcomes. A skipped test has not passed."""

    def __init__(self):
        self.passed, self.others = 0, 0

    def pytest_runtest_logreport(self, report):
        """Called for setup, call and teardown of each test."""
        if report.outcome != "passed":
            self.others += 1
        elif report.when == "call":
            self.passed += 1


def run_test(tree, node, log, answer):
    """Run one test in a tree, in a process and a session of its own, and send whether it passed.

    Its output goes to the file `log`.
    """
    import resource  # not on Windows
    os.setsid()
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    gc.freeze()  # pytest collects garbage: spare it the many objects that were imported before
    os.chdir(tree)
    # The reference must not be imported in place of the student's code.
    sys.path[:] = [str(tree), *(path for path in sys.path
                                if Path(path).resolve() not in (ROOT, HERE, ROOT / "tests"))]
    ours = {"tests", *(file.parts[0].removesuffix(".py") for file in code_files())}
    for name in list(sys.modules):
        if name.split(".")[0] in ours:
            del sys.modules[name]

    import pytest
    import torch
    torch.manual_seed(0)  # tests that draw without a seed draw the same for everyone
    outcomes = Outcomes()
    code = pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", "-c", "pyproject.toml",
                        "--basetemp", str(tree.parent / "pytest"), node], plugins=[outcomes])
    sys.stdout.flush()
    answer.send(code == 0 and outcomes.passed > 0 and outcomes.others == 0)


def supervise(tree, node, log, limit, answer):
    """Run one test, end all processes that it has started, and send whether it passed and how it
    ended, if it did not by itself. No student code runs in this process."""
    if sys.platform == "linux":  # processes whose parent ends become children of this one
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    result, theirs = multiprocessing.Pipe(duplex=False)
    test = multiprocessing.get_context("fork").Process(target=run_test,
                                                       args=(tree, node, log, theirs))
    test.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    passed, end = False, f"stopped after {limit:g} s"
    try:
        if result.poll(limit):
            passed, end = result.recv() is True, ""
    except EOFError:
        test.join()
        end = f"the process ended early, with exit code {test.exitcode}"
    finally:  # also after Ctrl-C, which the test's session does not get
        test.kill()
        test.join()
        end_children(test.pid)
    answer.send((passed, end))


def end_children(session):
    """End all processes that a test has left behind: its session, and on Linux those that left it,
    which are children of this process now."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)
    while sys.platform == "linux":
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # some end meanwhile
                # "PID (NAME) STATE PARENT ...", and a name may contain anything
                parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
                if parent == os.getpid():
                    os.kill(int(stat.parent.name), signal.SIGKILL)
        try:
            os.wait()  # for one of them; its own children are found next
        except ChildProcessError:  # there are none
            return


def grade_test(context, job, part, file, test):
    """Run one test in a new process: -> whether it passed, and its output."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        # A new tree for each test, because student code could change the next one's.
        tree, log = Path(temporary).resolve() / "tree", Path(temporary, "output.txt")
        build_tree(job, part, tree)
        answer, theirs = context.Pipe(duplex=False)
        process = context.Process(target=supervise, args=(tree, f"tests/{file}::{test}", log,
                                                          job.limit, theirs))
        process.start()
        theirs.close()
        try:
            passed, end = answer.recv()
        except EOFError:
            passed, end = False, "the process that watched this test was killed"
        process.join()
        return passed, (tail(log) + end).strip()


def tail(log):
    """The last characters of a file, if there is one."""
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LONGEST_OUTPUT))
        return file.read().decode(errors="replace")


def grade(jobs, workers=None):
    """Grade several folders, tests side by side -> a result in Gradescope's format per job."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(PRELOAD)
        first = context.Process(target=int)  # starts when everything is imported
        first.start()
        first.join()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        waiting = [[(part, test, points, pool.submit(grade_test, context, job, part, file, test))
                    for part, files in POINTS[job.assignment].items()
                    if part in (job.parts or POINTS[job.assignment])
                    for file, tests in files.items() for test, points in tests.items()]
                   for job in jobs]
        return [result_of(tests) for tests in waiting]


def result_of(tests):
    """[(part, test, points, future of (passed, output))] -> dict in Gradescope's format."""
    entries = []
    for part, test, points, future in tests:
        passed, output = future.result()
        entries.append({"name": f"{part}: {test}", "score": points if passed else 0,
                        "max_score": points, "status": "passed" if passed else "failed",
                        "output": output})
    return {"score": sum(entry["score"] for entry in entries), "tests": entries}


def points_by_part(result):
    """{part: [points, maximum]}."""
    parts = {}
    for entry in result["tests"]:
        points = parts.setdefault(entry["name"].split(":")[0], [0, 0])
        points[0] += entry["score"]
        points[1] += entry["max_score"]
    return parts


def show(job, result):
    """Print the points of each part and the tests that failed."""
    maximum = sum(entry["max_score"] for entry in result["tests"])
    print(f"{job.folder}: assignment {job.assignment}, {result['score']} of {maximum} points")
    for part, (points, maximum) in points_by_part(result).items():
        print(f"  part {part}  {points:2} of {maximum}")
        for entry in result["tests"]:
            if entry["name"].startswith(part) and entry["status"] == "failed":
                print(f"          failed: {entry['name'][3:]}")


def assignment_of(folder):
    """The number that start.py wrote into a starter."""
    try:
        number = json.loads((folder / "assignment.json").read_text())["assignment"]
    except (OSError, ValueError, KeyError, TypeError):
        number = None
    if number not in list(POINTS):
        raise ValueError(f"{folder}/assignment.json does not name an assignment: pass --assignment")
    return number


def write(out, result):
    """Write results.json. Raises OSError."""
    if out.is_symlink():  # a student's link could lead anywhere
        out.unlink()
    out.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments=None):
    """Grade folders, print their points, write results.json. What is wrong with one folder does not
    keep the others from being graded; the exit code is 1 then."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a student's code")
    parser.add_argument("--assignment", type=int, choices=POINTS)
    parser.add_argument("--out", type=Path, help="instead of DIR/results.json; for a single DIR")
    parser.add_argument("--limit", type=float, default=60, help="seconds per test (60)")
    args = parser.parse_args(arguments)
    if args.out and len(args.folders) > 1:
        raise ValueError("--out names one file: grade a single DIR with it")
    jobs, results, errors = [], {}, []
    for folder in args.folders:
        if not folder.is_dir():
            errors.append(f"{folder} is not a folder")
            continue
        try:
            jobs.append(Job(folder, args.assignment or assignment_of(folder), limit=args.limit))
        except ValueError as error:
            results[folder] = {"score": 0, "tests": [], "output": str(error)}
            errors.append(f"0 points: {error}")
    for job, result in zip(jobs, grade(jobs), strict=True):
        show(job, result)
        results[job.folder] = result
    for folder, result in results.items():
        try:
            write(args.out or folder / "results.json", result)
        except OSError as error:
            errors.append(f"{args.out or folder / 'results.json'}: not written ({error.strerror})")
    if errors:
        raise ValueError("\nerror: ".join(errors))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
