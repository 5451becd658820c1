"""The Grafana dashboard that comes with shoal: which metrics it asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path

_FILE = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"


def metrics(prefix: str, without: str = "-") -> set[str]:
    """Names of the metrics in the panels' queries that begin with ``prefix``, and not with ``without``."""
    panels = json.loads(_FILE.read_text())["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel.get("targets", ()))
    return {name for name in re.findall(r"\bshoal_\w+", queries) if name.startswith(prefix) and not name.startswith(without)}


def exported(page: str) -> set[str]:
    """Names of the metrics on a page of Prometheus' text format: those that have a value, and those that may get one."""
    described = re.findall(r"^# TYPE (\w+) (\w+)$", page, re.MULTILINE)
    more = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {name + end for name, kind in described for end in more.get(kind, ("",))}
