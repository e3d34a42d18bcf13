"""Which device and precision to use, and how much memory was used."""

import math
import os
import sys
from importlib.util import find_spec

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name):
    """--device -> torch.device; auto: the best there is. Raises ValueError if it is missing."""
    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    found.append("cpu")
    if name not in ("auto", *found):
        raise ValueError(f"--device {name} is not available (found: {', '.join(found)})")
    return torch.device(found[0] if name == "auto" else name)


def pick_precision(name, device):
    """--precision -> fp32, bf16 or fp16; auto: the fastest that is safe. Raises ValueError."""
    if name == "auto" and device.type != "cuda":
        return "fp32"
    if name == "auto":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--precision fp16 needs a gradient scaler, which {device.type} lacks")
    return name


def peak_memory(device):
    """Most bytes used so far, on the GPU or by this process in main memory (NaN on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not find_spec("resource"):
        return math.nan
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free_memory():
    """Bytes of main memory that are free or can be freed; where that is unknown, all there are, or
    infinity (Windows)."""
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            sizes = dict(line.split(":") for line in file)
        return 1024 * int(sizes["MemAvailable"].split()[0])
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
