"""PyTorch networks of the shape that public checkpoints have: the peer of benchmarks and the oracle of tests.

Layer names are those of the checkpoints. ``width`` and ``embedding_size`` are free, so that tests stay small.
"""

from functools import partial

import torch
from torch import nn


class Block(nn.Module):
    """BN - conv - BN - PReLU - conv(stride) - BN, plus shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(num_in)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.prelu = nn.PReLU(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(num_out)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x):
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """[B, 3, input_size, input_size] -> [B, embedding_size]; the last scale is fixed, as arcface_torch has it."""

    def __init__(self, depths: tuple[int, ...], width: int = 64, embedding_size: int = 512, input_size: int = 112):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        num_in = width
        for stage, depth in enumerate(depths):
            num_out = width * 2**stage
            blocks = [Block(num_in, num_out, 2), *(Block(num_out, num_out, 1) for _ in range(depth - 1))]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            num_in = num_out
        self.bn2 = nn.BatchNorm2d(num_in)
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(num_in * (input_size // 16) ** 2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad = False

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.features(self.fc(self.dropout(torch.flatten(self.bn2(x), 1))))


class _Layers(nn.Module):
    """Layers one after the other, under the name that the checkpoints have; ``residual`` adds what came in."""

    def __init__(self, *layers: nn.Module, residual: bool = False):
        super().__init__()
        self.layers, self.residual = nn.Sequential(*layers), residual

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


def _conv(num_in, num_out, kernel=1, stride=1, padding=0, groups=1, activation=True) -> _Layers:
    """Convolution, BN and perhaps PReLU."""
    conv = nn.Conv2d(num_in, num_out, kernel, stride, padding, groups=groups, bias=False)
    return _Layers(conv, nn.BatchNorm2d(num_out), *([nn.PReLU(num_out)] if activation else []))


def _bottleneck(num_in, num_out, hidden, stride=1, residual=False) -> _Layers:
    depthwise = _conv(hidden, hidden, 3, stride, 1, hidden)
    return _Layers(_conv(num_in, hidden), depthwise, _conv(hidden, num_out, activation=False), residual=residual)


def _stage(channels, depth, hidden) -> _Layers:
    return _Layers(*(_bottleneck(channels, channels, hidden, residual=True) for _ in range(depth)))


class MobileFaceNet(nn.Module):
    """[B, 3, 112, 112] -> [B, embedding_size]; ``depths`` (1, 4, 6, 2) is ``mbf``, (2, 8, 12, 4) ``mbf_large``."""

    def __init__(self, depths=(1, 4, 6, 2), hidden_ratio=1.0, width=128, embedding_size=512):
        super().__init__()
        hidden = int(width * hidden_ratio)
        self.layers = nn.ModuleList(
            [
                _conv(3, width, 3, 2, 1),
                _conv(width, width, 3, 1, 1, hidden // 2) if depths[0] == 1 else _stage(width, depths[0], hidden),
                _bottleneck(width, width, hidden, 2),
                _stage(width, depths[1], hidden),
                _bottleneck(width, 2 * width, 2 * hidden, 2),
                _stage(2 * width, depths[2], 2 * hidden),
                _bottleneck(2 * width, 2 * width, 4 * hidden, 2),
                _stage(2 * width, depths[3], 2 * hidden),
            ]
        )
        channels = 4 * hidden
        self.conv_sep = _conv(2 * width, channels)
        depthwise = _conv(channels, channels, 7, groups=channels, activation=False)
        linear = nn.Linear(channels, embedding_size, bias=False)
        self.features = _Layers(depthwise, nn.Flatten(), linear, nn.BatchNorm1d(embedding_size))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.features(self.conv_sep(x))


def randomise(network: nn.Module, seed: int = 0, num_images: int = 8) -> nn.Module:
    """Weights as after some training: batch norms fed once, scales, shifts and slopes spread out; evaluation mode."""
    torch.manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
            part.momentum = None  # the statistics of what it sees, not a running mean of them and the start
        if isinstance(part, nn.PReLU):
            nn.init.uniform_(part.weight, 0.0, 0.5)
    network.train()
    with torch.no_grad():
        network(torch.rand(num_images, 3, 112, 112) * 2 - 1)
    return network.eval()


class _ViTBlock(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        batch, tokens, width = x.shape
        split = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*split)  # PyTorch's fastest on CPU
        x = x + self.attn["proj"](mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp["fc2"](nn.functional.relu6(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """[B, 3, 112, 112] -> [B, embedding_size]; ``depth`` 12 and ``width`` 256 is ``vit_t``."""

    def __init__(self, depth: int = 12, width: int = 256, embedding_size: int = 512, num_heads: int = 8):
        super().__init__()
        tokens = (112 // 9) ** 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 9, 9)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))  # of training alone
        self.blocks = nn.ModuleList([_ViTBlock(width, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * tokens, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=2e-5),
        )

    def forward(self, image):
        x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.feature(self.norm(x).flatten(1))


NETWORKS = {
    "iresnet18": partial(IResNet, (2, 2, 2, 2)),
    "iresnet34": partial(IResNet, (3, 4, 6, 3)),
    "iresnet50": partial(IResNet, (3, 4, 14, 3)),
    "iresnet100": partial(IResNet, (3, 13, 30, 3)),
    "mobilefacenet": MobileFaceNet,
    "vit_t": ViT,
}
