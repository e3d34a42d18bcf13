"""What ablations.py runs: the paper's comparisons, as flags of train.py, and what the paper found.

A claim is a pair of runs of which the first should be better. It is judged by the accuracy's mean
over seeds, as findings.py says.
"""

from typing import NamedTuple

# Preset tiny, smaller still. Later flags win: a run's, and before them the command line's.
BASE = ("--preset tiny --embed-dim 64 --num-heads 2 --predictor-dim 64 --data synthetic:0.3 "
        "--steps 800 --batch-size 16 --momentum-start 0.99 --workers 0 --meter-every 1000000 "
        "--save-every 1000000").split()


class Run(NamedTuple):
    """One way to train, but for the seed."""

    flags: str = ""  # of train.py, beside BASE
    tuned: str = "vjepa"  # the run whose trials chose the learning rate
    length: float = 1.0  # of the steps
    as_long_as: str = ""  # instead: as many steps as take the time of this run
    trained: bool = True


PIXELS = "--method videomae --masking multi-block"
NOISES = (0.3, 1.0)  # 0.3 is the base's

RUNS = {
    "vjepa": Run(),
    "pixels": Run(PIXELS, "pixels"),
    "pixels-time": Run(PIXELS, "pixels", as_long_as="vjepa"),
    "random-masks": Run("--masking random"),
    "tube-masks": Run("--masking tube"),
    "truncated": Run("--mask-truncate batch"),
    "ratio-0.50": Run("--num-blocks 4 1 --spatial-scale 0.15 0.4 --context-ratio 0.5 0.5 "
                      "--target-ratio 0.3 0.3"),
    "ratio-0.75": Run("--num-blocks 6 1 --spatial-scale 0.15 0.6 --context-ratio 0.25 0.25 "
                      "--target-ratio 0.5 0.5"),
    "ratio-0.97": Run("--context-ratio 0.03 0.03"),
    "predictor-1x64": Run("--predictor-depth 1"),
    "predictor-8x64": Run("--predictor-depth 8"),
    "predictor-4x32": Run("--predictor-dim 32"),
    "momentum-0.996-to-1": Run("--momentum-start 0.996"),
    "momentum-0.99": Run("--momentum-schedule constant"),
    "momentum-0": Run("--momentum-schedule constant --momentum-start 0"),
    "no-stop-gradient": Run("--no-stop-gradient"),
    "videomae": Run("--method videomae", "videomae"),
    "videomae2": Run("--method videomae2", "videomae2"),
    "ijepa": Run("--method ijepa", "ijepa"),
    "mae": Run("--method mae", "mae"),
    "dino": Run("--method dino", "dino"),
    "random": Run(trained=False),
    "random-frames": Run("--method ijepa", trained=False),
    **{f"{name}-noise-{noise:g}": Run(f"{flags} --data synthetic:{noise:g}", tuned, trained=trained)
       for noise in NOISES if noise != 0.3
       for name, flags, tuned, trained in (("vjepa", "", "vjepa", True),
                                           ("pixels", PIXELS, "pixels", True),
                                           ("random", "", "vjepa", False))},
    **{f"{name}-{length:g}": Run(flags, tuned, length)
       for length in (0.25, 0.5)
       for name, flags, tuned in (("vjepa", "", "vjepa"), ("pixels", PIXELS, "pixels"))},
}

FRACTIONS = (1.0, 0.1, 0.05, 0.01)  # shares of the labels; all four only with few_labels
TRIED = (5e-4, 1e-3, 2e-3, 4e-3)  # learning rates, for every run that another's `tuned` names


class Table(NamedTuple):
    """One comparison: its rows, what is claimed of them, and what the paper found."""

    title: str
    runs: dict  # {run: how its row is called}
    claims: list  # (text, run that should be better, run that should be worse)
    paper: str
    few_labels: bool = False  # probed with 5 and 1 % of the labels, too
    axis: str = ""  # what is along the picture, where rows have a number; else bars are drawn


TABLES = {
    1: Table(
        "Prediction target: features or pixels",
        {"vjepa": "features (V-JEPA)", "pixels": "pixels, as many clips",
         "pixels-time": "pixels, as much time", "random": "random weights"},
        [("features beat pixels at equal clips", "vjepa", "pixels"),
         ("features beat pixels at equal time", "vjepa", "pixels-time")],
        "Latent targets beat pixels by 5 points and more. Here encoder, predictor and masks are "
        "the same; pixels are normalised tubelets with a squared loss."),
    2: Table(
        "Masks",
        {"vjepa": "multi-block, fixed size", "random-masks": "random", "tube-masks": "tube",
         "truncated": "multi-block, cut to the batch's shortest", "random": "random weights"},
        [("multi-block beats random", "vjepa", "random-masks"),
         ("multi-block beats tube", "vjepa", "tube-masks"),
         ("fixed size beats cut masks", "vjepa", "truncated")],
        "Multi-block beats random by 4 points and tube by 2; cut masks are what its release does, "
        "without a comparison. Here random and tube masks keep as many tokens as multi-block masks "
        "(tubes: as near as whole places allow)."),
    3: Table(
        "Share of tokens that the encoder does not see",
        {"ratio-0.50": "0.50", "ratio-0.75": "0.75", "vjepa": "0.87", "ratio-0.97": "0.97"},
        [("0.87 beats 0.50", "vjepa", "ratio-0.50"), ("0.87 beats 0.75", "vjepa", "ratio-0.75"),
         ("0.87 beats 0.97", "vjepa", "ratio-0.97")],
        "Best at 0.85 to 0.95. Here 0.87 is the mean of 0.80 and 0.93; for lower shares, blocks "
        "are fewer and smaller; for 0.97, less context is kept of the same blocks.",
        axis="masked share"),
    4: Table(
        "Predictor: depth x width",
        {"predictor-1x64": "1 x 64", "predictor-4x32": "4 x 32", "vjepa": "4 x 64",
         "predictor-8x64": "8 x 64"},
        [("4 x 64 beats 1 x 64", "vjepa", "predictor-1x64"),
         ("4 x 64 beats 4 x 32", "vjepa", "predictor-4x32"),
         ("4 x 64 beats 8 x 64", "vjepa", "predictor-8x64")],
        "12 x 384 beats smaller and larger, beside an encoder of 24 x 1024; the encoder here is "
        "4 x 64."),
    5: Table(
        "Momentum of the target encoder",
        {"vjepa": "cosine, 0.99 to 1", "momentum-0.996-to-1": "cosine, 0.996 to 1",
         "momentum-0.99": "constant 0.99",
         "momentum-0": "none: the encoder of the step before (0)",
         "no-stop-gradient": "none, and no stop-gradient", "random": "random weights"},
        [("a rising momentum beats a constant", "vjepa", "momentum-0.99"),
         ("0.996, the paper's start, beats 0.99", "momentum-0.996-to-1", "vjepa"),
         ("an average beats none", "vjepa", "momentum-0"),
         ("stop-gradient beats its lack", "vjepa", "no-stop-gradient")],
        "A cosine from 0.996 to 1 beats constants and lower starts, over 90,000 steps. The base "
        "here starts at 0.99, lest in so few steps the target encoder hardly leave its start."),
    6: Table(
        "Few labels",
        {"vjepa": "V-JEPA", "videomae": "VideoMAE", "random": "random weights"},
        [("with all labels V-JEPA is better", "vjepa", "videomae")],
        "With 10 % of the labels V-JEPA loses 12 % of its accuracy, VideoMAEv2 30 %.",
        few_labels=True),
    7: Table(
        "Methods",
        {"vjepa": "V-JEPA", "videomae": "VideoMAE", "videomae2": "VideoMAEv2", "ijepa": "I-JEPA",
         "mae": "MAE", "dino": "DINO", "random": "random weights, clips",
         "random-frames": "random weights, frames"},
        [("V-JEPA beats VideoMAE", "vjepa", "videomae"),
         ("V-JEPA beats VideoMAEv2", "vjepa", "videomae2"),
         ("V-JEPA beats I-JEPA", "vjepa", "ijepa"), ("V-JEPA beats MAE", "vjepa", "mae"),
         ("V-JEPA beats DINO", "vjepa", "dino")],
        "V-JEPA beats pixel methods on both, and image methods on motion. I-JEPA, MAE and DINO are "
        "trained on single frames, and probed on all frames of a clip, each encoded for itself."),
    8: Table(
        "Unpredictable detail: flicker over the clips",
        {f"{name}-noise-{noise:g}" if noise != 0.3 else name: f"{label}, flicker {noise:g}"
         for noise in NOISES for name, label in (("vjepa", "features"), ("pixels", "pixels"),
                                                 ("random", "random weights"))},
        [(f"features beat pixels with flicker {noise:g}", *(
            name if noise == 0.3 else f"{name}-noise-{noise:g}" for name in ("vjepa", "pixels")))
         for noise in NOISES],
        "The reason that it gives for latent targets: what cannot be predicted need not be. So "
        "the gap to pixels should grow with the noise.", axis="flicker, std"),
    9: Table(
        "Accuracy against training time",
        {**{f"vjepa-{length:g}": f"features, {length:g} of the steps" for length in (0.25, 0.5)},
         "vjepa": "features, all steps",
         **{f"pixels-{length:g}": f"pixels, {length:g} of the steps" for length in (0.25, 0.5)},
         "pixels": "pixels, all steps", "pixels-time": "pixels, as much time as features",
         "random": "random weights"},
        [("features, half of the steps, beat pixels, all", "vjepa-0.5", "pixels"),
         ("features, half of the steps, beat pixels with twice their time", "vjepa-0.5",
          "pixels-time")],
        "V-JEPA needs 1.5 to 6 times less training time than pixel methods for the same accuracy. "
        "Each row is a run of its own, with its own schedules.", axis="training time, s"),
}
