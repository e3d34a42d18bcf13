"""Devices, precision, memory, and how processes find each other and share what they have."""

import math
import os
import shutil
import sys
from importlib.util import find_spec

import torch
import torch.distributed as dist

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name):
    """--device -> torch.device; auto: the best there is, and a GPU for each process of torchrun.
    Raises ValueError if it is missing, or cannot be used by several processes."""
    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    found.append("cpu")
    if name not in ("auto", *found):
        raise ValueError(f"--device {name} is not available (found: {', '.join(found)})")
    device = torch.device(found[0] if name == "auto" else name)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"there is no GPU {device.index}: lower --nproc_per_node")
        torch.cuda.set_device(device)
    if device.type == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several processes cannot share a Mac's GPU: start one, without torchrun, "
                         "or pass --device cpu")
    return device


def pick_precision(name, device):
    """--precision -> fp32, bf16 or fp16; auto: the fastest that is safe. Raises ValueError."""
    if name == "auto" and device.type != "cuda":
        return "fp32"
    if name == "auto":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--precision fp16 needs a gradient scaler, which {device.type} lacks")
    return name


def can_compile(device):
    """Whether blocks can be compiled for a GPU; if not, and it is one, a note says why."""
    if device.type != "cuda":
        return False
    reason = None
    if not find_spec("triton"):
        reason = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < (7, 0):
        reason = "Triton needs a GPU of compute capability 7.0 or newer"
    elif not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        reason = "there is no C compiler"
    if reason and os.environ.get("RANK", "0") == "0":
        print(f"note: blocks are not compiled: {reason}", file=sys.stderr)
    return not reason


def largest_micro_batch(share, try_pass, device):
    """The largest divisor of a process's `share` of clips for which try_pass(divisor) does not run
    out of GPU memory in any process. On the CPU and MPS all of them, untried: there, too many make
    the system slow rather than raise an error. Raises ValueError if even one does not fit."""
    if device.type != "cuda":
        return share
    largest = 0
    for size in (n for n in range(1, share + 1) if share % n == 0):
        try:
            try_pass(size)
            largest = size
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()  # not above, where the error's traceback still holds tensors
        if largest != size:
            break
    largest = min(all_gather(largest))
    if not largest:
        raise ValueError("the GPU has too little memory for one clip at a time: pass "
                         "--checkpoint-activations, or choose smaller networks (docs/speed.md)")
    if os.environ.get("RANK", "0") == "0":
        print(f"micro-batch {largest}, the largest divisor of {share} clips that fits", flush=True)
    return largest


def peak_memory(device):
    """Most bytes used so far, on the GPU or by this process in main memory (NaN on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # it keeps what it has once allocated
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


def process():
    """Rank of this process, and number of processes."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def rendezvous():
    """The store in which the processes that torchrun started find each other's addresses."""
    store, *_ = next(dist.rendezvous("env://"))
    # It outlives the processes: those restarted must not find the addresses of the dead ones in it.
    # Only on a single machine do all processes count restarts alike.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return store


def gather_rows(parts, device):
    """Concatenate the tensors of all processes along their first axis: a list per process, which
    may be empty -> a tensor, or None if all are. Every process gets it."""
    own = torch.cat(parts) if parts else None
    if not dist.is_initialized():
        return own
    shapes = all_gather(None if own is None else (own.shape, own.dtype))
    if not any(shapes):
        return None
    shape, dtype = next(filter(None, shapes))
    counts = [found[0][0] if found else 0 for found in shapes]
    padded = torch.zeros(max(counts), *shape[1:], dtype=dtype, device=device)
    if own is not None:
        padded[:len(own)] = own
    everything = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everything, padded)
    return torch.cat([rows[:count] for rows, count in zip(everything, counts, strict=True)])


def all_gather(obj):
    """A list with every process's obj, which can be anything that pickles."""
    if not dist.is_initialized():
        return [obj]
    objects = [None] * dist.get_world_size()
    dist.all_gather_object(objects, obj)
    return objects
