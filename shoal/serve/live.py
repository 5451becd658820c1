"""Weights that change while they are used: a service that keeps up with a run by what its servers publish.

The model is there twice, in two *banks* of shared memory. A process of its own, forked from the template as replicas are, reads
the run (``shoal.ps.Reader``), writes what has changed into the bank that nobody uses, and then says by one word that this is
the one to use. A replica looks at the word before each batch, and says which bank it computes with until the batch is done;
nobody writes into a bank that somebody uses. So no batch sees half an update, nobody waits, and there is no new version.

What is computed from weights beforehand (folded BatchNorm, copies of lower precision) would stay as it was: of a model that
follows a run by its updates nothing of the kind is made.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal import bundle
from shoal.comm.memory import SharedMemory
from shoal.errors import DeadlineError, RequestError, ShoalError, TargetError
from shoal.process.channel import Channel
from shoal.ps.embedding import embeddings
from shoal.ps.reader import Reader
from shoal.serve.follow import newest
from shoal.serve.messages import FollowRun, Lost, Skipped
from shoal.serve.slots import LIVE, Slots

_ALIGN = 64
_FIRST_S = 5.0
_LOOK_S = 1.0
_NAP_S = 0.0005
# After this long every store of another process is seen: it was made long before.
_SEEN_S = 0.001


class Banks:
    """A model twice, with its weights where all processes that are forked later share them."""

    def __init__(self, model: nn.Module, update: int = 0) -> None:
        """``model`` becomes the first bank; ``update``: which it has of its run's. RequestError where it cannot be copied."""
        try:
            second = copy.deepcopy(model)
        except Exception as error:
            raise RequestError(
                f"A copy of the model cannot be made ({type(error).__name__}), so it cannot follow a run by its updates; "
                "write its __deepcopy__, or serve the run's checkpoints."
            ) from None
        self.models: Sequence[nn.Module] = (model, second)
        self.update = update
        self._memory = [_shared(model), _shared(second)]


class Holder:
    """A replica's hold on the bank that it computes with."""

    def __init__(self, banks: Banks, slots: Slots, ring: int) -> None:
        self._models = banks.models
        self._live, self._using, self._ring = slots.live, slots.using, ring
        self._first_update = banks.update
        self.leave()

    def take(self) -> nn.Module:
        """The newest weights; nobody writes to them until ``leave``."""
        while True:
            bank = int(self._live[LIVE.BANK])
            self._using[self._ring] = 1 + bank
            if int(self._live[LIVE.BANK]) == bank:
                return self._models[bank]

    @property
    def update(self) -> int:
        """How many updates of the run are in the weights that were taken, 0 where nobody knows."""
        bank = int(self._using[self._ring]) - 1
        return int(self._live[LIVE.UPDATE_0 + bank]) or (0 if bank else self._first_update)

    def leave(self) -> None:
        self._using[self._ring] = 0


def first_weights(model: nn.Module, path: Path, run: Path) -> tuple[nn.Module, int | None]:
    """Give a model what a run has now; where the run is not to be reached any more, its newest checkpoint, or finished model.

    ``path``: the bundle that says how it is built. Returns with it how many updates are in it on every server, None where it is
    not what the run has now. TargetError where there is neither.
    """
    try:
        with Reader(run, _FIRST_S) as reader:
            update = min(reader.versions, default=0)
            reader.load_into(model)
        return model.eval(), update
    except (DeadlineError, TargetError):
        found = newest(run)
        if found is None:
            raise
        return (bundle.load(found) if found.name == "model" else bundle.load_with(path, found)), None


def not_a_number(model: nn.Module) -> str | None:
    """The name of a weight that is no number, if there is one."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            # A sum may be none where no weight is; only then is every one looked at.
            if tensor.is_floating_point() and bool(torch.isnan(tensor.sum())) and bool(torch.isnan(tensor).any()):
                return name
    return None


def follow(banks: Banks, slots: Slots, message: FollowRun, channel: Channel) -> None:
    """Keep the banks current until the run publishes nothing more, or cannot be heard any more; then say so."""
    torch.set_num_threads(1)
    ended = False
    try:
        with Reader(message.run, message.within_s) as reader:
            _keep(banks, slots, reader, channel)
            ended = reader.ended is not None
            reason = reader.ended or f"Nothing was heard of it for {reader.silent_s:.0f} s."
    except ShoalError as error:
        reason = str(error)
    channel.send(Lost(reason, ended))


def _keep(banks: Banks, slots: Slots, reader: Reader, channel: Channel) -> None:
    live, told = slots.live, False
    number = 0
    while True:
        if reader.number == number:
            try:
                reader.wait(number + 1, _LOOK_S)
            except DeadlineError:
                if reader.ended is None and reader.silent_s < _FIRST_S:
                    continue
                # What came with the last word is taken, too.
                if reader.number == number:
                    return
        idle = 1 - int(live[LIVE.BANK])
        _await_unused(slots, idle)
        # Of a newer one that comes in between it would say too much.
        at, update = reader.published_at, min(reader.versions, default=0)
        number = reader.load_into(banks.models[idle])
        bad = not_a_number(banks.models[idle])
        if bad is not None:
            if not told:
                channel.send(Skipped(f"{bad} is not a number in what the run has now, so the weights from before stay in use."))
            told = True
            continue
        told = False
        live[LIVE.UPDATES] += 1
        live[LIVE.PUBLISHED_AT] = at
        live[LIVE.LAG_S] = time.time() - at
        live[LIVE.UPDATE_0 + idle] = update
        live[LIVE.BANK] = idle


def _await_unused(slots: Slots, bank: int) -> None:
    time.sleep(_SEEN_S)
    while (slots.using == 1 + bank).any():
        time.sleep(_NAP_S)


def _shared(model: nn.Module) -> SharedMemory:
    """Move a model's weights into shared memory, laid out as they are."""
    tensors: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    sizes = [-(-t.numel() * t.element_size() // _ALIGN) * _ALIGN for t in tensors.values()]
    memory = SharedMemory.create(sum(sizes), "shoal-weights")
    at = 0
    for tensor, size in zip(tensors.values(), sizes, strict=True):
        flat = memory.tensor(at, tensor.numel(), tensor.dtype)
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        place = flat.as_strided(tensor.shape, tensor.stride()) if last else flat.view(tensor.shape)
        place.copy_(tensor.detach())
        tensor.data = place
        at += size
    for _, module in embeddings(model):
        # Its table is in shared memory, once there is one.
        _ = module.table
    memory.close()
    return memory
