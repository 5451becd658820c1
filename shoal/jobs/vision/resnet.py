"""ResNet-8 with BatchNorm on CIFAR-10, trained by SGD with momentum and a cosine schedule.

The residual network for 32×32 images of He et al., "Deep Residual Learning for Image Recognition" (2016),
section 4.2, with n = 1: a 3×3 convolution, three stages of one block each with 16, 32 and 64 channels, global
average pooling, linear →10. Where a block changes the shape, its shortcut is a 1×1 convolution (their option B).
78,042 parameters, 12.5 million multiply-adds an image. The same images as ``cifar-cnn``, no augmentation.

The cosine goes down once over ``EPOCHS`` epochs; a run with more epochs wants another schedule.
"""

from __future__ import annotations

import torch
from torch import nn

from shoal.job import Job
from shoal.jobs.metrics import accuracy
from shoal.jobs.vision.cifar_cnn import eval_data, train_data

NAME = "cifar-resnet"
EPOCHS = 15
_WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm and a shortcut: (N, channels, H, W) -> (N, width, H/stride, W/stride)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return torch.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of depth 6 × ``blocks`` + 2 for 32×32 images: (N, 3, 32, 32) float -> (N, classes) logits."""

    def __init__(self, blocks: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(_WIDTHS[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        channels = _WIDTHS[0]
        for stage, width in enumerate(_WIDTHS):
            for block in range(blocks):
                stages.append(Block(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.stem(x))
        return self.head(x.mean(dim=(2, 3)))


def job() -> Job:
    """Return the job ``cifar-resnet``."""
    return Job(
        name=NAME,
        model=ResNet,
        train_data=train_data,
        eval_data=eval_data,
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS),
        scheduler_every="epoch",
        metrics={"accuracy": accuracy},
        batch_size=128,
        epochs=EPOCHS,
    )
