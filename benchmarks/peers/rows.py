"""Looking rows up and updating them: ``python rows.py KIND --workers N`` prints one JSON line.

Every kind does the same: batches of 4,096 × 26 keys, drawn by a power law over a million rows that are there, scattered over
64 bits; rows of 64 floats for all keys of the batch come out, gradients for all of them go in, and Adagrad updates the rows.
``lookups_per_s`` is what one worker makes, ``best`` its quickest quarter of steps, ``per_cpu_s`` those by its processor time (of
no use for Ray and TensorFlow, whose work is in several processes).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np

ROWS, WIDTH, BATCH, FIELDS, EXPONENT, BATCHES = 1_000_000, 64, 4096, 26, 1.2, 12
_WARM_S = 1.0


def batches(seed: int, rows: int) -> list[np.ndarray]:
    """Positions of rows, by a power law; the same for all kinds."""
    weights = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -EXPONENT)
    draw = np.random.default_rng(seed)
    # Which rows are popular has nothing to do with where they lie.
    place = np.random.default_rng(0).permutation(rows)
    return [place[np.searchsorted(weights, draw.random(BATCH * FIELDS) * weights[-1])] for _ in range(BATCHES)]


def run(step: Callable[[np.ndarray], None], given: list[np.ndarray], seconds: float) -> dict[str, float]:
    """Repeat a step; what it makes in wall and in processor time, by its best quarter of steps."""
    walls, cpus = [], []
    until, at = time.perf_counter() + _WARM_S + seconds, 0
    while time.perf_counter() < until or len(walls) < 8:
        wall, cpu = time.perf_counter(), time.process_time()
        step(given[at % len(given)])
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        at += 1
    kept = slice(0, max(1, len(walls) // 4))
    lookups = BATCH * FIELDS
    return {
        "lookups_per_s": lookups * len(walls[2:]) / sum(walls[2:]),
        "best": lookups / float(np.mean(np.sort(walls)[kept])),
        "per_cpu_s": lookups / max(1e-9, float(np.mean(np.sort(cpus)[kept]))),
    }


def mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([f[key] for f in found])) for key in found[0]}


def in_processes(workers: int, work: Callable[[int], dict[str, float]]) -> dict[str, float]:
    """Fork workers and put together what they say."""
    pipes = []
    for rank in range(workers):
        readable, writable = os.pipe()
        if os.fork() == 0:
            os.write(writable, json.dumps(work(rank)).encode())
            os._exit(0)
        os.close(writable)
        pipes.append(readable)
    found = [json.loads(os.read(readable, 1 << 16)) for readable in pipes]
    for _ in pipes:
        os.wait()
    return mean(found)


def scattered(positions: np.ndarray) -> np.ndarray:
    """Keys anywhere in 64 bits."""
    return (positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def shoal(workers: int, rows: int, seconds: float, admission: int) -> dict[str, float]:
    import torch

    from shoal.ps import Adagrad
    from shoal.ps.embedding import Embedding
    from shoal.ps.spec import TableSpec
    from shoal.ps.table import Table

    torch.set_num_threads(1)
    module = Embedding(WIDTH, optimizer=Adagrad(lr=0.05))
    table = Table.create(TableSpec(width=WIDTH, optimizer=Adagrad(lr=0.05), admission=admission))
    for start in range(0, rows, 1 << 17):
        keys = scattered(np.arange(start, min(rows, start + (1 << 17))))
        table.push(keys, torch.zeros(len(keys), WIDTH), np.full(len(keys), admission, np.uint32))
    module.use(table)
    gradient = torch.randn(BATCH * FIELDS, WIDTH) * 1e-3

    def work(rank: int) -> dict[str, float]:
        from shoal.train.allocator import keep_freed_memory

        keep_freed_memory()

        def step(keys: np.ndarray) -> None:
            module(torch.from_numpy(keys)).backward(gradient)
            module.step()

        return run(step, [scattered(b) for b in batches(rank + 1, rows)], seconds)

    return in_processes(workers, work)


def plain(workers: int, rows: int, seconds: float, admission: int) -> dict[str, float]:
    """torch.nn.Embedding(sparse=True) with Adagrad, in one process; its keys are positions, so it hashes nothing."""
    import torch

    torch.set_num_threads(1)
    torch.sparse.check_sparse_tensor_invariants.disable()
    module = torch.nn.Embedding(rows, WIDTH, sparse=True)
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.05)
    gradient = torch.randn(BATCH * FIELDS, WIDTH) * 1e-3

    def step(keys: np.ndarray) -> None:
        module(torch.from_numpy(keys)).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return run(step, batches(1, rows), seconds)


def ray_actors(workers: int, rows: int, seconds: float, admission: int) -> dict[str, float]:
    """What a user of Ray would write: an actor holds table and sums, workers pull and push keys made unique beforehand."""
    import ray
    import torch

    ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False)

    @ray.remote(num_cpus=1)
    class Server:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.rows, self.sums = torch.randn(rows, WIDTH) * 0.05, torch.zeros(rows, WIDTH)

        def pull(self, keys: np.ndarray) -> np.ndarray:
            return self.rows[torch.from_numpy(keys)].numpy()

        def push(self, keys: np.ndarray, gradients: np.ndarray) -> None:
            at, g = torch.from_numpy(keys.copy()), torch.from_numpy(gradients.copy())
            sums = self.sums[at] + g * g
            self.sums[at] = sums
            self.rows[at] -= 0.05 * g / (sums.sqrt() + 1e-10)

    @ray.remote(num_cpus=1)
    class Worker:
        def work(self, server: object, rank: int) -> dict[str, float]:
            torch.set_num_threads(1)
            gradient = torch.randn(BATCH * FIELDS, WIDTH) * 1e-3

            def step(keys: np.ndarray) -> None:
                unique, inverse = torch.unique(torch.from_numpy(keys), return_inverse=True)
                pulled = torch.from_numpy(ray.get(server.pull.remote(unique.numpy())).copy())  # type: ignore[attr-defined]
                pulled[inverse]
                sums = torch.zeros_like(pulled).index_add_(0, inverse, gradient)
                ray.get(server.push.remote(unique.numpy(), sums.numpy()))  # type: ignore[attr-defined]

            return run(step, batches(rank + 1, rows), seconds)

    server = Server.remote()
    found = ray.get([Worker.remote().work.remote(server, rank) for rank in range(workers)])
    ray.shutdown()
    return mean(found)


def tensorflow(workers: int, rows: int, seconds: float, admission: int) -> dict[str, float]:
    """ParameterServerStrategy: one parameter server, workers that a coordinator hands steps to."""
    import multiprocessing
    import socket

    def port() -> int:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return int(s.getsockname()[1])

    cluster = {"worker": [f"127.0.0.1:{port()}" for _ in range(workers)], "ps": [f"127.0.0.1:{port()}"]}
    context = multiprocessing.get_context("spawn")
    servers = [
        context.Process(target=_tensorflow_server, args=(cluster, kind, k), daemon=True)
        for kind in cluster
        for k in range(len(cluster[kind]))
    ]
    for server in servers:
        server.start()
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(tf.train.ClusterSpec(cluster), rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        table = tf.Variable(tf.random.normal((rows, WIDTH), stddev=0.05))
        sums = tf.Variable(tf.zeros((rows, WIDTH)))
    given = tf.constant(np.stack(batches(1, rows)))
    gradient = tf.random.normal((BATCH * FIELDS, WIDTH), stddev=1e-3)

    @tf.function
    def step(at: object) -> object:
        unique, inverse = tf.unique(given[at])
        pulled = tf.gather(table, unique)
        looked_up = tf.gather(pulled, inverse)
        summed = tf.math.unsorted_segment_sum(gradient + 0 * looked_up, inverse, tf.size(unique))
        new = tf.gather(sums, unique) + summed * summed
        sums.scatter_update(tf.IndexedSlices(new, unique))
        table.scatter_sub(tf.IndexedSlices(0.05 * summed / (tf.sqrt(new) + 1e-10), unique))
        return tf.size(unique)

    for k in range(2 * workers):
        coordinator.schedule(step, args=(tf.constant(k % BATCHES),))
    coordinator.join()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for k in range(4 * workers):
            coordinator.schedule(step, args=(tf.constant(k % BATCHES),))
        coordinator.join()
        done += 4 * workers
    rate = done * BATCH * FIELDS / (time.perf_counter() - began) / workers
    for server in servers:
        server.terminate()
    return {"lookups_per_s": rate, "best": rate}


def _tensorflow_server(cluster: dict[str, list[str]], kind: str, number: int) -> None:
    import tensorflow as tf

    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=4)
    tf.distribute.Server(
        tf.train.ClusterSpec(cluster), job_name=kind, task_index=number, protocol="grpc", config=config, start=True
    ).join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = {"shoal": shoal, "torch": plain, "ray": ray_actors, "tensorflow": tensorflow}
    parser.add_argument("kind", choices=list(kinds))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--admission", type=int, default=2)
    options = parser.parse_args()
    found = kinds[options.kind](options.workers, options.rows, options.seconds, options.admission)
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
