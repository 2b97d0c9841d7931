"""PyTorch twins of our backbones, written from the papers' and checkpoints' facts, with the checkpoints' layer names.

``build_twin(name, **options)`` takes the options of ``build_backbone``. ``copy_weights(ours, twin)`` and
``twin_value(...)`` map names and nothing else, so that a wrong name fails loudly.
"""

import numpy as np
import paddle
import torch
from torch import nn
from torch.nn import functional as F

DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}


def _halved(size: int, times: int) -> int:
    for _ in range(times):
        size = (size + 1) // 2
    return size


class IRBlock(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin, eps=1e-5)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout, eps=1e-5)
        self.prelu = nn.PReLU(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout, eps=1e-5)
        self.downsample = None
        if stride > 1 or cin != cout:
            down = nn.Conv2d(cin, cout, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(down, nn.BatchNorm2d(cout, eps=1e-5))

    def forward(self, x):
        y = self.bn1(x)
        y = self.conv1(y)
        y = self.prelu(self.bn2(y))
        y = self.bn3(self.conv2(y))
        return y + (self.downsample(x) if self.downsample is not None else x)


class IResNet(nn.Module):
    def __init__(self, depths, embedding_size=512, dropout=0.0, width=64, input_size=112):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=1e-5)
        self.prelu = nn.PReLU(width)
        channels = width
        for number, depth in enumerate(depths, 1):
            out = width << (number - 1)
            layer = [IRBlock(channels if i == 0 else out, out, 2 if i == 0 else 1) for i in range(depth)]
            self.add_module(f"layer{number}", nn.Sequential(*layer))
            channels = out
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-5)
        self.dropout = nn.Dropout(dropout, inplace=True)
        self.fc = nn.Linear(channels * _halved(input_size, 4) ** 2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size, eps=1e-5)
        self.features.weight.requires_grad = False

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.dropout(self.bn2(x).flatten(1))))


class ConvBlock(nn.Module):
    def __init__(self, cin, cout, kernel, stride, padding, groups=1, act=True):
        super().__init__()
        layers = [nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(cout)]
        self.layers = nn.Sequential(*layers, *([nn.PReLU(cout)] if act else []))

    def forward(self, x):
        return self.layers(x)


class DepthWise(nn.Module):
    def __init__(self, cin, cout, groups, stride, residual):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            ConvBlock(cin, groups, 1, 1, 0),
            ConvBlock(groups, groups, 3, stride, 1, groups),
            ConvBlock(groups, cout, 1, 1, 0, act=False),
        )

    def forward(self, x):
        y = self.layers(x)
        return y + x if self.residual else y


class Stack(nn.Module):
    def __init__(self, channels, count, groups):
        super().__init__()
        self.layers = nn.Sequential(*[DepthWise(channels, channels, groups, 1, True) for _ in range(count)])

    def forward(self, x):
        return self.layers(x)


class GDC(nn.Module):
    def __init__(self, channels, size, embedding_size):
        super().__init__()
        self.layers = nn.Sequential(
            ConvBlock(channels, channels, size, 1, 0, channels, act=False),
            nn.Flatten(),
            nn.Linear(channels, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )

    def forward(self, x):
        return self.layers(x)


class MobileFaceNet(nn.Module):
    """At width 128: groups 128, 256, 512 and 512 features; at width 256 the same, as the reference has them."""

    def __init__(self, blocks, width, groups, embedding_size=512, input_size=112):
        super().__init__()
        second = ConvBlock(width, width, 3, 1, 1, width // 2) if blocks[0] == 1 else Stack(width, blocks[0], groups)
        self.layers = nn.ModuleList(
            [
                ConvBlock(3, width, 3, 2, 1),
                second,
                DepthWise(width, width, groups, 2, False),
                Stack(width, blocks[1], groups),
                DepthWise(width, width * 2, groups * 2, 2, False),
                Stack(width * 2, blocks[2], groups * 2),
                DepthWise(width * 2, width * 2, groups * 4, 2, False),
                Stack(width * 2, blocks[3], groups * 2),
            ]
        )
        self.conv_sep = ConvBlock(width * 2, groups * 4, 1, 1, 0)
        self.features = GDC(groups * 4, _halved(input_size, 4), embedding_size)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.features(self.conv_sep(x))


class _Holder(nn.Module):
    """Carries parts under given names."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class ViTBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _Holder(qkv=nn.Linear(dim, 3 * dim, bias=False), proj=nn.Linear(dim, dim))
        self.mlp = _Holder(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).unbind(2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / (d // self.heads) ** 0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).reshape(b, n, d)
        x = x + self.attn.proj(mixed)
        return x + self.mlp.fc2(F.relu6(self.mlp.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Without stochastic depth; ``keep`` are the tokens [B, K] that the blocks see, None for all."""

    def __init__(self, dim, depth, embedding_size=512, heads=8, input_size=112):
        super().__init__()
        count = (input_size // 9) ** 2
        self.patch_embed = _Holder(proj=nn.Conv2d(3, dim, 9, 9))
        self.pos_embed = nn.Parameter(torch.zeros(1, count, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList([ViTBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.feature = nn.Sequential(
            nn.Linear(dim * count, dim, bias=False),
            nn.BatchNorm1d(dim, eps=2e-5),
            nn.Linear(dim, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=2e-5),
        )

    def forward(self, x, keep=None):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        every = x
        if keep is not None:
            rows = torch.arange(len(x))[:, None]
            x = x[rows, keep]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if keep is not None:
            full = self.mask_token.expand(every.shape).clone()
            full[rows, keep] = x
            x = full
        return self.feature(x.flatten(1))


class SE(nn.Module):
    def __init__(self, channels):
        super().__init__()
        hidden = max(1, channels // 16)
        self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.PReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))[:, :, None, None]


class PlainBlock(nn.Module):
    """``kernels`` (3, 3) is the basic block, (1, 3, 1) the bottleneck."""

    def __init__(self, cin, width, stride, kernels, se):
        super().__init__()
        outs = [width] * len(kernels)
        if len(kernels) == 3:
            outs[-1] = 4 * width
        self.count = len(kernels)
        where = 1 if self.count == 3 else 0
        previous = cin
        for i, (kernel, out) in enumerate(zip(kernels, outs, strict=True)):
            step = stride if i == where else 1
            self.add_module(f"conv{i + 1}", nn.Conv2d(previous, out, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(out))
            previous = out
        self.se = SE(previous) if se else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or cin != previous:
            self.downsample = nn.Sequential(nn.Conv2d(cin, previous, 1, stride, bias=False), nn.BatchNorm2d(previous))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.count:
                y = y.relu()
        return (self.se(y) + self.downsample(x)).relu()


class ResNet(nn.Module):
    def __init__(self, depths, kernels, embedding_size=128, width=64, input_size=112, pool="avg", se=False,
                 stem="imagenet", in_channels=3):  # fmt: skip
        super().__init__()
        self.stem, self.pool = stem, pool
        big = stem == "imagenet"
        self.conv1 = nn.Conv2d(in_channels, width, 7 if big else 3, 2 if big else 1, 3 if big else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for number, depth in enumerate(depths):
            out = (width << number) * (4 if len(kernels) == 3 else 1)
            stride = 1 if number == 0 and big else 2
            layer = [
                PlainBlock(channels if i == 0 else out, width << number, stride if i == 0 else 1, kernels, se)
                for i in range(depth)
            ]
            self.add_module(f"layer{number + 1}", nn.Sequential(*layer))
            channels = out
        positions = 1 if pool == "avg" else _halved(input_size, 5 if big else 4) ** 2
        self.fc = nn.Linear(channels * positions, embedding_size)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1) if self.pool == "avg" else x.flatten(1))


class FaceBlock(nn.Module):
    def __init__(self, cin, cout, stride, se):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, cin, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cin)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.se = SE(cout) if se else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = self.prelu(self.bn1(self.conv1(self.bn0(x))))
        return self.prelu(self.se(self.bn2(self.conv2(y))) + self.downsample(x))


class ResNetFace(nn.Module):
    def __init__(self, embedding_size=512, width=64, input_size=128, se=True, in_channels=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU()
        channels = width
        for number in range(4):
            out = width << number
            layer = [FaceBlock(channels, out, 1 if number == 0 else 2, se), FaceBlock(out, out, 1, se)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*layer))
            channels = out
        self.bn4 = nn.BatchNorm2d(channels)
        self.fc5 = nn.Linear(channels * _halved(input_size // 2, 3) ** 2, embedding_size)
        self.bn5 = nn.BatchNorm1d(embedding_size)

    def forward(self, x):
        x = F.max_pool2d(self.prelu(self.bn1(self.conv1(x))), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.bn5(self.fc5(self.bn4(x).flatten(1)))


class Mnist(nn.Module):
    def __init__(self, embedding_size=2, width=16, input_size=28, in_channels=1):
        super().__init__()
        channels, self.stages = in_channels, nn.ModuleList()
        for number in range(3):
            out, parts = width << number, []
            for cin in (channels, out):
                parts += [nn.Conv2d(cin, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.PReLU(out)]
            self.stages.append(nn.Sequential(*parts))
            channels = out
        self.fc = nn.Linear(channels * (input_size // 8) ** 2, embedding_size)

    def forward(self, x):
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
        return self.fc(x.flatten(1))


def build_twin(name: str, **options) -> nn.Module:
    """The twin of ``build_backbone(name, **options)``, for the options that its class takes."""
    if name in DEPTHS:
        return IResNet(DEPTHS[name], **options)
    if name == "mobilefacenet":
        width = options.pop("width", 128)
        return MobileFaceNet((1, 4, 6, 2), width, width, **options)
    if name == "mobilefacenet_large":
        width = options.pop("width", 256)
        return MobileFaceNet((2, 8, 12, 4), width, width // 2, **options)
    if name.startswith("vit"):
        dim, depth = {"vit_t": (256, 12), "vit_s": (512, 12), "vit_b": (512, 24), "vit_l": (768, 24)}[name]
        return ViT(options.pop("width", dim), depth, **options)
    plain = {
        "resnet18": ((2, 2, 2, 2), (3, 3)),
        "resnet34": ((3, 4, 6, 3), (3, 3)),
        "resnet50": ((3, 4, 6, 3), (1, 3, 1)),
    }
    if name in plain:
        return ResNet(*plain[name], **options)
    return {"resnet_face18": ResNetFace, "mnist_2d": Mnist}[name](**options)


def twin_name(name: str) -> str:
    """Our parameter name -> PyTorch's: only the running statistics are called otherwise."""
    return name.replace("._mean", ".running_mean").replace("._variance", ".running_var")


def linear_names(ours: paddle.nn.Layer) -> set[str]:
    """Names of the weights that Paddle stores as [in, out] and PyTorch as [out, in]."""
    return {f"{n}.weight" for n, part in ours.named_sublayers() if isinstance(part, paddle.nn.Linear)}


def copy_weights(ours: paddle.nn.Layer, twin: nn.Module) -> None:
    """Every weight and statistic of ``ours`` into ``twin``; names and shapes must agree one to one."""
    transposed = linear_names(ours)
    state = {}
    for name, value in ours.state_dict().items():
        array = value.numpy()
        state[twin_name(name)] = torch.tensor(array.T.copy() if name in transposed else array)
    kept = {key: value for key, value in twin.state_dict().items() if key.endswith("num_batches_tracked")}
    twin.load_state_dict({**kept, **state}, strict=True)


def randomise(ours: paddle.nn.Layer, seed: int = 0) -> paddle.nn.Layer:
    """Random weights of trained size: scales about 1, slopes about 0.25, statistics away from 0 and 1."""
    rng = np.random.default_rng(seed)
    with paddle.no_grad():
        for name, value in ours.state_dict().items():
            shape, leaf = value.shape, name.rsplit(".", 1)[-1]
            if leaf == "_variance":
                array = rng.uniform(0.5, 2.0, shape)
            elif leaf == "_mean":
                array = rng.normal(0, 0.3, shape)
            elif leaf == "weight" and len(shape) == 1:
                array = rng.uniform(0.1, 0.4, shape) if "prelu" in name else rng.uniform(0.5, 1.5, shape)
            elif len(shape) >= 2:
                fan_in = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
                array = rng.normal(0, fan_in**-0.5, shape)
            else:
                array = rng.normal(0, 0.2, shape)
            if name == "features.weight":
                array = np.ones(shape)
            value.set_value(array.astype(value.numpy().dtype))
    return ours
