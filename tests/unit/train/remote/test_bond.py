"""What binds the processes of a worker together: who is let in, and that none outlives another."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import shoal
from shoal.errors import DeadlineError
from shoal.train.remote import bond
from shoal.train.remote.bond import LOST, TOKEN_BYTES, Bond

TOKEN = bytes(range(TOKEN_BYTES))
# A process that has come is bound, and waits for ever; told so, it says farewell and ends by itself, or has forked another
# one before, as a loader of the user's may.
PARTNER = """
import os, sys, time
from shoal.train.remote import bond
head, host, port = bond.come(sys.argv[1], bytes.fromhex(sys.argv[2]), 1, 60.0)
held = bond.Bond([head])
assert (host, port) == ("127.0.0.1", 4321)
if sys.argv[3:] == ["forks"]:
    child = os.fork()
    if not child:
        time.sleep(600)
    print(child, flush=True)
print("bound", flush=True)
if sys.argv[3:] == ["leaves"]:
    held.say_farewell()
    sys.exit(0)
time.sleep(600)
"""


def start(listener: socket.socket, *more: str) -> subprocess.Popen[str]:
    address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(Path(shoal.__file__).parents[1])}
    command = [sys.executable, "-c", PARTNER, address, TOKEN.hex(), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_stranger_is_not_let_in_and_whose_head_is_gone_goes_as_well() -> None:
    with bond.listen("127.0.0.1") as listener:
        host, port = listener.getsockname()
        for said in (b"", b"x" * (TOKEN_BYTES + 2), TOKEN + b"\0\0", TOKEN + b"\0\x07"):
            stranger = socket.create_connection((host, port))
            stranger.sendall(said)
            stranger.close()
        with pytest.raises(DeadlineError, match="Only 0 of 1 further processes"):
            bond.gather(listener, TOKEN, 1, 0.5)
        partner = start(listener)
        found = bond.gather(listener, TOKEN, 1, 60.0)
        assert list(found) == [1]
        bond.tell_port(found, 4321)
        assert partner.stdout is not None and partner.stdout.readline() == "bound\n"
        # What the kernel does when a process ends.
        found[1].close()
        assert partner.wait(60) == LOST


def test_whose_child_lives_on_is_lost_all_the_same() -> None:
    with bond.listen("127.0.0.1") as listener:
        partner = start(listener, "forks")
        found = bond.gather(listener, TOKEN, 1, 60.0)
        bond.tell_port(found, 4321)
        assert partner.stdout is not None
        child = int(partner.stdout.readline())
        try:
            assert partner.stdout.readline() == "bound\n"
            partner.kill()
            partner.wait(60)
            found[1].settimeout(60)
            # The end, not a timeout.
            assert found[1].recv(1) == b""
        finally:
            os.kill(child, signal.SIGKILL)
            partner.stdout.close()
            found[1].close()


def test_a_head_lets_its_partners_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: lost.set())
    with bond.listen("127.0.0.1") as listener:
        partner = start(listener, "leaves")
        found = bond.gather(listener, TOKEN, 1, 60.0)
        held = Bond(list(found.values()))
        bond.tell_port(found, 4321)
        held.await_farewells()
        assert partner.wait(60) == 0 and not lost.is_set()
        if partner.stdout is not None:
            partner.stdout.close()
        found[1].close()
