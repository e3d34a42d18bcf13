"""The target encoder: an exponential moving average of the context encoder (paper, section 3.1).

    target <- m * target + (1 - m) * online

A weight's share in the target halves every ln(1/2) / ln(m) steps: 173 steps at m = 0.996, 693 at
0.999. Too low a momentum lets the target follow the predictor into collapse; too high and a short
run learns from what is still nearly its random start. `python ema.py` draws the schedules.
"""

import math

import torch


def momentum_at(step, total_steps, start=0.996, end=1.0, schedule="cosine"):
    """Momentum m of the update after optimizer step `step` = 0, 1, ..., total_steps.

    cosine:   end - (end - start) (1 + cos(pi step / total_steps)) / 2
    linear:   start + (end - start) step / total_steps   (the published release)
    constant: start
    Raises ValueError for another schedule.
    """
    progress = min(step / total_steps, 1.0)
    if schedule == "cosine":
        return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "linear":
        return start + (end - start) * progress
    if schedule == "constant":
        return start
    raise ValueError(f"momentum schedule '{schedule}' is none of cosine, linear, constant")


def half_life(momentum):
    """Steps after which a weight counts half in the average: ln(1/2) / ln(momentum)."""
    return math.inf if momentum >= 1 else math.log(0.5) / math.log(momentum)


@torch.no_grad()
def update(target, online, momentum):
    """target <- momentum * target + (1 - momentum) * online, in place, in one fused call.

    target, online: modules of the same architecture. Parameters and floating buffers are averaged;
    integer buffers (counters) are copied. Of sharded weights each process averages its own slice.
    """
    states = [[value.to_local() if hasattr(value, "to_local") else value
               for value in module.state_dict().values()] for module in (target, online)]
    pairs = list(zip(*states, strict=True))
    averaged = [(t, o) for t, o in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in averaged], [o for _, o in averaged], 1 - momentum)
    for t, o in pairs:
        if not t.is_floating_point():
            t.copy_(o)


def main():
    """Draw the schedules and what they mean: how long the target encoder remembers."""
    from pathlib import Path

    from matplotlib.figure import Figure

    steps = range(0, 1001, 5)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    print("step of 1000   " + "".join(f"{step:>9}" for step in (0, 250, 500, 750, 1000)))
    for schedule, style in (("cosine", "-"), ("linear", "--"), ("constant", ":")):
        momenta = [momentum_at(step, 1000, schedule=schedule) for step in steps]
        print(f"{schedule:15}" + "".join(f"{momenta[i]:9.5f}" for i in (0, 50, 100, 150, 200)))
        left.plot(steps, momenta, style, label=schedule)
        right.plot(steps, [half_life(momentum) for momentum in momenta], style, label=schedule)
    left.set(title="momentum", xlabel="optimizer step of 1000")
    right.set(title="half-life of a weight in the target encoder, steps", yscale="log",
              xlabel="optimizer step of 1000")
    left.legend()
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/ema.png", dpi=100)
    print("drawn: out/ema.png")


if __name__ == "__main__":
    main()
