"""Plain FastAPI as its documentation has it: a handler that calls the model; several processes by uvicorn's ``workers``.

``/predict`` declares what it takes, ``/by-hand`` reads the body with orjson: four times as fast where a request is 3,072 numbers.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from served import make

app = FastAPI()
model = make() if __name__ != "__main__" else None


class Asked(BaseModel):
    input: list[list[list[float]]] | str


def said(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


@app.post("/predict")
def predict(asked: Asked) -> dict[str, Any]:
    return {"output": model([model.from_json(asked.input)])[0]}


@app.post("/by-hand")
async def by_hand(request: Request) -> Response:
    value = orjson.loads(await request.body())["input"]
    return said({"output": model([model.from_json(value)])[0]})


@app.post("/raw")
async def raw(request: Request) -> Response:
    return said({"output": model([model.from_bytes(await request.body())])[0]})


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    uvicorn.run("serve_fastapi:app", port=int(os.environ["PORT"]), workers=int(os.environ["WORKERS"]), log_level="error")
