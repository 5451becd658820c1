"""Put what a command printed between two markers of both READMEs.

    make demo 2>&1 | tee demo.log;  python scripts/readme_output.py demo-output demo.log
    make test 2>&1 | tail -1 > test.log;  python scripts/readme_output.py test-output test.log
    python scripts/readme_output.py numbers table.md        # Markdown, taken as it is

The markers are lines: <!-- demo-output --> and <!-- /demo-output -->. Colours are left out, and so are lines
of progress that were overwritten.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")


def plain(log: str) -> str:
    """Return a terminal's log as it looked at the end: no colours, and of an overwritten line only its last state."""
    lines = (line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in _ESCAPES.sub("", log).split("\n"))
    return "\n".join(lines).strip("\n")


def put(page: str, marker: str, content: str) -> str:
    """Return the page with the content between its markers; ValueError where it does not have both, once each."""
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if page.count(opening) != 1 or page.count(closing) != 1:
        raise ValueError(f"the page needs {opening} and {closing}, once each")
    before, _, rest = page.partition(opening)
    return f"{before}{opening}\n{content}\n{closing}{rest.partition(closing)[2]}"


def main(arguments: Sequence[str]) -> int:
    """Fill one marker of both READMEs from a file."""
    if len(arguments) != 2:
        print("usage: readme_output.py MARKER FILE", file=sys.stderr)
        return 2
    marker, file = arguments[0], Path(arguments[1])
    content = plain(file.read_text(encoding="utf-8"))
    if file.suffix != ".md":
        content = f"```text\n{content}\n```"
    for name in READMES:
        path = ROOT / name
        path.write_text(put(path.read_text(encoding="utf-8"), marker, content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
