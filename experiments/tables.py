"""What is compared with what: TABLES.

A run is a command: a program, train.py or `-m baselines.NAME`, and its flags in addition to BASE. A
claim is that one run is better than another, judged by the accuracies in the table's columns.

Left out, to keep the study at two hours: predictors of other sizes, shorter tubelets, a grid of 8 x
8 tokens, masks of random tokens or truncated as in the paper's release, less and more masking, more
steps, and what the predictor knows, which is next to nothing after so few steps.
"""

from typing import NamedTuple

# What all runs have in common: preset tiny with half the width and a quarter of the steps, hardly
# evaluated or saved on the way. Later flags win.
BASE = ("--preset tiny --data synthetic --embed-dim 64 --steps 500 --workers 0 "
        "--eval-every 1000000 --eval-clips 16 --save-every 1000000").split()

VJEPA = "train.py"
PIXELS = "-m baselines.videomae --masking multi-block"
UNTRAINED = "--steps 1 --momentum-start 1"  # the target encoder stays as it was initialized
RANDOM = f"{VJEPA} {UNTRAINED}"

# Runs with learning rates of their own, and the rates that are tried for each. Where the best is
# the lowest or the highest, more are tried (ablations.py).
TUNED = ("vjepa", "pixels", "videomae", "ijepa", "mae", "dino")
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)

# Pretraining seeds: more of the runs that most claims are about.
SEEDS = {"vjepa": 5, "pixels": 5, "videomae": 5, "random": 5}
OTHER_SEEDS = 3


def tuned_as(run, tuned=TUNED):
    """The run whose learning rate a run has: its own if it is in `tuned`, else its method's, as
    videomae-v2 has that of videomae, else vjepa's."""
    return next((name for name in (run, run.split("-")[0]) if name in tuned), "vjepa")


def run_of(row):
    """The run that a row of a table shows, "vjepa by linear" -> "vjepa"."""
    return row.split(" by ")[0]


# {column of results.csv: heading}
ACCURACIES = {
    "motion attentive 1": "motion, attentive, 100%",
    "motion attentive 0.1": "motion, attentive, 10%",
    "appearance attentive 1": "appearance, attentive, 100%",
    "appearance attentive 0.1": "appearance, attentive, 10%",
    "motion linear 0.1": "motion, linear, 10%",
    "appearance linear 0.1": "appearance, linear, 10%",
}
SECONDS = {"seconds": "seconds"}
# Has a method learned what it is trained for? Pixels predicted as 0 give a loss of 1.
LEARNED = SECONDS | {"lowest loss": "lowest loss", "gradient norm": "gradient norm at the end"}


class Table(NamedTuple):
    """One comparison. A row is a run, or "RUN by PROBE" if its columns have PROBE in their names.
    """

    title: str
    runs: dict  # {row: command}
    claims: list  # "row that should be better > row that should be worse"
    paper: str  # what the paper found
    accuracies: dict = ACCURACIES  # columns by which claims are judged
    others: dict = SECONDS  # columns of which only means are shown


TABLES = {
    1: Table(
        "Prediction target: features or pixels",
        {"vjepa": VJEPA, "pixels": PIXELS, "random": RANDOM},
        ["vjepa > pixels"],
        "Table 1 (ViT-L/16): features are above pixels by 5.1 points on Kinetics-400 (73.7, 68.6), "
        "by 1.5 on ImageNet (74.8, 73.3), but only by 0.2 on Something-Something v2 (66.2, 66.0), "
        "which is about motion. Learning rate and weight decay were swept for both, here only the "
        "learning rate.",
        others=LEARNED),
    2: Table(
        "Masks",
        {"vjepa": VJEPA,
         "causal-8": "-m baselines.masks --masking causal --context-frames 8",
         "causal-4": "-m baselines.masks --masking causal --context-frames 4",
         "tube-masks": "-m baselines.masks --masking tube"},
        ["vjepa > causal-8", "vjepa > causal-4", "vjepa > tube-masks"],
        "Table 4 (Kinetics-400, Something-Something v2): multi-block masks reach 72.9 and 67.4, "
        "causal ones with context in the first 12 frames of 16 71.9 and 63.6, in the first 6 "
        "61.3 and 49.8, random tubes (90 % masked) 51.5 and 46.4. Here the first 8 or 4 frames "
        "have context, and tubes hide as much as multi-block masks."),
    3: Table(
        "Mask sets and blocks (vjepa: 8 blocks of 0.15 and 2 of 0.7 of a frame, two sets)",
        {"vjepa": VJEPA,
         "one-block": f"{VJEPA} --num-blocks 1 1 --spatial-scale 0.65 0.8",
         "short-range": f"{VJEPA} --num-blocks 8 --spatial-scale 0.15 "
                        "--context-ratio 0.2 --target-ratio 0.5",
         "long-range": f"{VJEPA} --num-blocks 2 --spatial-scale 0.7 "
                       "--context-ratio 0.07 --target-ratio 0.7"},
        ["vjepa > one-block", "vjepa > short-range", "vjepa > long-range"],
        "No table, but a figure of 26 masks in appendix E.4 (ViT-B/16 on Kinetics-400): low "
        "coverage in space or time makes the task trivial; about 90 % of the frame and all of the "
        "time; several blocks beat one large block; two masks per clip beat one."),
    4: Table(
        "Attentive pooling or the mean of all tokens, before a linear layer",
        {"vjepa by attentive": VJEPA, "vjepa by linear": VJEPA,
         "videomae by attentive": "-m baselines.videomae",
         "videomae by linear": "-m baselines.videomae"},
        ["vjepa by attentive > vjepa by linear", "videomae by attentive > videomae by linear"],
        "Table 3 (V-JEPA, ViT-L/16): attentive pooling reaches 73.7 on Kinetics-400 and 66.2 on "
        "Something-Something v2, the mean 56.7 and 50.1. Tables 12 to 14 (Kinetics-400): V-JEPA "
        "80.8 and 56.7, VideoMAE 77.8 and 52.5.",
        {f"{task} PROBE {fraction}": f"{task}, {percent}%" for task in ("motion", "appearance")
         for fraction, percent in (("1", 100), ("0.1", 10))},
        {}),
    5: Table(
        "Momentum of the target encoder (vjepa: 0.98, constant)",
        {"vjepa": VJEPA,
         "momentum-0.996-to-1": f"{VJEPA} --momentum-schedule cosine --momentum-start 0.996",
         "momentum-0": f"{VJEPA} --momentum-start 0",
         "no-stop-gradient": "-m baselines.no_stop_gradient",
         "random": RANDOM},
        ["momentum-0.996-to-1 > vjepa", "vjepa > momentum-0", "vjepa > no-stop-gradient"],
        "Not in the paper, whose only momentum rises linearly from 0.998 to 1 (table 8). A cosine "
        "from 0.996 is a summary's."),
    6: Table(
        "Few labels",
        {"vjepa": VJEPA, "videomae": "-m baselines.videomae", "random": RANDOM},
        ["vjepa > videomae"],
        "Table 7 (Kinetics-400): with 5 % of the labels instead of 50 %, V-JEPA (384 pixels) loses "
        "12 points (80.6 to 68.2), VideoMAE 16 (78.2 to 62.3), VideoMAEv2 30 (67.8 to 37.0).",
        {"motion attentive 1": "motion, attentive, 100%",
         "motion attentive 0.1": "motion, attentive, 10%",
         "motion attentive 0.05": "motion, attentive, 5%",
         "motion attentive 0.01": "motion, attentive, 1%",
         "appearance attentive 1": "appearance, attentive, 100%",
         "appearance attentive 0.1": "appearance, attentive, 10%",
         "appearance attentive 0.05": "appearance, attentive, 5%",
         "appearance attentive 0.01": "appearance, attentive, 1%"},
        LEARNED),
    7: Table(
        "Methods",
        {"vjepa": VJEPA,
         "videomae": "-m baselines.videomae",
         "videomae-v2": "-m baselines.videomae2",
         "ijepa": "-m baselines.ijepa",
         "mae": "-m baselines.mae",
         "dino": "-m baselines.dino",
         "random": RANDOM,
         "random-frames": f"-m baselines.ijepa {UNTRAINED}"},
        ["vjepa > videomae", "vjepa > videomae-v2", "vjepa > ijepa", "vjepa > mae", "vjepa > dino"],
        "Table 5: at equal size V-JEPA is above VideoMAE on Kinetics-400 (80.8, 77.8) and on "
        "Something-Something v2 (69.5, 65.5). Table 6, best of each: on Something-Something v2 "
        "V-JEPA (71.4) is far above I-JEPA (50.0) and DINOv2 (50.6); on Kinetics-400 (82.0) it is "
        "above I-JEPA (79.7), not DINOv2 (83.4).",
        others=LEARNED),
    8: Table(
        "Unpredictable detail: noise of std 0.25 and 0.5",
        {"vjepa-noise-0.25": f"{VJEPA} --noise 0.25",
         "pixels-noise-0.25": f"{PIXELS} --noise 0.25",
         "random-noise-0.25": f"{RANDOM} --noise 0.25",
         "vjepa": VJEPA, "pixels": PIXELS, "random": RANDOM},
        ["vjepa-noise-0.25 > pixels-noise-0.25", "vjepa > pixels"],
        "Not in the paper. Features need not contain what cannot be predicted, so the gap should "
        "grow with it.",
        others=LEARNED),
    9: Table(
        "Accuracy against training time: half and all of the steps",
        {"vjepa-0.5x": f"{VJEPA} --steps 250",
         "vjepa": VJEPA,
         "pixels": PIXELS,
         "random": RANDOM},
        ["vjepa > vjepa-0.5x", "vjepa-0.5x > pixels"],
        "Figure 5: roughly 2x faster than the large pixel models."),
}

RUNS = {run_of(row): command for table in TABLES.values() for row, command in table.runs.items()}
