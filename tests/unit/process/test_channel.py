"""What goes from one of our processes to another."""

from __future__ import annotations

import os
import threading

import cloudpickle
import torch

from shoal.process.channel import Channel, dumps


def named(labels: object) -> int:
    """Says torch, and names a part of it that is a module of a kind of its own."""
    return int(torch.ones(len(labels.classes)).sum())  # type: ignore[attr-defined]


def test_a_function_that_says_torch_and_classes() -> None:
    class Labels:
        classes = ("a", "b")

    sent = cloudpickle.loads(dumps((lambda labels: int(torch.ones(len(labels.classes)).sum()), Labels)))
    assert sent[0](sent[1]()) == named(Labels()) == 2


def test_a_message_larger_than_a_socket_holds_comes_whole_with_its_descriptors() -> None:
    left, right = Channel.pair()
    read, write = os.pipe()
    value = os.urandom(3 << 20)
    sender = threading.Thread(target=lambda: (left.send(value, (write,)), left.send("next")))
    sender.start()
    found, fds = right.receive(60.0)
    assert found == value and right.receive(60.0) == ("next", [])
    sender.join()
    os.write(fds[0], b"x")
    assert os.read(read, 1) == b"x"
    for fd in (read, write, *fds):
        os.close(fd)
    left.close()
    right.close()
