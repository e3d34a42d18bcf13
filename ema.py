"""The target encoder is an exponential moving average (EMA) of the context encoder (section 3.1).

    target <- m * target + (1 - m) * online

A weight loses half of its share in ln(1/2) / ln(m) steps: 173 at m = 0.996, 693 at 0.999. If the
momentum m is too low, the target follows the predictor into collapse; if it is too high, a short
run learns from a target that is still close to its random start. `python ema.py` prints schedules.
"""

import math

import torch

SCHEDULES = ("cosine", "linear", "constant")


def momentum_at(step, total_steps, start=0.996, end=1.0, schedule="cosine"):
    """Momentum of the update after optimizer step `step` = 0, 1, ..., total_steps.

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
    raise ValueError(f"momentum schedule '{schedule}' is none of {', '.join(SCHEDULES)}")


@torch.no_grad()
def update(target, online, momentum):
    """target <- momentum * target + (1 - momentum) * online, in place, in one fused call.

    The modules have the same architecture. Integer buffers, which count something, are copied.
    """
    pairs = list(zip(target.state_dict().values(), online.state_dict().values(), strict=True))
    averaged = [(t, o) for t, o in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in averaged], [o for _, o in averaged], 1 - momentum)
    for t, o in pairs:
        if not t.is_floating_point():
            t.copy_(o)


if __name__ == "__main__":
    print("step of 1000   " + "".join(f"{step:>9}" for step in range(0, 1001, 250)))
    for name in SCHEDULES:
        print(f"{name:15}" + "".join(f"{momentum_at(step, 1000, schedule=name):9.5f}"
                                     for step in range(0, 1001, 250)))
