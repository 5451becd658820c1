"""A process of a worker that is several: how these meet, and what each of them has of the model.

Beside the arena that a worker keeps its words in (the head's, as any worker's that shares no memory), each has one of its own for
its parts: ``train/own.py`` says which, ``train/part.py`` shapes the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from shoal.axes.data import ArenaData
from shoal.axes.server import ServedWorker
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Arena
from shoal.comm.group import Group
from shoal.comm.mesh import make_mesh
from shoal.comm.store import Store
from shoal.errors import DeadlineError
from shoal.plan import Plan
from shoal.train.host import Beside, TrainHost
from shoal.train.loop import Parts, Sender
from shoal.train.own import Own, own_part
from shoal.train.passes import Surroundings
from shoal.train.remote import bond
from shoal.train.remote.bond import LOST, Bond
from shoal.train.remote.exchange import Exchange, published_by
from shoal.train.remote.teams import grid_within, parts_of, size_of
from shoal.train.settings import RunSettings, layout_of
from shoal.train.split import Split

logger = logging.getLogger(__name__)

MEET_S = 60.0
_STORE_S = 300.0
_LOSS_S = 1.0
_HERE = "127.0.0.1"


@dataclass(frozen=True)
class Within:
    """One process of a worker, within it.

    Attributes:
        group: the worker's processes; a rank in it is a rank of ``teams.grid_within``.
        head: the head's.
        bond: what keeps them together.
    """

    group: Group
    head: int
    bond: Bond


@contextlib.contextmanager
def gathered(plan: Plan, listener: socket.socket, token: str, deadline_s: float) -> Iterator[Within]:
    """A head's way into its worker: wait for its partners. Whoever does not come ends this process, to be started again."""
    host = str(listener.getsockname()[0])
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_STORE_S),
            master_listen_fd=server.detach(),
        )  # fmt: skip
    with _or_begin_again():
        partners = bond.gather(listener, bytes.fromhex(token), size_of(plan) - 1, MEET_S)
        bond.tell_port(partners, port)
    with _within(plan, 0, store, host == _HERE, list(partners.values()), deadline_s) as within:
        yield within


@contextlib.contextmanager
def come(plan: Plan, address: str, token: str, place: int, deadline_s: float) -> Iterator[Within]:
    """A partner's way into its worker; ``place``: among its processes."""
    with _or_begin_again():
        head, host, port = bond.come(address, bytes.fromhex(token), place, MEET_S)
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_STORE_S))
    with _within(plan, place, store, host == _HERE, [head], deadline_s) as within:
        yield within


@contextlib.contextmanager
def _or_begin_again() -> Iterator[None]:
    try:
        yield
    except (DeadlineError, OSError, RuntimeError) as error:
        logger.warning("The processes of a worker have not met: %s", error)
        os._exit(LOST)


@contextlib.contextmanager
def _within(
    plan: Plan, place: int, store: dist.Store, here: bool, others: Sequence[socket.socket], deadline_s: float
) -> Iterator[Within]:
    parts, held = parts_of(plan), Bond(others)
    try:
        with Group.at(store, parts[place], len(parts), deadline_s, one_machine=here) as group:
            group.hear_by_itself()
            yield Within(group, parts[0], held)
    except BaseException:
        # What another one has left behind when it went is no error of this process's.
        held.await_loss(_LOSS_S)
        raise


@dataclass(frozen=True)
class Share:
    """What a process has of its worker.

    Attributes:
        parts, around: what it computes with, and what its passes need beside the model.
        store: of its own parts.
        owns: of each rank of the worker, the parts of the model that it has.
        exchange: its end of what the worker's processes say to one another.
    """

    parts: Parts
    around: Surroundings
    store: Store
    owns: dict[int, Own]
    exchange: Exchange


def take_share(
    host: TrainHost, settings: RunSettings, split: Split, worker: int, within: Within, channel: Sender,
    axis: ArenaData | None = None,
) -> Share:  # fmt: skip
    """Shape this process's copy of the model into its parts.

    Args:
        settings: of the run, as the lead has them; ``split``: how the model is divided, as seen by all.
        axis: the head's.
    """
    plan, facts, group = settings.plan, host.facts(), within.group
    first, rank = worker * group.world_size, worker * group.world_size + group.rank
    owns = {k: _without_state(own_part(split, facts.table, first + k)) for k in range(group.world_size)}
    own = owns[group.rank]
    settings = dataclasses.replace(settings, split=own.split, layout=layout_of(plan, facts, own.split, private=True))
    store = host.take_up(Arena.private(settings.layout), settings, True)
    host.forget_first_weights()
    group.meet_nearby()
    exchange = Exchange(
        group, within.head, store, host.buffered, facts.table, published_by(split, plan, facts.table)
    )
    beside = Beside(make_mesh(group, grid_within(plan)), lambda updater: _nothing_to_collect)
    found = axis or ServedWorker(store, rank, Waiting(spin_s=0.0))
    parts, around, _ = host.worker(rank, channel, lambda _: found, beside)
    # What the user is told of.
    around.rank = worker
    return Share(parts, around, store, owns, exchange)


def _without_state(own: Own) -> Own:
    """The same without what an optimizer keeps, which is the servers'."""
    table = dataclasses.replace(own.split.table, ranges=None, states=(), state_bytes=0, state_keys=(), scalar_keys=())
    return dataclasses.replace(own, split=dataclasses.replace(own.split, table=table))


def _nothing_to_collect(step: int) -> None:
    """Servers write checkpoints."""
