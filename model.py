"""The networks of V-JEPA: a tubelet ViT, a predictor with mask tokens, and VJEPA, which joins them.

    clip --context encoder, visible tubelets only--> context features --predictor--> predictions
                                                                                       | L1 loss
    clip --target encoder, all tubelets, no gradient--> features at the masked tubelets

Token index = (t * H' + row) * W' + column, everywhere. Paper: Bardes et al. 2024, section 3.
`python model.py` prints the shapes that one clip passes through.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import ema


def gather_tokens(tokens, indices):
    """Pick tokens by index: (B, N, D), (B, K) int64 -> (B, K, D)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos_pos_embed(dim, grid):
    """Fixed 3-D sine-cosine position embedding of a grid (T', H', W'): float32 (N, dim).

    Time, row and column get a third of the channels each: d = ceil(dim / 6) * 2, and the result is
    cut to dim. Per axis the frequencies are 10000^(-i / (d / 2)): all sines, then all cosines.
    """
    axis_dim = -(-dim // 6) * 2
    frequencies = 10000.0 ** (-torch.arange(axis_dim // 2, dtype=torch.float64) / (axis_dim / 2))
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in grid], indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in axes]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return table[:, :dim].float()


def resample_pos_embed(pos_embed, old_grid, grid):
    """Position embedding (1, N, D) of a grid (T', H', W'), resampled for another."""
    if grid == old_grid:
        return pos_embed
    table = pos_embed.view(1, *old_grid, -1).permute(0, 4, 1, 2, 3)  # (1, D, T', H', W')
    scale = tuple(new / old for new, old in zip(grid, old_grid, strict=True))
    return F.interpolate(table, scale_factor=scale, mode="trilinear").flatten(2).transpose(1, 2)


def patchify(clips, tubelet):
    """The pixels of every token, a tubelet (t, p, p): (B, C, T, H, W) -> (B, N, C * t * p * p)."""
    B, C, T, H, W = clips.shape
    t, p, _ = tubelet
    x = clips.view(B, C, T // t, t, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def init_weights(module, std):
    """Truncated normal weights and zero biases; std None means 1 / sqrt(fan-in).

    0.02 suits D = 1024; at D = 128 the content of a token would drown in its position embedding.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv3d)):
            layer_std = std or layer.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(layer.weight, std=layer_std, a=-2 * layer_std, b=2 * layer_std)
            nn.init.zeros_(layer.bias)


def check_divisible(name, size, divisor_name, divisor):
    """Raise ValueError unless `divisor` divides `size`."""
    if size % divisor:
        raise ValueError(f"{name} {size} is not divisible by {divisor_name} {divisor}")


class PatchEmbed(nn.Module):
    """Project tubelets to D channels: a Conv3d whose stride is its kernel, as a matrix product.

    So only visible tubelets are projected, bfloat16 is fast, and published weights still load.
    """

    def __init__(self, tubelet, in_chans, embed_dim):
        super().__init__()
        self.tubelet = tubelet
        self.proj = nn.Conv3d(in_chans, embed_dim, tubelet, tubelet)

    def forward(self, clips, indices=None):
        x = patchify(clips, self.tubelet)  # (B, N, P)
        if indices is not None:
            x = gather_tokens(x, indices)  # (B, K, P)
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
    """Two linear layers with a GELU in between: (..., D) -> (..., D)."""

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

    init_std as in init_weights. Raises ValueError for sizes that do not divide each other.
    """

    def __init__(self, img_size=224, patch_size=16, num_frames=16, tubelet_size=2, in_chans=3,
                 embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0, init_std=0.02):
        super().__init__()
        check_divisible("img_size", img_size, "patch_size", patch_size)
        check_divisible("num_frames", num_frames, "tubelet_size", tubelet_size)
        check_divisible("embed_dim", embed_dim, "num_heads", num_heads)
        self.tubelet = (tubelet_size, patch_size, patch_size)
        self.grid = (num_frames // tubelet_size, img_size // patch_size, img_size // patch_size)
        self.num_heads, self.num_frames = num_heads, num_frames
        self.patch_embed = PatchEmbed(self.tubelet, in_chans, embed_dim)
        self.register_buffer("pos_embed", sincos_pos_embed(embed_dim, self.grid)[None])  # (1, N, D)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_weights(self, init_std)

    def forward(self, clips, indices=None):
        """Encode the tokens at `indices` only, or all of them.

        clips: float (B, C, T, H, W), of any size that the tubelets divide; indices: int64 (B, K)
        -> features (B, K, D), or (B, N, D) without indices. Raises ValueError for other sizes.
        """
        if any(size % part for size, part in zip(clips.shape[2:], self.tubelet, strict=True)):
            raise ValueError(f"clips of {tuple(clips.shape[2:])} (frames, height, width) cannot be "
                             f"cut into tubelets of {self.tubelet}")
        grid = tuple(n // part for n, part in zip(clips.shape[2:], self.tubelet, strict=True))
        x = self.patch_embed(clips, indices)  # (B, N or K, D)
        pos_embed = resample_pos_embed(self.pos_embed, self.grid, grid)  # (1, N, D)
        if indices is not None:
            pos_embed = gather_tokens(pos_embed.expand(len(clips), -1, -1), indices)  # (B, K, D)
        x = x + pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """A narrow ViT that predicts the features of masked tokens from the context (section 3.2).

    Each mask set has its own mask token; its position embedding says which token to predict.
    """

    def __init__(self, grid, embed_dim=1024, predictor_dim=384, depth=12, num_heads=16,
                 mlp_ratio=4.0, num_mask_sets=2, init_std=0.02):
        super().__init__()
        check_divisible("predictor_dim", predictor_dim, "num_heads", num_heads)
        self.predictor_embed = nn.Linear(embed_dim, predictor_dim)
        self.mask_tokens = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1, predictor_dim)) for _ in range(num_mask_sets))
        self.register_buffer("predictor_pos_embed", sincos_pos_embed(predictor_dim, grid)[None])
        self.predictor_blocks = nn.ModuleList(
            Block(predictor_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_dim, embed_dim)
        init_weights(self, init_std)

    def forward(self, context_features, context_indices, target_indices, mask_set):
        """Predict the tokens at target_indices (B, Kt) from those at context_indices (B, Kc).

        context_features: (B, Kc, D); mask_set: which mask token to use -> predictions (B, Kt, D).
        """
        B, Kc, _ = context_features.shape
        pos_embed = self.predictor_pos_embed.expand(B, -1, -1)  # (B, N, predictor_dim)
        context = self.predictor_embed(context_features) + gather_tokens(pos_embed, context_indices)
        queries = self.mask_tokens[mask_set] + gather_tokens(pos_embed, target_indices)
        x = torch.cat([context, queries], dim=1)  # (B, Kc + Kt, predictor_dim)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, Kc:]))  # (B, Kt, D)


class VJEPA(nn.Module):
    """Context encoder, predictor, target encoder, and the loss that connects them (equation 1).

    Only `encoder` and `predictor` are trained by gradients; after every optimizer step the training
    loop calls `update_target`. To change the loss, change `loss_fn`, `targets` or `forward`.
    """

    probed_network = "target_encoder"  # the network whose features are evaluated
    loss_fn = staticmethod(F.l1_loss)  # of predictions and targets, averaged over all their values

    def __init__(self, img_size=224, patch_size=16, num_frames=16, tubelet_size=2, in_chans=3,
                 embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0, predictor_dim=384,
                 predictor_depth=12, num_mask_sets=2, init_std=0.02):
        super().__init__()
        self.encoder = VisionTransformer(img_size, patch_size, num_frames, tubelet_size, in_chans,
                                         embed_dim, depth, num_heads, mlp_ratio, init_std)
        self.predictor = Predictor(self.encoder.grid, embed_dim, predictor_dim, predictor_depth,
                                   num_heads, mlp_ratio, num_mask_sets, init_std)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    @torch.no_grad()
    def targets(self, clips):
        """Prediction targets: target features of every token, layer-normed, (B, N, D)."""
        features = self.target_encoder(clips)
        return F.layer_norm(features, features.shape[-1:])

    def forward(self, clips, masks):
        """L1 distance between predicted and target features at the masked tokens (equation 1).

        clips: float (B, C, T, H, W); masks: [(context (B, Kc), target (B, Kt)), ...] int64, one
        pair per mask set -> scalar, the mean over the mask sets.
        """
        targets = self.targets(clips)  # (B, N, D), no gradient
        loss = 0.0
        for mask_set, (context, target) in enumerate(masks):
            features = self.encoder(clips, context)  # (B, Kc, D): visible tokens only
            prediction = self.predictor(features, context, target, mask_set)  # (B, Kt, D)
            loss = loss + self.loss_fn(prediction, gather_tokens(targets, target))
        return loss / len(masks)

    def update_target(self, momentum):
        """Move the target encoder towards the context encoder (section 3.1)."""
        ema.update(self.target_encoder, self.encoder, momentum)


def main():
    """Print the shapes that one clip passes through, at the size of the paper's ViT-L/16."""
    with torch.device("meta"):  # shapes only: nothing is allocated or computed
        model, clips = VJEPA(), torch.empty(1, 3, 16, 224, 224)
        context, target = (torch.empty(1, n, dtype=torch.int64) for n in (313, 784))
        features = model.encoder(clips, context)
        outputs = {"encoder": features, "target_encoder": model.targets(clips),
                   "predictor": model.predictor(features, context, target, mask_set=0)}
    print(f"clip            {tuple(clips.shape)}  {math.prod(model.encoder.grid)} tokens, of which "
          f"{context.shape[1]} are context and {target.shape[1]} targets")
    for name, network in model.named_children():
        print(f"{name:15} {tuple(outputs[name].shape)}  "
              f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
