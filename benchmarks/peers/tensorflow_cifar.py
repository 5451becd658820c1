"""Peer: the network of ``cifar-cnn`` in tf.keras, MirroredStrategy as it comes, model.fit on tf.data from memory.

Runs in a venv of its own, without torch and shoal; the arrays come from the files of ``--arrays`` (uint8 pixels
and labels, the very bytes that the other peers train on). No metrics are compiled in: they would only slow it down.
Prints one JSON line with ``samples_per_s``, counted by a callback over ``--steps`` after ``--warmup`` steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf


class SteadyState(tf.keras.callbacks.Callback):
    """Takes the time at the end of the last warm-up step and at the end of the last step of all."""

    def __init__(self, warmup: int) -> None:
        super().__init__()
        self._warmup = warmup
        self.begin = self.end = 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        if batch + 1 == self._warmup:
            self.begin = now
        self.end = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrays", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    options = parser.parse_args()

    images = np.load(options.arrays / "images.npy").astype(np.float32) / 255
    labels = np.load(options.arrays / "labels.npy")
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    data = data.shuffle(len(labels)).repeat().batch(options.batch_size).prefetch(tf.data.AUTOTUNE)

    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        model = tf.keras.Sequential(
            [
                tf.keras.Input((32, 32, 3)),
                tf.keras.layers.Conv2D(32, 3, activation="relu"),
                tf.keras.layers.MaxPooling2D(),
                tf.keras.layers.Flatten(),
                tf.keras.layers.Dense(10),
            ]
        )
        model.compile(
            optimizer=tf.keras.optimizers.Adam(1e-3),
            loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    clock = SteadyState(options.warmup)
    fitted = model.fit(data, steps_per_epoch=options.warmup + options.steps, epochs=1, verbose=0, callbacks=[clock])
    print(
        json.dumps(
            {
                "samples_per_s": options.steps * options.batch_size / (clock.end - clock.begin),
                "loss": float(fitted.history["loss"][-1]),
                "tensorflow": tf.__version__,
                "replicas": strategy.num_replicas_in_sync,
            }
        )
    )


if __name__ == "__main__":
    main()
