"""What is compared with what: TABLES.

A run is a command: a program, train.py or `-m baselines.NAME`, and its flags in addition to BASE. A
claim is that one run is better than another, judged by the accuracies in the table's columns.
"""

from typing import NamedTuple

# What all runs have in common: preset tiny with half the width and a quarter of the steps.
# Later flags win.
BASE = ("--preset tiny --data synthetic --embed-dim 64 --steps 500 --workers 0 "
        "--eval-every 1000000 --save-every 1000000").split()

VJEPA = "train.py"
PIXELS = "-m baselines.videomae --masking multi-block"
UNTRAINED = "--steps 1 --momentum-start 1"  # the target encoder stays as it was initialized
RANDOM = f"{VJEPA} {UNTRAINED}"
FINE = "--img-size 64 --patch-size 8"  # 8 x 8 tokens in a time step instead of 6 x 6

# {column of results.csv: heading}
ACCURACIES = {
    "motion attentive 1": "motion, attentive, 100%",
    "motion attentive 0.1": "motion, attentive, 10%",
    "appearance attentive 1": "appearance, attentive, 100%",
    "appearance attentive 0.1": "appearance, attentive, 10%",
    "motion linear 0.1": "motion, linear, 10%",
    "appearance linear 0.1": "appearance, linear, 10%",
}


class Table(NamedTuple):
    """One comparison."""

    title: str
    runs: dict  # {run: command}
    claims: list  # "run that should be better > run that should be worse"
    paper: str  # what the paper found
    accuracies: dict = ACCURACIES  # columns by which claims are judged
    others: dict = {"seconds": "seconds"}  # columns of which only means are shown


TABLES = {
    1: Table(
        "Prediction target: features or pixels",
        {"vjepa": VJEPA, "pixels": PIXELS, "random": RANDOM},
        ["vjepa > pixels"],
        "Table 1 (ViT-L/16): features are 5.1 points above pixels on Kinetics-400 and 1.5 on "
        "ImageNet, but on Something-Something v2, which is about motion, only 0.2."),
    2: Table(
        "Masks, on 6 x 6 tokens and on 8 x 8",
        {"vjepa": VJEPA,
         "random-masks": "-m baselines.masks --masking random",
         "tube-masks": "-m baselines.masks --masking tube",
         "truncated": "-m baselines.masks --masking multi-block-truncated",
         "vjepa-8x8": f"{VJEPA} {FINE}",
         "random-masks-8x8": f"-m baselines.masks {FINE} --masking random",
         "tube-masks-8x8": f"-m baselines.masks {FINE} --masking tube"},
        ["vjepa > random-masks", "vjepa > tube-masks", "vjepa > truncated",
         "vjepa-8x8 > random-masks-8x8", "vjepa-8x8 > tube-masks-8x8"],
        "Table 4: multi-block masks reach 72.9 on Kinetics-400 and 67.4 on Something-Something v2, "
        "random tubes (90 % masked) 51.5 and 46.4, 21 points less. Random tokens are not in the "
        "paper."),
    3: Table(
        "Fraction of tokens that the encoder does not see (vjepa: 0.80 and 0.93)",
        {"ratio-0.50": f"{VJEPA} --num-blocks 4 1 --spatial-scale 0.15 0.4 "
                       "--context-ratio 0.5 0.5 --target-ratio 0.3 0.3",
         "ratio-0.75": f"{VJEPA} --num-blocks 6 1 --spatial-scale 0.15 0.6 "
                       "--context-ratio 0.25 0.25 --target-ratio 0.5 0.5",
         "vjepa": VJEPA,
         "ratio-0.97": f"{VJEPA} --context-ratio 0.03 0.03"},
        ["vjepa > ratio-0.50", "vjepa > ratio-0.75", "vjepa > ratio-0.97"],
        "No table, but a figure of 26 masks in appendix E.4 (ViT-B/16 on Kinetics-400): low "
        "coverage in space or time makes the task trivial; about 90 % of the frame and all of the "
        "time."),
    4: Table(
        "Predictor: depth x width (vjepa: 2 x 64)",
        {"predictor-1x64": f"{VJEPA} --predictor-depth 1",
         "predictor-2x32": f"{VJEPA} --predictor-dim 32",
         "vjepa": VJEPA,
         "predictor-2x128": f"{VJEPA} --predictor-dim 128",
         "predictor-4x64": f"{VJEPA} --predictor-depth 4"},
        ["vjepa > predictor-1x64", "vjepa > predictor-2x32", "vjepa > predictor-2x128",
         "vjepa > predictor-4x64"],
        "Not in the paper, whose only predictor is 12 x 384."),
    5: Table(
        "Momentum of the target encoder (vjepa: 0.98, constant)",
        {"vjepa": VJEPA,
         "momentum-0.98-to-1": f"{VJEPA} --momentum-schedule cosine",
         "momentum-0.996-to-1": f"{VJEPA} --momentum-schedule cosine --momentum-start 0.996",
         "momentum-0": f"{VJEPA} --momentum-start 0",
         "no-stop-gradient": "-m baselines.no_stop_gradient",
         "random": RANDOM},
        ["momentum-0.98-to-1 > vjepa", "momentum-0.996-to-1 > vjepa", "vjepa > momentum-0",
         "vjepa > no-stop-gradient"],
        "Not in the paper, whose only momentum rises linearly from 0.998 to 1 (table 8). A cosine "
        "from 0.996 is a summary's."),
    6: Table(
        "Few labels",
        {"vjepa": VJEPA, "videomae": "-m baselines.videomae", "random": RANDOM},
        ["vjepa > videomae"],
        "Table 7 (Kinetics-400): with 5 % of the labels instead of 50 %, V-JEPA loses 12 points "
        "(80.6 to 68.2), VideoMAE 16 (78.2 to 62.3), VideoMAEv2 30 (67.8 to 37.0).",
        {"motion attentive 1": "motion, attentive, 100%",
         "motion attentive 0.1": "motion, attentive, 10%",
         "motion attentive 0.05": "motion, attentive, 5%",
         "motion attentive 0.01": "motion, attentive, 1%",
         "appearance attentive 1": "appearance, attentive, 100%",
         "appearance attentive 0.1": "appearance, attentive, 10%",
         "appearance attentive 0.05": "appearance, attentive, 5%",
         "appearance attentive 0.01": "appearance, attentive, 1%"}),
    7: Table(
        "Methods",
        {"vjepa": VJEPA,
         "videomae": "-m baselines.videomae",
         "videomae2": "-m baselines.videomae2",
         "ijepa": "-m baselines.ijepa",
         "mae": "-m baselines.mae",
         "dino": "-m baselines.dino",
         "random": RANDOM,
         "random-frames": f"-m baselines.ijepa {UNTRAINED}"},
        ["vjepa > videomae", "vjepa > videomae2", "vjepa > ijepa", "vjepa > mae", "vjepa > dino"],
        "Table 5: at equal size V-JEPA is above VideoMAE on Kinetics-400 (80.8, 77.8) and on "
        "Something-Something v2 (69.5, 65.5). Table 6, best of each: on Something-Something v2 "
        "V-JEPA (71.4) is far above I-JEPA (50.0) and DINOv2 (50.6); on Kinetics-400 (82.0) it is "
        "above I-JEPA (79.7), not DINOv2 (83.4)."),
    8: Table(
        "Unpredictable detail: noise of std 0.4, 0.7 and 1",
        {"vjepa-noise-0.4": f"{VJEPA} --noise 0.4",
         "pixels-noise-0.4": f"{PIXELS} --noise 0.4",
         "random-noise-0.4": f"{RANDOM} --noise 0.4",
         "vjepa-noise-0.7": f"{VJEPA} --noise 0.7",
         "pixels-noise-0.7": f"{PIXELS} --noise 0.7",
         "random-noise-0.7": f"{RANDOM} --noise 0.7",
         "vjepa": VJEPA, "pixels": PIXELS, "random": RANDOM},
        ["vjepa-noise-0.4 > pixels-noise-0.4", "vjepa-noise-0.7 > pixels-noise-0.7",
         "vjepa > pixels"],
        "Not in the paper. Features need not contain what cannot be predicted, so the gap should "
        "grow with it.",
        others={"loss": "last loss"}),
    9: Table(
        "Accuracy against training time: from a quarter to four times the steps",
        {"vjepa-0.25x": f"{VJEPA} --steps 125",
         "vjepa-0.5x": f"{VJEPA} --steps 250",
         "vjepa": VJEPA,
         "vjepa-4x": f"{VJEPA} --steps 2000",
         "pixels-0.5x": f"{PIXELS} --steps 250",
         "pixels": PIXELS,
         "pixels-4x": f"{PIXELS} --steps 2000",
         "random": RANDOM},
        ["vjepa-0.5x > vjepa-0.25x", "vjepa > vjepa-0.5x", "vjepa-4x > vjepa",
         "vjepa-0.5x > pixels", "vjepa-4x > pixels-4x"],
        "Figure 5: roughly 2x faster than the large pixel models."),
    10: Table(
        "Tubelet length (vjepa: 4 frames)",
        {"vjepa": VJEPA,
         "tubelet-2": f"{VJEPA} --tubelet-size 2",
         "random": RANDOM,
         "random-tubelet-2": f"{VJEPA} --tubelet-size 2 {UNTRAINED}"},
        ["vjepa > tubelet-2"],
        "Not in the paper, whose tubelets have 2 frames."),
    11: Table(
        "What the predictor expects at masked tokens, over training",
        {"random": RANDOM,
         "vjepa-0.25x": f"{VJEPA} --steps 125",
         "vjepa-0.5x": f"{VJEPA} --steps 250",
         "vjepa": VJEPA,
         "vjepa-4x": f"{VJEPA} --steps 2000"},
        ["vjepa-0.5x > vjepa-0.25x", "vjepa > vjepa-0.5x", "vjepa-4x > vjepa"],
        "Not in the paper.",
        {"motion predicted": "motion, predicted",
         "motion target": "motion, target",
         "appearance predicted": "appearance, predicted",
         "appearance target": "appearance, target"}),
}

RUNS = {run: command for table in TABLES.values() for run, command in table.runs.items()}
