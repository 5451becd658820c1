"""What a Job gives as data, behind one interface: a length, and batches by sample numbers.

Who fetches: the feed, with a part of the global order. Sources hold no state that a fetch changes, so several
threads or forked processes may fetch from one.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data.arrays import gather
from shoal.errors import DataError, JobError

Collate = Callable[[list[Any]], Any]
BeforeItem = Callable[[int], None]


class Source(ABC):
    """Samples that can be fetched by number.

    Attributes:
        vectorised: without a collate, a batch is one gather: cheap, the same for the same indices, and no code of
            the user's runs in it that could draw random numbers.
    """

    vectorised: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples, at least 1."""

    @abstractmethod
    def items(self, indices: NDArray[np.int64], before_item: BeforeItem | None) -> list[Any]:
        """Return the samples one by one, as the user's data set gives them."""

    def fetch(
        self, indices: NDArray[np.int64], collate: Collate | None = None, before_item: BeforeItem | None = None
    ) -> Any:
        """Return the batch of these samples, in this order.

        Args:
            indices: int64, each in 0…len−1; at least one.
            collate: list of samples -> batch; None: torch's ``default_collate``.
            before_item: called with the sample's number before that item is fetched (the place to reseed the
                random streams); never where the batch is one gather, nor for plain tensors under a collate. A
                data set that fetches many items in one call (``__getitems__``) gets it once, with the first number.
        """
        from torch.utils.data import default_collate

        return (collate or default_collate)(self.items(indices, before_item))

    def prefer_layout(self, channels_last: bool) -> None:
        """Hand out images in this memory layout, where the data set can make either; others stay as they are."""
        return

    @property
    def classes(self) -> Sequence[str] | None:
        """The names of the classes, where the data set knows them."""
        return None


class _Columns(Source):
    """A tensor, or tuples, lists and mappings of tensors, all with the samples along their first dim."""

    vectorised = True

    def __init__(self, columns: Any, length: int) -> None:
        self._columns = columns
        self._length = length

    def __len__(self) -> int:
        return self._length

    def items(self, indices: NDArray[np.int64], before_item: BeforeItem | None) -> list[Any]:
        return [self._item(indices[at : at + 1]) for at in range(len(indices))]

    def _item(self, index: NDArray[np.int64]) -> Any:
        return _map_leaves(self._columns, lambda column: gather(column, index)[0])

    def fetch(
        self, indices: NDArray[np.int64], collate: Collate | None = None, before_item: BeforeItem | None = None
    ) -> Any:
        if collate is not None:
            return super().fetch(indices, collate, before_item)
        return _map_leaves(self._columns, lambda column: gather(column, indices))


class _Items(Source):
    """A map-style data set, one item after the other."""

    def __init__(self, dataset: Any, length: int) -> None:
        self._dataset = dataset
        self._length = length

    def __len__(self) -> int:
        return self._length

    def items(self, indices: NDArray[np.int64], before_item: BeforeItem | None) -> list[Any]:
        samples = []
        for index in indices.tolist():
            if before_item is not None:
                before_item(index)
            samples.append(self._dataset[index])
        return samples

    def prefer_layout(self, channels_last: bool) -> None:
        if hasattr(self._dataset, "channels_last"):
            self._dataset.channels_last = channels_last

    @property
    def classes(self) -> Sequence[str] | None:
        return getattr(self._dataset, "classes", None)


class _ItemLists(_Items):
    """A data set that fetches a list of items in one call (``__getitems__``, as Hugging Face's do)."""

    def items(self, indices: NDArray[np.int64], before_item: BeforeItem | None) -> list[Any]:
        if before_item is not None:
            before_item(int(indices[0]))
        return list(self._dataset.__getitems__(indices.tolist()))


class _Batches(_Items):
    """A data set with ``batch(indices)``; with a collate, item by item."""

    vectorised = True

    def fetch(
        self, indices: NDArray[np.int64], collate: Collate | None = None, before_item: BeforeItem | None = None
    ) -> Any:
        if collate is not None:
            return super().fetch(indices, collate, before_item)
        return self._dataset.batch(indices)


class _Selection(Source):
    """Some samples of another source: ``torch.utils.data.Subset``, taken apart so that a gather stays a gather."""

    def __init__(self, source: Source, numbers: NDArray[np.int64]) -> None:
        self._source = source
        self._numbers = numbers
        self.vectorised = source.vectorised

    def __len__(self) -> int:
        return len(self._numbers)

    def items(self, indices: NDArray[np.int64], before_item: BeforeItem | None) -> list[Any]:
        # One by one only where somebody listens: it must hear the numbers of this source, not of the inner one.
        if before_item is None:
            return self._source.items(self._numbers[indices], None)
        samples = []
        for index in indices.tolist():
            before_item(index)
            samples += self._source.items(self._numbers[index : index + 1], None)
        return samples

    def fetch(
        self, indices: NDArray[np.int64], collate: Collate | None = None, before_item: BeforeItem | None = None
    ) -> Any:
        if self.vectorised and collate is None:
            return self._source.fetch(self._numbers[indices])
        return super().fetch(indices, collate, before_item)

    def prefer_layout(self, channels_last: bool) -> None:
        self._source.prefer_layout(channels_last)

    @property
    def classes(self) -> Sequence[str] | None:
        return self._source.classes


def open_source(value: Any, what: str) -> Source:
    """Turn what a Job gives as data into a Source.

    Args:
        value: a tuple or list of tensors or numpy arrays, also nested or as mappings; a map-style Dataset; anything
            with ``batch(indices)``; or a function without arguments that returns one of these.
        what: how to name it in errors, for example "train_data".

    Raises JobError where it is not a data set (an IterableDataset, a loader, a text), DataError where it is
    empty or its tensors differ in length. What the user's own code raises is passed on.
    """
    import torch
    from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

    if isinstance(value, type) or (callable(value) and not _is_map_style(value)):
        value = value()
    if isinstance(value, IterableDataset):
        raise JobError(f"{what} is an IterableDataset, which shoal cannot train on; give a map-style Dataset instead.")
    if isinstance(value, DataLoader):
        raise JobError(f"{what} is a DataLoader; give its dataset, shoal makes the batches itself.")
    if isinstance(value, (str, bytes)):
        raise JobError(f"{what} is a text; give shoal.data.load(path) for the data at a path.")
    if isinstance(value, (torch.Tensor, np.ndarray, tuple, Mapping)) or _is_list_of_tensors(value):
        return _open_columns(tuple(value) if isinstance(value, list) else value, what)
    if not _is_map_style(value):
        raise JobError(
            f"{what} is {_a(type(value).__name__)}, which is not a data set; "
            "give a tuple of tensors or a Dataset with __len__ and __getitem__."
        )
    length = _length(value, what)
    if isinstance(value, TensorDataset) and type(value).__getitem__ is TensorDataset.__getitem__:
        return _open_columns(value.tensors, what)
    if type(value) is Subset:
        return _open_subset(value, what)
    if _has_batch(value):
        return _Batches(value, length)
    if callable(getattr(value, "__getitems__", None)):
        return _ItemLists(value, length)
    return _Items(value, length)


def _open_subset(subset: Any, what: str) -> Source:
    inner = subset.dataset
    # Within a Subset a list is one of samples, even where the samples are tensors.
    is_sequence = isinstance(inner, (list, tuple))
    source = _Items(inner, _length(inner, what)) if is_sequence else open_source(inner, what)
    numbers = np.asarray(subset.indices, dtype=np.int64)
    return _Selection(source, np.where(numbers < 0, numbers + len(source), numbers))


def _open_columns(value: Any, what: str) -> Source:
    lengths: list[int] = []

    def column(leaf: Any) -> Any:
        import torch

        if not isinstance(leaf, (torch.Tensor, np.ndarray)):
            found = _a(type(leaf).__name__)
            raise JobError(f"{what} holds {found} where a tensor should be; give tensors, or a map-style Dataset.")
        if leaf.ndim == 0:
            raise DataError(f"{what} holds a tensor without dims; the first dim of each must count the samples.")
        lengths.append(len(leaf))
        return leaf

    columns = _map_leaves(value, column)
    if not lengths or max(lengths) == 0:
        raise DataError(f"{what} is empty; give at least one sample.")
    if len(set(lengths)) > 1:
        raise DataError(f"{what} holds tensors of different lengths ({', '.join(map(str, lengths))}); make them equal.")
    return _Columns(columns, lengths[0])


def _map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_leaves(part, function) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_leaves(part, function) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map_leaves(part, function) for part in value)
    return function(value)


def _is_map_style(value: Any) -> bool:
    return hasattr(value, "__getitem__") and not isinstance(value, type)


def _is_list_of_tensors(value: Any) -> bool:
    import torch

    arrays = (torch.Tensor, np.ndarray)
    return isinstance(value, list) and bool(value) and all(isinstance(part, arrays) for part in value)


def _has_batch(value: Any) -> bool:
    """Whether there is ``batch(indices)``: other libraries' ``batch(batch_size)`` means something else."""
    method = getattr(value, "batch", None)
    if not callable(method):
        return False
    try:
        return next(iter(inspect.signature(method).parameters), None) == "indices"
    except (TypeError, ValueError):
        return False


def _length(value: Any, what: str) -> int:
    try:
        length = len(value)
    except (TypeError, NotImplementedError):
        raise JobError(f"{what} has no length; give a Dataset with __len__ as well as __getitem__.") from None
    if length == 0:
        raise DataError(f"{what} is empty; give at least one sample.")
    return length


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"
