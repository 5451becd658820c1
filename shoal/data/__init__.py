"""Data sets, the order of samples, and how batches are fetched. Importing this does not import torch."""

from __future__ import annotations

from shoal.data.arrays import ArrayDataset, Images
from shoal.data.csv import csv
from shoal.data.folder import folder
from shoal.data.load import load
from shoal.data.order import batch_count, batch_indices, epoch_order, mix, share_bounds
from shoal.data.source import Source, open_source

__all__ = [
    "ArrayDataset",
    "Images",
    "Source",
    "batch_count",
    "batch_indices",
    "csv",
    "epoch_order",
    "folder",
    "load",
    "mix",
    "open_source",
    "share_bounds",
]
