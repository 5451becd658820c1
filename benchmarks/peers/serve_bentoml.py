"""BentoML as its documentation has it: a service with adaptive batching where a batch size is asked for."""

from __future__ import annotations

import os
from typing import Any

import bentoml
from served import make

BATCH = int(os.environ["BATCH"])


@bentoml.service(workers=int(os.environ["WORKERS"]), traffic={"timeout": 60, "max_concurrency": 1024})
class Served:
    def __init__(self) -> None:
        self.model = make()

    if BATCH > 1:

        @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=60_000, route="/predict")
        def predict(self, input: list[Any]) -> list[Any]:
            return self.model([self.model.from_json(value) for value in input])

    else:

        @bentoml.api(route="/predict")
        def predict(self, input: Any) -> Any:
            return self.model([self.model.from_json(input)])[0]
