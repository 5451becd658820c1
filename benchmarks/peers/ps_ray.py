"""One side of benchmarks/parameter_server.py: an actor holds the parameters, two pull and push: a user's obvious way."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--times", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    ray.init(num_cpus=options.workers + 1, include_dashboard=False, logging_level="error", configure_logging=False)

    @ray.remote(num_cpus=1)
    class Server:
        def __init__(self, count: int) -> None:
            self.weights = np.zeros(count, dtype=np.float32)

        def pull(self) -> np.ndarray:
            return self.weights

        def push(self, gradient: np.ndarray) -> bool:
            self.weights -= np.float32(1e-3) * gradient
            return True

    @ray.remote(num_cpus=1)
    class Worker:
        def work(self, server: Any, count: int, times: int) -> list[float]:
            own, gradient = np.zeros(count, dtype=np.float32), np.ones(count, dtype=np.float32)
            seconds = []
            for _ in range(times):
                start = time.perf_counter()
                own[:] = ray.get(server.pull.remote())
                ray.get(server.push.remote(gradient))
                seconds.append(time.perf_counter() - start)
            return seconds

    count = options.bytes // 4
    server = Server.remote(count)
    workers = [Worker.remote() for _ in range(options.workers)]
    warm = max(2, options.times // 20)
    ray.get([worker.work.remote(server, count, warm) for worker in workers])
    began = time.monotonic()
    found = ray.get([worker.work.remote(server, count, options.times) for worker in workers])
    wall_s = time.monotonic() - began
    payload = 2 * options.bytes * options.times * options.workers
    median_s = statistics.median(s for own in found for s in own)
    ray.shutdown()
    print(json.dumps({"median_s": median_s, "gb_s": payload / wall_s / 1e9}))


if __name__ == "__main__":
    main()
