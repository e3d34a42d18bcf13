"""What probe.py prints, writes and draws: tables, probe.json and confusion.png."""

import json
import math

import numpy as np

from video.playback import CLIPS_PER_FILE

COLUMNS = ("trained", "random_init", "one_frame", "motion_energy")
LEARNERS = COLUMNS[:2]  # probed with every fraction of the labels, not only with all


def column(name, fraction):
    """An encoder's name in probe.json: 'trained' with all labels, 'trained_10' with 10 %."""
    return name if fraction == 1 else f"{name}_{100 * fraction:g}"


def write(folder, scores, confusion, class_names, label_fraction, made_with):
    """Print tables; write probe.json and confusion.png -> the results of summarize(scores).
    label_fraction: the fractions of the labels besides all; others as in the functions below."""
    folder.mkdir(parents=True, exist_ok=True)
    results = summarize(scores)
    seeds, folds = next(iter(scores.values())).shape
    print_tables(results, sorted({1.0, *label_fraction}, reverse=True), seeds, folds)
    write_json(folder / "probe.json", made_with, results, confusion, class_names)
    clips = int(next(iter(confusion.values())).sum()) // seeds
    if not clips:
        print(f"written to {folder}/: probe.json (no confusion.png without an attentive probe)")
        return results

    independent, what = clips, f"{clips} test clips"
    if made_with.get("task"):  # the six clips of a file are right or wrong together
        independent = math.ceil(clips / CLIPS_PER_FILE)
        what += f" of {independent} files"
    print(f"\non {what}, accuracies around 0.5 differ by up to "
          f"{1.96 * (0.5 / independent) ** 0.5:.3f} by chance (95 %)")
    draw_confusion(confusion, class_names, folder / "confusion.png")
    print(f"written to {folder}/: probe.json, confusion.png")
    return results


def summarize(scores):
    """{(task, probe, column): (seeds, folds) accuracies} -> {task: {probe: {column: mean, ...}}}.
    column_std is over seeds; column_folds_std, if there are several folds, over folds."""
    results = {}
    for (task, probe, name), values in scores.items():
        row = results.setdefault(task, {}).setdefault(probe, {})
        row[name] = values.mean()
        row[f"{name}_std"] = np.std(values.mean(1), ddof=min(1, len(values) - 1))  # 0 for one seed
        if values.shape[1] > 1:
            row[f"{name}_folds_std"] = np.std(values.mean(0), ddof=1)
    return results


def print_tables(results, fractions, seeds, folds):
    """Print the results of summarize, a table per fraction of the labels (1.0 first)."""
    spread, over = "_std", f"{seeds} probe seeds"
    if folds > 1:
        spread, over = "_folds_std", f"{folds} folds"
    single = seeds == folds == 1  # there is no spread
    rows = {f"{task}, {probe}": row for task, probes in results.items()
            for probe, row in probes.items()}

    def cell(row, name):
        if name not in row:
            return "-"
        return f"{row[name]:.3f}" if single else f"{row[name]:.3f} +- {row[name + spread]:.3f}"

    print("accuracy with all labels" + ("" if single else f": mean +- std over {over}"))
    print(f"{'':22}" + "".join(f"{name:>17}" for name in COLUMNS))
    for title, row in rows.items():
        print(f"{title:22}" + "".join(f"{cell(row, name):>17}" for name in COLUMNS))
    for title, row in rows.items():
        values = [row[name] for name in COLUMNS if name in row]
        if len(values) > 1 and min(values) > 0.99:
            print(f"{title}: everything is above 0.99, so this cannot tell encoders apart")

    for fraction in fractions[1:]:
        names = [name for name in LEARNERS if name in next(iter(rows.values()))]
        print(f"\nwith {100 * fraction:g} % of the labels, and the change relative to all labels")
        print(f"{'':22}" + "".join(f"{name:>25}" for name in names))
        for title, row in rows.items():
            line = f"{title:22}"
            for name in names:
                few = column(name, fraction)
                line += f"  {cell(row, few)}  {row[few] / max(row[name], 1e-9) - 1:+5.0%}"
            print(line)


def write_json(file, made_with, results, confusion, class_names):
    """Write the settings `made_with`, the results, and the accuracy of each class."""
    per_class = {task: dict(zip(class_names[task], per_class_accuracy(counts), strict=True))
                 for task, counts in confusion.items()}
    content = {"made_with": made_with, "results": results, "per_class": per_class}
    file.write_text(json.dumps(content, indent=1) + "\n")


def per_class_accuracy(counts):
    """Confusion counts (classes, classes), row: true class -> accuracies; None without clips."""
    return [right / total if total else None for right, total in
            zip(counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)]


def draw_confusion(confusion, class_names, file, title="attentive probe, all labels"):
    """Draw a panel for each task: the predictions for the clips of each class, in percent.
    confusion: {task: (classes, classes) counts, row: true class}; class_names: {task: names}."""
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
        if len(names) <= 40:
            axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
            axis.set_yticks(range(len(names)), names)
        for i, j in np.argwhere(ratios >= 0.005) if len(names) <= 12 else ():
            axis.text(j, i, f"{100 * ratios[i, j]:.0f}", ha="center", va="center", fontsize=9,
                      color="white" if ratios[i, j] > 0.6 else "black")
    figure.suptitle(f"{title}: % of each class's clips")
    figure.savefig(file, dpi=100)
