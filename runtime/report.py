"""What probe.py prints, writes and draws: tables, probe.json, confusion, label efficiency."""

import json

import numpy as np

# These encoders are probed with every fraction of the labels; the others with all labels only.
LEARNERS = {"trained": "trained", "random_init": "random init"}
COLUMNS = {**LEARNERS, "one_frame": "one frame", "motion_energy": "motion energy"}


def column(name, fraction):
    """An encoder's name in probe.json: 'trained' with all labels, 'trained_10' with 10 %."""
    return name if fraction == 1 else f"{name}_{100 * fraction:g}"


def write(folder, scores, confusion, class_names, label_fraction, made_with):
    """Print the tables; write probe.json, confusion.png and labels.png to a folder.

    scores: as in summarize; confusion, class_names: {task: ...}, as in draw_confusion;
    label_fraction: fractions of the labels that were used besides all of them; made_with: a dict
    for probe.json. Returns the results of summarize.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = summarize(scores)
    fractions = sorted({1.0, *label_fraction}, reverse=True)
    seeds, folds = next(iter(scores.values())).shape
    print_tables(results, fractions, seeds, folds)
    write_json(folder, made_with, results, confusion, class_names)
    draw_confusion(confusion, class_names, folder / "confusion.png")
    files = ["probe.json", "confusion.png"]
    if len(fractions) > 1:
        draw_label_efficiency(results, fractions, folder / "labels.png")
        files.append("labels.png")
    print(f"written to {folder}/: {', '.join(files)}")
    return results


def summarize(scores):
    """{(task, probe, column): (seeds, folds) accuracies} -> {task: {probe: {column: mean, ...}}}.

    column_std is the std over seeds of the mean over folds; column_folds_std, if there are several
    folds, the std over folds of the mean over seeds.
    """
    results = {}
    for (task, probe, name), values in scores.items():
        row = results.setdefault(task, {}).setdefault(probe, {})
        row[name] = values.mean()
        row[f"{name}_std"] = _std(values.mean(1))
        if values.shape[1] > 1:
            row[f"{name}_folds_std"] = _std(values.mean(0))
    return results


def _std(values):
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def print_tables(results, fractions, seeds, folds):
    """Print accuracies with all labels, and with a fraction of them where they were measured.

    results: from summarize; fractions: of the labels, 1.0 first.
    """
    std, unit = ("_folds_std", "folds") if folds > 1 else ("_std", "probe seeds")

    def cell(row, name):
        return f"{row[name]:.3f} +- {row[name + std]:.3f}" if name in row else "-"

    rows = [(f"{task}, {probe}", row) for task, probes in results.items()
            for probe, row in probes.items()]
    print(f"accuracy with all labels: mean +- std over {folds if folds > 1 else seeds} {unit}")
    print(f"{'':22}" + "".join(f"{heading:>17}" for heading in COLUMNS.values()))
    for title, row in rows:
        print(f"{title:22}" + "".join(f"{cell(row, name):>17}" for name in COLUMNS))
    if len(fractions) == 1:
        return
    print("\naccuracy with a fraction of the labels, and its change relative to all labels")
    learners = [name for name in LEARNERS if name in rows[0][1]]
    headings = [f"{100 * fraction:g} %: {LEARNERS[name]}" for fraction in fractions[1:]
                for name in learners]
    print(f"{'':22}" + "".join(f"{heading:>25}" for heading in headings))
    for title, row in rows:
        cells = [f"{cell(row, column(name, fraction))}  "
                 f"{row[column(name, fraction)] / max(row[name], 1e-9) - 1:+5.0%}"
                 for fraction in fractions[1:] for name in learners]
        print(f"{title:22}" + "".join(f"{text:>25}" for text in cells))


def write_json(folder, made_with, results, confusion=None, class_names=None):
    """Write probe.json: how it was made, the results, and the accuracy of each class.

    made_with: a dict of settings; results: a dict; confusion, class_names: as in draw_confusion.
    """
    content = {"made_with": made_with, "results": results}
    if confusion:
        content["per_class"] = {
            task: dict(zip(class_names[task], per_class_accuracy(counts), strict=True))
            for task, counts in confusion.items()}
    (folder / "probe.json").write_text(json.dumps(content, indent=1) + "\n")


def per_class_accuracy(counts):
    """Confusion counts (classes, classes), row: true class -> accuracies; None without clips."""
    return [right / total if total else None for right, total in
            zip(counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)]


def draw_confusion(confusion, class_names, file, title="attentive probe, all labels"):
    """Draw a panel for each task: the predictions for the clips of each class, in percent.

    confusion: {task: (classes, classes) counts, row: true class}; class_names: {task: names}. More
    than 40 classes are not named.
    """
    from matplotlib.figure import Figure

    side = 2.6 + 0.42 * min(max(map(len, confusion.values())), 40)  # inches
    figure = Figure((side * len(confusion), side), layout="constrained")
    for axis, (task, counts) in zip(figure.subplots(1, len(confusion), squeeze=False)[0],
                                    confusion.items(), strict=True):
        ratios = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
        axis.imshow(ratios, cmap="Blues", vmin=0, vmax=1)
        accuracy = counts.diagonal().sum() / counts.sum().clamp_min(1)
        axis.set(title=f"{task}: accuracy {accuracy:.1%}", xlabel="predicted", ylabel="true class")
        names = class_names[task]
        if len(names) > 40:
            continue
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), names)
        for i, j in np.argwhere(ratios >= 0.005) if len(names) <= 12 else ():
            axis.text(j, i, f"{100 * ratios[i, j]:.0f}", ha="center", va="center", fontsize=9,
                      color="white" if ratios[i, j] > 0.6 else "black")
    figure.suptitle(f"{title}: % of each class's clips")
    figure.savefig(file, dpi=100)


def draw_label_efficiency(results, fractions, file):
    """Draw accuracy over the fraction of the labels used, a panel for each task and probe.

    results: from summarize.
    """
    from matplotlib.figure import Figure

    fractions = sorted(fractions)
    percent = [100 * fraction for fraction in fractions]
    probes = list(next(iter(results.values())))
    figure = Figure((3.6 * len(probes) + 1, 3.2 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), len(probes), squeeze=False, sharex=True, sharey="row")
    for axes, (task, by_probe) in zip(panels, results.items(), strict=True):
        for axis, (probe, row) in zip(axes, by_probe.items(), strict=True):
            for (name, label), style, color in zip(LEARNERS.items(), ("o-", "s--"),
                                                   ("#0072B2", "#D55E00"), strict=True):
                if name in row:
                    columns = [column(name, fraction) for fraction in fractions]
                    axis.errorbar(percent, [row[name] for name in columns],
                                  [row[f"{name}_std"] for name in columns], fmt=style, color=color,
                                  capsize=3, label=label)
            axis.set(title=f"{task}, {probe}", xscale="log")
            axis.set_xticks(percent, [f"{value:g}" for value in percent], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("accuracy")
    for axis in panels[-1]:
        axis.set_xlabel("% of the labels")
    panels[0, 0].legend()
    figure.suptitle("Frozen features with fewer labels: mean and std over probe seeds")
    figure.savefig(file, dpi=100)
