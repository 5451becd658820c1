"""``python -m shoal`` is ``shoal``."""

from __future__ import annotations

from shoal.cli.main import run

if __name__ == "__main__":
    run()
