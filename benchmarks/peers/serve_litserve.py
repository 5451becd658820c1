"""LitServe as its documentation has it, with its own batching where a batch size is asked for.

Annotations are real here: LitServe looks at them.
"""

import os
from typing import Any

import litserve
from served import make

BATCH = int(os.environ["BATCH"])


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = make()

    def decode_request(self, request: dict[str, Any]) -> Any:
        return self.model.from_json(request["input"])

    def predict(self, value: Any) -> Any:
        return self.model(value if BATCH > 1 else [value])

    if BATCH > 1:

        def batch(self, values: list[Any]) -> list[Any]:
            return values

        def unbatch(self, output: Any) -> Any:
            return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"output": output if BATCH > 1 else output[0]}


if __name__ == "__main__":
    api = Api(max_batch_size=BATCH, batch_timeout=0.005 if BATCH > 1 else 0.0)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=int(os.environ["WORKERS"]), timeout=60
    )
    server.run(port=int(os.environ["PORT"]), generate_client_file=False, num_api_servers=1, log_level="error")
