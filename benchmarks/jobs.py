"""Jobs that are there to be measured: a ResNet-18 for 32 × 32 pictures and a transformer of six layers on text."""

from __future__ import annotations

import torch
from torch import nn

from shoal.job import Job
from shoal.jobs.language import text_transformer
from shoal.jobs.vision.cifar_cnn import train_data

_WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """The basic block of He et al. (2016): two 3 × 3 convolutions with BatchNorm, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out)


class ResNet18(nn.Module):
    """ResNet-18 as it is usually written for CIFAR: a 3 × 3 stem without pooling; 11.2 million parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        layers: list[nn.Module] = []
        channels = 64
        for stage, width in enumerate(_WIDTHS):
            layers += [Block(channels, width, 1 if stage == 0 else 2), Block(width, width, 1)]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.pool(self.layers(x)), 1))


def resnet18() -> Job:
    """ResNet-18 on CIFAR-10."""
    return Job(
        name="resnet18", model=ResNet18, train_data=train_data, loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4), batch_size=64, epochs=1,
    )  # fmt: skip


def transformer() -> Job:
    """The language model of ``text-transformer`` with six blocks."""
    return text_transformer.job().replace(
        name="transformer-6", model=lambda: text_transformer.Transformer(6), eval_data=None, epochs=1
    )
