"""Ray Serve as its documentation has it: a deployment with replicas, with ``serve.batch`` where a batch size is asked for."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
BATCH, WORKERS = int(os.environ["BATCH"]), int(os.environ["WORKERS"])
NAMES = ("SERVED_MODEL", "SERVED_PATH", "SERVED_THREADS", "BATCH", "PYTHONPATH")


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.5})
class Served:
    def __init__(self) -> None:
        from served import make

        self.model = make()

    @serve.batch(max_batch_size=max(2, BATCH), batch_wait_timeout_s=0.005)
    async def together(self, values: list[Any]) -> list[Any]:
        return self.model(values)

    async def __call__(self, request: Request) -> Any:
        import orjson

        if request.url.path == "/ready":
            return {"ready": True}
        body = await request.body()
        value = self.model.from_bytes(body) if request.url.path == "/raw" else self.model.from_json(orjson.loads(body)["input"])
        return {"output": await self.together(value) if BATCH > 1 else self.model([value])[0]}


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    os.environ["PYTHONPATH"] = here
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
        runtime_env={"env_vars": {name: os.environ[name] for name in NAMES}},
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PORT"])})
    serve.run(Served.bind(), route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
