"""One side of benchmarks/parameter_server.py: TensorFlow's ParameterServerStrategy, servers and workers as processes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import time
from typing import Any


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _serve(cluster: dict[str, list[str]], job: str, index: int) -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=2)
    tf.distribute.Server(
        tf.train.ClusterSpec(cluster), job_name=job, task_index=index, protocol="grpc", config=config, start=True
    ).join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--times", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    ports = [f"127.0.0.1:{port}" for port in _free_ports(options.workers + 1)]
    cluster = {"worker": ports[:-1], "ps": ports[-1:]}
    context = multiprocessing.get_context("spawn")
    places = [("worker", k) for k in range(options.workers)] + [("ps", 0)]
    processes = [context.Process(target=_serve, args=(cluster, *place), daemon=True) for place in places]
    for process in processes:
        process.start()
    try:
        print(json.dumps(_measure(cluster, options)))
    finally:
        for process in processes:
            process.kill()


def _measure(cluster: dict[str, list[str]], options: Any) -> dict[str, float]:
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(tf.train.ClusterSpec(cluster), rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    count = options.bytes // 4
    with strategy.scope():
        weights = tf.Variable(tf.zeros(count))
    with tf.device("/cpu:0"):
        pass

    @tf.function
    def step() -> Any:
        # Pulled into the worker; the gradient is made there, and the variable is updated where it lies.
        own = tf.identity(weights.read_value())
        gradient = tf.ones_like(own) + 0.0 * own[:1]
        weights.assign_sub(1e-3 * gradient)
        return own[0]

    for _ in range(4 * options.workers):
        coordinator.schedule(step)
    coordinator.join()
    began = time.monotonic()
    for _ in range(options.times * options.workers):
        coordinator.schedule(step)
    coordinator.join()
    wall_s = time.monotonic() - began
    payload = 2 * options.bytes * options.times * options.workers
    # Workers take turns with nobody, so each has had so many in this time.
    return {"median_s": wall_s / options.times, "gb_s": payload / wall_s / 1e9}


if __name__ == "__main__":
    main()
