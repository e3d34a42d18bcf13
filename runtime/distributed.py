"""Devices, processes and precision: one process per GPU, each with the whole model (DDP)."""

import inspect
import os
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model import Block
from runtime.device import pick_device


def setup_device(name):
    """--device -> (rank, world_size, device) of this process. Raises ValueError."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(name)
    torch.set_float32_matmul_precision("high")  # on CUDA: TensorFloat-32 for what stays in fp32
    if device.type == "cuda" and world_size > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"there is no GPU {device.index}: lower --nproc_per_node")
        torch.cuda.set_device(device)
    return rank, world_size, device


def init_process_group(device):
    """Initialise the process group of torchrun's processes."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    # torchrun's store outlives the processes: those restarted must not find the addresses of the
    # dead ones in it. Only on a single machine do all processes count restarts alike.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world_size)


def split_batch(batch_size, micro_batch, world_size):
    """A process's clips per forward pass, and its passes per step. Raises ValueError."""
    share, rest = divmod(batch_size, world_size)
    if rest:
        raise ValueError(f"--batch-size {batch_size} is not divisible by {world_size} processes")
    micro_batch = min(micro_batch or share, share)
    if share % micro_batch:
        raise ValueError(f"--micro-batch {micro_batch} does not divide a process's {share} clips")
    return micro_batch, share // micro_batch


def pick_compile(name, device, samplers):
    """--compile -> whether to compile; auto: on CUDA, if shapes are fixed. Raises ValueError."""
    shapes_vary = any(getattr(sampler, "shapes_vary", False) for sampler in samplers)
    if name == "on" and shapes_vary:
        raise ValueError("--compile on needs masks of a fixed size")
    return name == "on" or name == "auto" and device.type == "cuda" and not shapes_vary


def compile_blocks(model, num_mask_sets, backend="inductor"):
    """Compile a model's blocks, which takes seconds; a graph of the whole loss takes minutes."""
    # They share a graph for the target encoder and two per mask set; above this, none is compiled.
    torch._dynamo.config.cache_size_limit = max(8, 1 + 2 * num_mask_sets)
    for block in model.modules():
        if isinstance(block, Block):
            block.forward = torch.compile(block.forward, dynamic=False, backend=backend)


def checkpoint_activations(model):
    """Keep only the input of each trained block, and run the block again in the backward pass."""
    for block in model.modules():
        if isinstance(block, Block) and block.norm1.weight.requires_grad:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def wrap_ddp(model, world_size, compress=False):
    """The module to call for the loss: `model` itself, or DDP, which averages its gradients;
    compress: in bf16, half of the traffic."""
    if world_size == 1:
        return model
    # Buffers are equal on all processes anyway. Newer versions of torch renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, **{sync: False})
    if compress:
        ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


def mean_and_any(values, flags, device):
    """Means of values and "or" of flags over all processes, in one all_reduce: two lists."""
    sums = torch.cat([torch.stack([x.float() for x in values]),
                      torch.tensor(flags, dtype=torch.float32, device=device)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    sums, world_size = sums.tolist(), dist.get_world_size() if dist.is_initialized() else 1
    return [x / world_size for x in sums[:len(values)]], [x > 0 for x in sums[len(values):]]


def all_gather(obj):
    """A list with every process's obj, which can be anything that pickles."""
    if not dist.is_initialized():
        return [obj]
    objects = [None] * dist.get_world_size()
    dist.all_gather_object(objects, obj)
    return objects
