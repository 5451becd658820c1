from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import DeadlineError, RequestError, TargetError
from shoal.train.orders import Inbox, ask


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run whose supervisor is this process."""
    (tmp_path / "job.json").write_text("{}")
    rows = [{"role": role, "rank": 0, "pid": os.getpid(), "host": ""} for role in ("supervisor", "template", "worker")]
    (tmp_path / "processes.json").write_text(json.dumps(rows))
    return tmp_path


def asking(run: Path, *plans: str) -> list[Any]:
    """What comes of asking for these at the same time, while the supervisor answers with what was asked."""
    found: dict[str, Any] = {}

    def one(plan: str) -> None:
        try:
            found[plan] = ask(run, plan, 60.0)
        except RequestError as error:
            found[plan] = error

    inbox = Inbox(run)
    threads = [threading.Thread(target=one, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (asked := inbox.next()) is not None:
            inbox.answer(asked, **({"error": "No."} if asked.plan == "dp=9" else {"plan": asked.plan, "step": 3}))
    return [found[plan] for plan in plans]


def test_each_request_gets_its_own_answer_and_leaves_nothing(run: Path) -> None:
    two, nine = asking(run, "dp=2", "dp=9")
    assert two == {"plan": "dp=2", "step": 3}
    assert isinstance(nine, RequestError) and str(nine) == "No." and nine.exit_code == 2
    assert not list(run.glob("replan-*"))


def test_what_an_earlier_supervisor_left_is_removed_and_what_is_no_own_file_is_not_read(run: Path, tmp_path: Path) -> None:
    (run / "replan-1.request").write_text("dp=2")
    inbox = Inbox(run)
    assert inbox.next() is None
    (run / "secret").write_text("dp=3")
    (run / "replan-2.request").symlink_to(run / "secret")
    os.mkfifo(run / "replan-3.request")
    (run / "replan-4.request").write_bytes(b"\xff" * (1 << 17))
    inbox._looked_at = 0.0
    assert inbox.next() is None and not list(run.glob("*.request"))


def test_a_run_that_cannot_change_says_so_in_one_sentence(run: Path) -> None:
    with pytest.raises(DeadlineError, match=r"has not answered for 0\.3 s"):
        ask(run, "dp=2", 0.3)
    assert not list(run.glob("replan-*"))
    inbox = Inbox(run)
    thread = threading.Thread(target=lambda: inbox.close("It is over.") if _arrived(run) else None)
    thread.start()
    with pytest.raises(RequestError, match=r"^It is over\.$"):
        ask(run, "dp=2", 60.0)
    thread.join()
    (run / "processes.json").write_text(
        json.dumps([{"role": role, "rank": 0, "pid": os.getpid(), "host": ""} for role in ("supervisor", "worker")])
    )
    with pytest.raises(RequestError, match=r"started by torchrun or trains on GPUs"):
        ask(run, "dp=2", 1.0)
    (run / "processes.json").write_text("[]")
    with pytest.raises(TargetError, match=r"is not running; go on with it .* --resume --plan dp=2"):
        ask(run, "dp=2", 1.0)
    with pytest.raises(TargetError, match=r"is no run directory"):
        ask(run / "elsewhere", "dp=2", 1.0)


def _arrived(run: Path) -> bool:
    while not list(run.glob("*.request")):
        pass
    return True
