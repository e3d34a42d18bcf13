"""The networks of V-JEPA: a tubelet ViT, a predictor with mask tokens, and VJEPA, which joins them.

    clip --context encoder, visible tubelets only--> context features --predictor--> predictions
                                                                                       | L1
    clip --target encoder, all tubelets, no gradient--> features at the masked tubelets

Token index = ((t * H') + row) * W' + column, everywhere. Paper: Bardes et al. 2024, section 3.
`python model.py` walks one clip through the shapes.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import ema
from weights import count_blocks, encoder_sizes, load_checkpoint, load_strictly, state_dict


def gather_tokens(tokens, indices):
    """Pick tokens by index: (B, N, D), (B, K) int64 -> (B, K, D)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos_positions(dim, grid):
    """Fixed 3-D sine-cosine positions.

    A third of the channels each for time, row and column (ceil(dim / 6) * 2 wide, cut to dim in the
    end); per axis the frequencies are 10000^(-i / (d / 2)), all sines, then all cosines.
    dim: int; grid: (T', H', W') tokens per axis -> float32 (T' * H' * W', dim).
    """
    axis_dim = -(-dim // 6) * 2
    frequencies = 10000.0 ** (-torch.arange(axis_dim // 2, dtype=torch.float64) / (axis_dim / 2))
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in grid], indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in axes]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return table[:, :dim].float()


def cut_tubelets(clips, tubelet):
    """Clips (B, C, T, H, W) -> what each token is made of: (B, N, C * t * p * p)."""
    B, C, T, H, W = clips.shape
    t, p, _ = tubelet
    x = clips.view(B, C, T // t, t, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def init_weights(module, std):
    """Truncated normal weights, zero biases, unit norms; std None means 1 / sqrt(fan-in).

    0.02 suits D = 1024. At D = 100 it makes each layer's output so small against the positions that
    content drowns, and training ends in features that know nothing but their position.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv3d)):
            layer_std = std or layer.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(layer.weight, std=layer_std, a=-2 * layer_std, b=2 * layer_std)
            nn.init.zeros_(layer.bias)


class PatchEmbed(nn.Module):
    """Clip -> one D-vector a tubelet.

    A Conv3d whose stride is its kernel is one matrix product over cut-out tubelets. So written,
    only the visible ones are projected, and bfloat16 is fast. The weight keeps Conv3d's layout.
    """

    def __init__(self, tubelet, in_chans, embed_dim):
        super().__init__()
        self.tubelet = tubelet
        self.proj = nn.Conv3d(in_chans, embed_dim, tubelet, tubelet)

    def forward(self, clips, indices=None):
        x = cut_tubelets(clips, self.tubelet)  # (B, N, C * t * p * p)
        if indices is not None:
            x = gather_tokens(x, indices)  # (B, K, C * t * p * p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # (B, N or K, D)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """Linear, GELU, linear, on the last axis."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, round(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Tubelet ViT without a class token: the context encoder and the target encoder.

    Raises ValueError where sizes do not divide: img_size by patch_size, num_frames by tubelet_size,
    embed_dim by num_heads.
    """

    def __init__(self, img_size=224, patch_size=16, num_frames=16, tubelet_size=2, in_chans=3,
                 embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0, init_std=0.02):
        super().__init__()
        for name, size, by, part in [("img_size", img_size, "patch_size", patch_size),
                                     ("num_frames", num_frames, "tubelet_size", tubelet_size),
                                     ("embed_dim", embed_dim, "num_heads", num_heads)]:
            if size % part:
                raise ValueError(f"{name} {size} is not divisible by {by} {part}")
        self.tubelet = (tubelet_size, patch_size, patch_size)
        self.grid = (num_frames // tubelet_size, img_size // patch_size, img_size // patch_size)
        self.num_heads, self.num_frames = num_heads, num_frames
        self.patch_embed = PatchEmbed(self.tubelet, in_chans, embed_dim)
        self.register_buffer("pos_embed", sincos_positions(embed_dim, self.grid)[None])  # (1, N, D)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_weights(self, init_std)

    def positions(self, grid):
        """The position table for a grid (T', H', W'), resampled if it is not the one built for."""
        if grid == self.grid:
            return self.pos_embed
        table = self.pos_embed.view(1, *self.grid, -1).permute(0, 4, 1, 2, 3)  # (1, D, T', H', W')
        scale = tuple(new / old for new, old in zip(grid, self.grid, strict=True))
        table = F.interpolate(table, scale_factor=scale, mode="trilinear")
        return table.flatten(2).transpose(1, 2)  # (1, N, D)

    def forward(self, clips, indices=None):
        """Encode the tokens at `indices` only, or all of them.

        clips: float (B, C, T, H, W), of any size that the tubelets divide; indices: int64 (B, K)
        -> features (B, K, D), or (B, N, D) without indices. Raises ValueError for other sizes.
        """
        sizes = list(zip(clips.shape[2:], self.tubelet, strict=True))
        if any(size % part for size, part in sizes):
            raise ValueError(f"clips of {tuple(clips.shape[2:])} (frames, height, width) cannot be "
                             f"cut into tubelets of {self.tubelet}")
        grid = tuple(size // part for size, part in sizes)
        x = self.patch_embed(clips, indices)  # (B, N or K, D)
        positions = self.positions(grid)  # (1, N, D)
        if indices is not None:
            positions = gather_tokens(positions.expand(len(clips), -1, -1), indices)  # (B, K, D)
        x = x + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """A narrow ViT that guesses the features at masked positions from the context's (section 3.2).

    One learned mask token a mask set tells it what is asked; the position tells it where.
    out_dim: channels of a prediction, if not the encoder's.
    """

    def __init__(self, grid, embed_dim=1024, predictor_dim=384, depth=12, num_heads=16,
                 mlp_ratio=4.0, num_mask_sets=2, init_std=0.02, out_dim=None):
        super().__init__()
        if predictor_dim % num_heads:
            raise ValueError(f"predictor_dim {predictor_dim} is not divisible by num_heads "
                             f"{num_heads}")
        self.predictor_embed = nn.Linear(embed_dim, predictor_dim)
        self.mask_tokens = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1, predictor_dim)) for _ in range(num_mask_sets))
        self.register_buffer("predictor_pos_embed", sincos_positions(predictor_dim, grid)[None])
        self.predictor_blocks = nn.ModuleList(
            Block(predictor_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_dim, out_dim or embed_dim)
        init_weights(self, init_std)

    def forward(self, context_features, context_indices, target_indices, mask_index):
        """(B, Kc, D), (B, Kc), (B, Kt), which mask set -> predictions (B, Kt, D)."""
        B, Kc, _ = context_features.shape
        positions = self.predictor_pos_embed.expand(B, -1, -1)
        context = self.predictor_embed(context_features) + gather_tokens(positions, context_indices)
        asked = self.mask_tokens[mask_index] + gather_tokens(positions, target_indices)
        x = torch.cat([context, asked], dim=1)  # (B, Kc + Kt, predictor_dim)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, Kc:]))  # (B, Kt, D)


class VJEPA(nn.Module):
    """Context encoder, predictor, target encoder and the loss that ties them (equation 1).

    Only `encoder` and `predictor` have gradients; after each optimizer step the training loop calls
    `update_target`. distance: of predictions and targets, averaged. Without stop_gradient the
    targets are the context encoder's own, with gradients: what keeps it from collapse is gone.
    """

    evaluated = "target_encoder"  # the network whose features are good for something

    def __init__(self, img_size=224, patch_size=16, num_frames=16, tubelet_size=2, in_chans=3,
                 embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0, predictor_dim=384,
                 predictor_depth=12, num_mask_sets=2, init_std=0.02, distance=F.l1_loss,
                 stop_gradient=True):
        super().__init__()
        self.encoder = VisionTransformer(img_size, patch_size, num_frames, tubelet_size, in_chans,
                                         embed_dim, depth, num_heads, mlp_ratio, init_std)
        self.predictor = Predictor(self.encoder.grid, embed_dim, predictor_dim, predictor_depth,
                                   num_heads, mlp_ratio, num_mask_sets, init_std)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.distance, self.stop_gradient = distance, stop_gradient

    def targets(self, clips):
        """What is to be predicted: layer-normed target features of every token, (B, N, D)."""
        if not self.stop_gradient:
            features = self.encoder(clips)
            return F.layer_norm(features, features.shape[-1:])
        with torch.no_grad():
            features = self.target_encoder(clips)
            return F.layer_norm(features, features.shape[-1:])

    def update_target(self, momentum):
        """Move the target encoder towards the context encoder (section 3.1)."""
        ema.update(self.target_encoder, self.encoder, momentum)

    def predict(self, clips, context, target, mask_index):
        """Predict the features at `target` (B, Kt) from the tokens at `context` (B, Kc)."""
        return self.predictor(self.encoder(clips, context), context, target, mask_index)

    def loss(self, clips, masks, targets):
        """Distance over masked positions and features, averaged over the mask sets.

        clips: float (B, C, T, H, W); masks: [(context (B, Kc), target (B, Kt)), ...] int64;
        targets: (B, N, D) -> scalar.
        """
        losses = [self.distance(self.predict(clips, context, target, i),
                                gather_tokens(targets, target))
                  for i, (context, target) in enumerate(masks)]
        return torch.stack(losses).mean()

    def forward(self, clips, masks):
        """The training loss of a batch; arguments as in `loss`."""
        return self.loss(clips, masks, self.targets(clips))

    @classmethod
    def from_checkpoint(cls, path, **overrides):
        """All three networks from a checkpoint of this project, a run's folder or a published file.

        overrides: img_size, num_frames, num_heads, where the file does not tell them.
        Raises CheckpointError where the file is missing, damaged, or does not fit.
        """
        checkpoint = load_checkpoint(path)
        predictor = state_dict(checkpoint, "predictor", path)
        model = cls(**encoder_sizes(checkpoint, "encoder", path, **overrides),
                    predictor_dim=predictor["predictor_embed.weight"].shape[0],
                    predictor_depth=count_blocks(predictor),
                    num_mask_sets=sum(key.startswith("mask_tokens.") for key in predictor))
        load_networks(model, checkpoint, path)
        return model


def load_networks(model, checkpoint, path):
    """Load a checkpoint's networks into a VJEPA, or a model like it, strictly."""
    for name, network in model.named_children():
        load_strictly(network, state_dict(checkpoint, name, path), path)


def load_encoder(path, which=None, **overrides):
    """A frozen encoder in eval mode, for features: `features = load_encoder(path)(clips)`.

    path: a checkpoint of this project, a run's folder, or a published .pth.tar; which:
    "target_encoder" or "encoder" (None: the one that is evaluated, so the target encoder, but for
    methods that have none); overrides as in VJEPA.from_checkpoint. Raises CheckpointError.
    """
    checkpoint = load_checkpoint(path)
    which = which or checkpoint.get("evaluated", VJEPA.evaluated)
    encoder = VisionTransformer(**encoder_sizes(checkpoint, which, path, **overrides))
    load_strictly(encoder, state_dict(checkpoint, which, path), path)
    return encoder.eval().requires_grad_(False)


def draw(clip, tokens, sizes, path):
    """A clip's way to the loss, as a picture. clip, tokens, sizes: the text of boxes and arrows."""
    from pathlib import Path

    from matplotlib.figure import Figure

    figure = Figure((12.5, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 100), ylim=(0, 36))
    axis.set_axis_off()
    trained, moved, plain = "#BFD9EE", "#F6D9B8", "#EEEEEE"
    boxes = [(1, 13, f"clip\n{clip}", plain),
             (19, 24, f"context: visible\n{tokens['context']} of {tokens['all']} tokens", plain),
             (39, 24, f"encoder\n{sizes['encoder']}", trained),
             (58, 24, f"predictor, {tokens['target']} mask\ntokens\n{sizes['predictor']}", trained),
             (78, 24, f"predictions\n{tokens['guess']}", plain),
             (19, 3, f"all\n{tokens['all']} tokens", plain),
             (39, 3, f"target encoder\n{sizes['target_encoder']}\nno gradient", moved),
             (58, 3, f"LayerNorm, then\nthe {tokens['target']} masked tokens", plain),
             (78, 3, f"targets\n{tokens['guess']}", plain), (87.5, 13.5, "loss: mean |difference|",
                                                            "#D9EAD3")]
    for x, y, text, colour in boxes:
        axis.text(x, y + 4, text, va="center", fontsize=10,
                  bbox={"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "#444444"},
                  ha="left" if x != 87.5 else "center")
    for start, end in (((9, 21), (18, 27)), ((9, 14), (18, 8)), ((31, 28), (38, 28)),
                       ((51.5, 28), (57, 28)), ((70, 28), (77, 28)), ((27, 7), (38, 7)),
                       ((51.5, 7), (57, 7)), ((71.5, 7), (77, 7)), ((85, 24), (87, 20)),
                       ((85, 11), (87, 15))):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#444444"})
    axis.annotate("", (44, 12), (44, 24),
                  arrowprops={"arrowstyle": "->", "color": "#B05A00", "linestyle": "--"})
    axis.text(45, 17.5, "moving average of the weights,\nonce a step", fontsize=9, color="#B05A00")
    figure.suptitle("V-JEPA: blue is trained by gradients, orange follows; shapes are (clips, "
                    "tokens, channels)")
    Path(path).parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def main():
    """Walk one clip through the shapes, at the size of the paper's ViT-L/16."""
    from masks import MultiBlockMask

    with torch.device("meta"):
        model = VJEPA()
        clips = torch.empty(1, 3, 16, 224, 224)
    sampler = MultiBlockMask(model.encoder.grid)
    context, target = (indices.to("meta") for indices in sampler.sample([0], seed=0))
    features = model.encoder(clips, context)
    guess = model.predictor(features, context, target, mask_index=0)
    num_tokens = math.prod(model.encoder.grid)
    sizes = {name: f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters"
             for name, network in model.named_children()}

    print("ViT-L/16, one clip, a short-range mask")
    print(f"clip              {tuple(clips.shape)}  (B, C, T, H, W)")
    print(f"grid of tokens    {model.encoder.grid}, tubelets of {model.encoder.tubelet}")
    print(f"context           {tuple(context.shape)} of {num_tokens} tokens")
    print(f"  -> encoder      {tuple(features.shape)}  {sizes['encoder']}")
    print(f"targets           {tuple(target.shape)} of {num_tokens} tokens")
    print(f"  -> predictor    {tuple(guess.shape)}  {sizes['predictor']}")
    print(f"target encoder    {tuple(model.targets(clips).shape)}, an average of the encoder")
    print("loss              mean of |prediction - target| over the masked tokens")
    draw(tuple(clips.shape), {"context": context.shape[1], "target": target.shape[1],
                              "all": num_tokens, "guess": tuple(guess.shape)}, sizes,
         "out/model.png")
    print("drawn: out/model.png")


if __name__ == "__main__":
    main()
