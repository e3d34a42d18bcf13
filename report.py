"""What probe.py prints, writes and draws: tables, probe.json, confusion matrices, label curves."""

import json

import numpy as np

# These are probed with every share of the labels; the others with all labels only.
LEARNERS = {"trained": "trained", "random_init": "random init"}
COLUMNS = {**LEARNERS, "one_frame": "one frame", "motion_energy": "motion energy"}


def column(view, fraction):
    """The name of a result in probe.json: 'trained' with all labels, 'trained_10' with 10 %."""
    return view if fraction == 1 else f"{view}_{100 * fraction:g}"


def summarise(scores):
    """{(kind, probe, column): (seeds, folds) accuracies} -> {kind: {probe: {column: mean, ...}}}.

    column_std is the spread over seeds of the mean over folds; column_folds_std, where there are
    several folds, the spread over folds of the mean over seeds.
    """
    results = {}
    for (kind, probe, name), values in scores.items():
        row = results.setdefault(kind, {}).setdefault(probe, {})
        row[name] = values.mean()
        row[f"{name}_std"] = _spread(values.mean(1))
        if values.shape[1] > 1:
            row[f"{name}_folds_std"] = _spread(values.mean(0))
    return results


def _spread(values):
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def print_tables(results, fractions, seeds, folds):
    """results as from `summarise`; fractions: shares of the labels, 1.0 first."""
    of, unit = ("_folds_std", "folds") if folds > 1 else ("_std", "probe seeds")

    def cell(row, name):
        return f"{row[name]:.3f} +- {row[name + of]:.3f}" if name in row else "-"

    rows = [(kind, probe, row) for kind, probes in results.items() for probe, row in probes.items()]
    print(f"accuracy with all labels: mean +- std over {folds if folds > 1 else seeds} {unit}")
    print(f"{'':22}" + "".join(f"{heading:>17}" for heading in COLUMNS.values()))
    for kind, probe, row in rows:
        print(f"{kind + ', ' + probe:22}" + "".join(f"{cell(row, name):>17}" for name in COLUMNS))
    if len(fractions) == 1:
        return
    print("\naccuracy with a part of the labels, and its change relative to all labels")
    headings = [f"{100 * share:g} %: {LEARNERS[view]}" for share in fractions[1:]
                for view in LEARNERS]
    print(f"{'':22}" + "".join(f"{heading:>25}" for heading in headings))
    for kind, probe, row in rows:
        cells = [f"{cell(row, column(view, share))}  "
                 f"{row[column(view, share)] / max(row[view], 1e-9) - 1:+5.0%}"
                 for share in fractions[1:] for view in LEARNERS]
        print(f"{kind + ', ' + probe:22}" + "".join(f"{text:>25}" for text in cells))


def write_json(folder, args, results, confusion=None, class_names=None):
    """probe.json: how it was made, the results, and the share of each class that was recognised."""
    keep = ("checkpoint", "data", "test_data", "split", "protocol", "segments", "views", "seeds",
            "label_fraction", "probe")
    content = {"made_with": {name: getattr(args, name) for name in keep}, "results": results}
    if confusion:
        content["per_class"] = {
            kind: dict(zip(class_names[kind], recognised(counts), strict=True))
            for kind, counts in confusion.items()}
    (folder / "probe.json").write_text(json.dumps(content, indent=1) + "\n")


def recognised(counts):
    """Confusion counts (classes, classes), row: true class -> share recognised; None: no clip."""
    return [right / total if total else None for right, total in
            zip(counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)]


def draw_confusion(confusion, class_names, file, title="attentive probe, all labels"):
    """A panel for each kind of labels: of the clips of a class (row), which share got which class.

    confusion: {kind: (classes, classes) counts}. More than 40 classes are not named.
    """
    from matplotlib.figure import Figure

    widest = max(len(counts) for counts in confusion.values())
    side = 2.6 + 0.42 * min(widest, 40)
    figure = Figure((side * len(confusion), side), layout="constrained")
    for axis, (kind, counts) in zip(figure.subplots(1, len(confusion), squeeze=False)[0],
                                    confusion.items(), strict=True):
        shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        mean = counts.diagonal().sum() / counts.sum().clamp_min(1)
        axis.set(title=f"{kind}: {mean:.1%} right", xlabel="predicted", ylabel="true class")
        names = class_names[kind]
        if len(names) > 40:
            continue
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), names)
        for i, j in np.argwhere(shares >= 0.005) if len(names) <= 12 else ():
            axis.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=9,
                      color="white" if shares[i, j] > 0.6 else "black")
    figure.suptitle(f"{title}: % of each class's clips")
    figure.savefig(file, dpi=100)


def draw_label_efficiency(results, fractions, file):
    """Accuracy over the share of labels used, a panel for each kind of labels and probe."""
    from matplotlib.figure import Figure

    shares = sorted(fractions)
    probes = list(next(iter(results.values())))
    figure = Figure((3.6 * len(probes) + 1, 3.2 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), len(probes), squeeze=False, sharex=True, sharey="row")
    for axes, (kind, by_probe) in zip(panels, results.items(), strict=True):
        for axis, (probe, row) in zip(axes, by_probe.items(), strict=True):
            for (view, label), style, colour in zip(LEARNERS.items(), ("o-", "s--"),
                                                    ("#0072B2", "#D55E00"), strict=True):
                names = [column(view, share) for share in shares]
                axis.errorbar([100 * share for share in shares], [row[name] for name in names],
                              [row[f"{name}_std"] for name in names], fmt=style, color=colour,
                              capsize=3, label=label)
            axis.set(title=f"{kind}, {probe}", xscale="log")
            axis.set_xticks([100 * share for share in shares],
                            [f"{100 * share:g}" for share in shares], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("accuracy")
    for axis in panels[-1]:
        axis.set_xlabel("% of the labels")
    panels[0, 0].legend()
    figure.suptitle("Frozen features with fewer labels: mean and std over probe seeds")
    figure.savefig(file, dpi=100)
