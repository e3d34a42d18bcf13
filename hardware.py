"""What a run makes of its machine: precision, processes, shards, compiled blocks, memory.

One process a GPU. Each holds everything (DDP), or a share of every weight (--shard, FSDP2), which
costs more exchange and is for what does not fit. Neither changes what is computed.
"""

import inspect
import os
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model import Block

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name):
    """'auto' -> the best device here; else the one named. Raises ValueError if it is not here."""
    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    found.append("cpu")
    if name not in ("auto", *found):
        raise ValueError(f"--device {name} is not here; there is {', '.join(found)}")
    return torch.device(found[0] if name == "auto" else name)


def place(name, shard=False):
    """--device -> (this process's number, how many there are, its device). Raises ValueError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if shard and world == 1:
        raise ValueError("--shard is for several processes: start it with torchrun, or leave it")
    device = pick_device(name)
    if shard and device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(f"--shard on the CPU needs a newer torch, {torch.__version__} has no "
                         "streams there")
    if device.type == "cuda" and world > 1:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU, there are "
                             f"{torch.cuda.device_count()}: lower --nproc_per_node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    return rank, world, device


def join(device):
    """Meet the other processes."""
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun's store outlives the processes, and those started again must not find in it where
    # the dead ones listened. Only on one machine is the count of restarts the same for all.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world)


def split_batch(batch_size, micro_batch, world):
    """A process's share of a step: (clips at a time, how many times). Raises ValueError."""
    share, rest = divmod(batch_size, world)
    if rest:
        raise ValueError(f"--batch-size {batch_size} is not divisible by {world} processes")
    micro = min(micro_batch or share, share)
    if share % micro:
        raise ValueError(f"--micro-batch {micro} does not divide the {share} clips that each of "
                         f"{world} processes takes of --batch-size {batch_size}")
    return micro, share // micro


def pick_precision(name, device):
    """--precision -> fp32, bf16 or fp16; auto: what the device is fast and safe in.

    Raises ValueError.
    """
    if name == "auto" and device.type != "cuda":
        return "fp32"
    if name == "auto":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name not in DTYPES:
        raise ValueError(f"--precision {name} is none of auto, {', '.join(DTYPES)}")
    if name == "fp16" and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--precision fp16 needs a gradient scaler, which {device.type} lacks")
    return name


def pick_compile(name, device, truncate):
    """--compile -> whether to; auto: on CUDA, if shapes are fixed. Raises ValueError."""
    if name not in ("auto", "on", "off"):
        raise ValueError(f"--compile {name} is none of auto, on, off")
    if name == "on" and truncate:
        raise ValueError("--compile on needs fixed shapes, and --mask-truncate changes them")
    return name == "on" or name == "auto" and device.type == "cuda" and not truncate


def blocks_of(network):
    """A network's transformer blocks."""
    return [module for module in network.modules() if isinstance(module, Block)]


def compile_blocks(model, mask_sets, backend="inductor"):
    """Compile the transformer blocks of a model, once for each shape that they meet.

    All blocks share their graphs: one for the target encoder, two for each mask set. So it takes
    seconds where a graph of the whole loss takes minutes, and goes with DDP, shards and activation
    checkpoints, which work between blocks.
    """
    # Past its limit, 8, dynamo would run the blocks uncompiled.
    torch._dynamo.config.cache_size_limit = max(8, 1 + 2 * mask_sets)
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, dynamic=False, backend=backend)


def checkpoint_activations(model):
    """Let each block of encoder and predictor keep its input only, and run again in backward."""
    trained = [b for b in blocks_of(model) if b.norm1.weight.requires_grad]
    for block in trained:
        # Nothing in a block is random, so there is no random state to bring back.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                preserve_rng_state=False)


def parallelise(model, device, world, shard):
    """Put a model on its device; -> what to call for the loss, over all processes.

    Sharded, every weight of the model itself becomes a DTensor, of which a process holds a slice.
    """
    model.to(device)
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world,))
        for network in model.children():
            for block in blocks_of(network):
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
    elif world > 1:
        # Not static_graph: every weight has its gradient in every step, so there is nothing for it
        # to find out, and it does not go with accumulation under no_sync.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **{sync: False})
    return model


def whole(state, keep):
    """A state dict with its shards put together, on the CPU. All processes call it, with the same
    keys; keep: whether this one wants the tensors."""
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if hasattr(state, "full_tensor"):
        state = state.full_tensor()
        return state.cpu() if keep else None
    return state


def shard_states(states, optimizer):
    """An optimizer's whole states, {parameter's number: {name: tensor}}, as its parameters are: in
    shards if they are. All processes call it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not hasattr(parameters[0], "full_tensor"):
        return states
    from torch.distributed.tensor import distribute_tensor

    def shard(tensor, p):
        if tensor.shape != p.shape:  # the count of steps
            return tensor
        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements)

    return {i: {name: shard(tensor, parameters[i]) for name, tensor in tensors.items()}
            for i, tensors in states.items()}


def gather(text):
    """The set of what the processes have for `text`."""
    texts = [text]
    if dist.is_initialized():
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, text)
    return set(texts)


def to_device(batch, device):
    """A data.Batch's clips and masks, moved: clips, [(context (B, Kc), targets (B, Kt)), ...]."""
    return batch.clips.to(device, non_blocking=True), [
        tuple(indices.to(device, non_blocking=True) for indices in pair) for pair in batch.masks]


def clip_gradients(network, limit):
    """Scale a network's gradients to norm `limit` at most; -> their norm before, a scalar tensor.

    The norm is that of all shards.
    """
    norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def total(values, device):
    """Sums of numbers or scalar tensors over the processes, as a list of floats."""
    sums = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in values])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def activation_bytes(config, masks, precision):
    """Bytes that autograd keeps of one clip from its forward pass to its backward pass.

    config: train.Config; masks: [(context tokens, target tokens), ...], a pair a mask set.
    A block keeps of each token of width D the inputs of its two norms, 2 D, in float32, and in the
    precision of its matrix products: their inputs and the attention's, (2 + 3 + 1) D, and the MLP's
    hidden layer before and after GELU, 2 mlp_ratio D. If activations are checkpointed, its input
    only, but of one block at a time everything. The graphs of all mask sets live until backward.
    """
    D, P, size = config.embed_dim, config.predictor_dim, DTYPES[precision].itemsize
    per_channel = 2 * 4 + (6 + 2 * config.mlp_ratio) * size  # bytes that a block keeps, a token
    tubelet = 3 * config.tubelet_size * config.patch_size ** 2
    kept = again = 0
    for context, targets in masks:
        both = context + targets
        parts = [(context * D, config.depth), (both * P, config.predictor_depth)]
        for channels, depth in parts if targets else parts[:1]:  # DINO's head is not a predictor
            if config.checkpoint_activations:
                kept += depth * channels * 4
                again = max(again, channels * per_channel)
            else:
                kept += depth * channels * per_channel
        kept += context * (tubelet * size + D * 4 + D * size)  # first layer, norm, predictor_embed
        kept += both * P * 4 + targets * P * size  # the predictor's last norm and layer
        kept += targets * D * (size + 4)  # prediction and target, for the loss
    return kept + again


def expected_memory(model, config, masks, precision, micro, world):
    """What a process will need, {what: bytes}: exact but for the activations of a micro-batch.

    Not in it: the clips, what the libraries need, and what an operation needs while it runs.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averages = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    held = 4 / world if config.shard else 4  # bytes a number, float32
    memory = {"weights": trained * held, "gradients": trained * held, "AdamW": 2 * trained * held,
              "moving averages": averages * held}
    if precision != "fp32":  # autocast's copies, which backward needs too
        memory[f"{precision} copies"] = 2 * trained
    return memory | {"activations": micro * activation_bytes(config, masks, precision)}
