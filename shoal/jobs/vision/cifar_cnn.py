"""One convolution and one linear layer on CIFAR-10: small enough to see what a framework costs.

The network is the one of TensorFlow's beginner tutorials on distributed training: convolution 3→32 of 3×3
without padding, ReLU, max-pool 2×2, linear →10; 72,906 parameters, of which 72,010 are the last layer's.
Adam at 1e-3, 100 images a step, 10 epochs of 500 steps. Data: CIFAR-10 (Krizhevsky, 2009), 50,000 images
to train on and 10,000 to test, scaled to 0…1 and nothing else.

A plain PyTorch loop gets, after epoch 1: loss 1.54, accuracy 0.46, test accuracy 0.52; after epoch 10: loss
0.91, accuracy 0.69, test accuracy 0.63.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from shoal.data import Images, cifar10
from shoal.job import Job
from shoal.jobs.metrics import accuracy

NAME = "cifar-cnn"


def model() -> nn.Module:
    """Return the network: (N, 3, 32, 32) float -> (N, 10) logits."""
    return nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 15 * 15, 10),
    )


def train_data() -> Images:
    """Return the 50,000 training images and labels; DataError where they cannot be had."""
    return cifar10.load(_say).train()


def eval_data() -> Images:
    """Return the 10,000 test images and labels; DataError where they cannot be had."""
    return cifar10.load(_say).test()


def _say(text: str) -> None:
    """Tell how fetching the data goes; nothing is said where they are there already."""
    print(text, file=sys.stderr, flush=True)


def job() -> Job:
    """Return the job ``cifar-cnn``."""
    return Job(
        name=NAME,
        model=model,
        train_data=train_data,
        eval_data=eval_data,
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
        metrics={"accuracy": accuracy},
        batch_size=100,
        epochs=10,
    )
