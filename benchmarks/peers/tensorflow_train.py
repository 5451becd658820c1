"""Peer: the networks of benchmarks/train.py in tf.keras, MirroredStrategy as it comes, model.fit on tf.data from memory.

Runs in a venv of its own, without torch and shoal; the arrays come from the files of ``--arrays`` (the very bytes that the
other peers train on). No metrics are compiled in: they would only slow it down.
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

keras, layers = tf.keras, tf.keras.layers


class SteadyState(keras.callbacks.Callback):
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


def cifar_cnn(inputs: np.ndarray) -> tuple[Any, Any, Any]:
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    return model, keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def resnet18(inputs: np.ndarray) -> tuple[Any, Any, Any]:
    def conv(x: Any, width: int, size: int, stride: int) -> Any:
        x = layers.Conv2D(width, size, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    given = keras.Input((32, 32, 3))
    x = layers.ReLU()(conv(given, 64, 3, 1))
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            out = conv(layers.ReLU()(conv(x, width, 3, stride)), width, 3, 1)
            x = layers.ReLU()(out + (conv(x, width, 1, stride) if stride > 1 else x))
    model = keras.Model(given, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=1e-4)
    return model, optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Tied(layers.Layer):
    """Logits by the words' own embedding."""

    def __init__(self, words: Any) -> None:
        super().__init__()
        self.words = words

    def call(self, x: Any) -> Any:
        return tf.matmul(x, self.words.embeddings, transpose_b=True)


class Positions(layers.Layer):
    """Adds a learned vector for each place."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = self.add_weight(shape=(length, width), initializer="random_normal")

    def call(self, x: Any) -> Any:
        return x + self.table[: x.shape[1]]


def transformer(inputs: np.ndarray) -> tuple[Any, Any, Any]:
    width, heads, vocabulary, length = 128, 4, 2840, inputs.shape[1]
    given = keras.Input((length,), dtype="int32")
    words = layers.Embedding(vocabulary, width)
    x = Positions(length + 1, width)(words(given))
    for _ in range(6):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(y))
    model = keras.Model(given, Tied(words)(layers.LayerNormalization(epsilon=1e-5)(x)))

    def loss(target: Any, logits: Any) -> Any:
        counts = tf.cast(target >= 0, tf.float32)
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(tf.cast(target, tf.int32), 0), logits)
        return tf.reduce_sum(each * counts) / tf.reduce_sum(counts)

    return model, keras.optimizers.AdamW(1e-3, weight_decay=0.01, global_clipnorm=1.0), loss


def wide_deep(inputs: np.ndarray) -> tuple[Any, Any, Any]:
    starts = np.load(ARRAYS / "starts.npy")
    count = int(starts[-1])
    given = keras.Input((inputs.shape[1],), dtype="int32")
    rows = given + tf.constant(starts[:-1], tf.int32)
    wide = layers.Lambda(lambda w: tf.reduce_sum(w, axis=1))(layers.Embedding(count, 1)(rows))
    x = layers.Flatten()(layers.Embedding(count, 16)(rows))
    for size in (64, 32):
        x = layers.Dense(size, activation="relu")(x)
    model = keras.Model(given, layers.Add()([layers.Dense(1)(x), wide]))
    return model, keras.optimizers.Adagrad(0.05), keras.losses.BinaryCrossentropy(from_logits=True)


MODELS = {"cifar-cnn": cifar_cnn, "resnet18": resnet18, "transformer-6": transformer, "clicks-wide-deep": wide_deep}
ARRAYS = Path()


def main() -> None:
    global ARRAYS
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, choices=MODELS)
    parser.add_argument("--arrays", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    options = parser.parse_args()

    ARRAYS = options.arrays
    inputs, targets = np.load(ARRAYS / "inputs.npy"), np.load(ARRAYS / "targets.npy")
    inputs = inputs.astype(np.float32) / 255 if inputs.dtype == np.uint8 else inputs.astype(np.int32)
    data = tf.data.Dataset.from_tensor_slices((inputs, targets))
    data = data.shuffle(min(len(targets), 50_000)).repeat().batch(options.batch_size).prefetch(tf.data.AUTOTUNE)

    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        model, optimizer, loss = MODELS[options.job](inputs)
        model.compile(optimizer=optimizer, loss=loss)
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
