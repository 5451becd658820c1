"""One side of benchmarks/parameter_server.py: how fast this machine copies, with as many processes as there are workers."""

from __future__ import annotations

import argparse
import json
import os
import time

import torch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--times", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    read, write = os.pipe()
    go, start = os.pipe()
    for _ in range(options.workers):
        if os.fork() == 0:
            source, target = (torch.ones(options.bytes // 4) for _ in range(2))
            target.copy_(source)
            os.read(go, 1)
            began = time.monotonic()
            for _ in range(2 * options.times):
                target.copy_(source)
            os.write(write, json.dumps([began, time.monotonic()]).encode().ljust(64))
            os._exit(0)
    os.write(start, b"." * options.workers)
    spans = [json.loads(os.read(read, 64)) for _ in range(options.workers)]
    for _ in range(options.workers):
        os.wait()
    wall_s = max(end for _, end in spans) - min(begin for begin, _ in spans)
    payload = 2 * options.bytes * options.times * options.workers
    print(json.dumps({"median_s": wall_s / options.times, "gb_s": payload / wall_s / 1e9}))


if __name__ == "__main__":
    main()
