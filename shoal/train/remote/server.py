"""A server that shares no memory with anybody."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.plan import Plan
from shoal.ps.dense import DensePart
from shoal.ps.endpoint import Endpoint
from shoal.ps.logged import LoggedServer, ToldLog
from shoal.ps.replication import ChainServer
from shoal.ps.requests import Ticket
from shoal.ps.shard import Shard
from shoal.ps.shard_server import ShardServer
from shoal.ps.table import Table
from shoal.train.host import TrainHost
from shoal.train.remote.beginning import FromCheckpoint
from shoal.train.remote.line import Line, Meeting
from shoal.train.remote.state import placement_of
from shoal.train.remote.words import LogFailed
from shoal.train.remote.worker import built_as
from shoal.train.row_tables import cold_path
from shoal.train.update_log import log_limit, log_name


def serve(make_host: Callable[[], TrainHost], meeting: Meeting, number: int) -> tuple[Path, dict[str, Any]]:
    """A server's whole life; the run's directory and its summary. ``make_host`` builds the job."""
    line = Line(meeting, "server", number)
    endpoint: Endpoint | None = None
    try:
        host = make_host()
        facts = host.facts()
        endpoint = Endpoint(meeting.keys, meeting.listen_at())
        address = endpoint.address.replace("0.0.0.0", meeting.own_host())
        placed = line.join(built_as(facts), address)
        plan = Plan.parse(placed.plan)
        torch.set_num_threads(plan.threads or 1)
        placement = placement_of(facts.table, facts.tables, range(plan.servers))
        cold = Path(placed.checkpoints).parent / f"cold-rows-{number}"
        # What one that was killed has left there is older than what this one is given.
        shutil.rmtree(cold, ignore_errors=True)
        tables = {n: Table.create(spec, cold_path(cold, n)) for n, spec in enumerate(facts.tables)}
        # Beyond the first come those that have a copy of what the first hold.
        dense = DensePart(placement.pieces_of(number % plan.servers), host.optimizer_over)
        shard = Shard(dense, tables, host.staleness_factor)
        host.forget_first_weights()
        # Looked at between requests, so that a server knows when the run is over.
        ticket: Ticket = line.look(None)
        over = False

        def between() -> None:
            nonlocal ticket, over
            line.receive(0.0)
            line.again(ticket)
            if ticket.answer is not None:
                over = bool(getattr(ticket.answer, "orders", placed.orders).over) or not hasattr(ticket.answer, "orders")
                ticket = line.look(getattr(ticket.answer, "orders", None))

            if isinstance(server, LoggedServer) and server.trouble is not None:
                reason = server.trouble
                line.ask(lambda n: LogFailed(n, number, reason), "the end of the run")

        run = Path(placed.checkpoints).parent
        begin = FromCheckpoint(run, shard, facts.table, placement, number % plan.servers)
        if plan.replicas:
            server: ShardServer = ChainServer(shard, endpoint, meeting.keys, placement.pieces)
        elif placed.log:
            log = ToldLog(Path(placed.log), log_name(number), endpoint, log_limit())
            server = LoggedServer(shard, endpoint, log, begin, placement.pieces)
        else:
            server = ShardServer(shard, endpoint, pieces=placement.pieces)
        server.serve(lambda: over, between)
        for table in tables.values():
            table.close()
        return line.leave()
    except BaseException as error:
        line.tell_failure(error)
        raise
    finally:
        if endpoint is not None:
            endpoint.close()
        line.close()


