"""Collectives between ranks that all live in this process: with and without a compiler the same words and bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from shoal.comm import native, rounds
from shoal.comm.meeting import DIRECT_BYTES, Collective, Meeting, MismatchError
from shoal.comm.port import Port
from shoal.comm.region import RegionLayout
from shoal.errors import RequestError

PIECE = 512


def meetings(n: int, plain: Sequence[int] = (), piece: int = PIECE) -> list[Meeting]:
    """One a rank, on one region; the ranks in ``plain`` do without the compiled rounds."""
    layout = RegionLayout(world_size=n, piece_bytes=piece, seats=2, letters=4, mail_pieces=1, mail_piece_bytes=256)
    region = torch.zeros(layout.bytes, dtype=torch.uint8)
    ports = [Port(region, rank, n, layout=layout) for rank in range(n)]
    for rank in plain:
        ports[rank].advance, ports[rank].lay = rounds.advance, rounds.lay
    return [Meeting(port, "all", range(n)) for port in ports]


def together(begun: Sequence[Collective]) -> None:
    """Let all ranks get on in turn until all are done."""
    for _ in range(10_000):
        if all([one.advance(0, 0, 0) for one in begun]):
            return
    raise AssertionError("they do not come to an end")


def values(n: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(count)
    return [(torch.rand(count, generator=random, dtype=torch.float64) * 8).to(dtype) for _ in range(n)]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]


@pytest.mark.parametrize("plain", [(), (0, 1, 2), (1,)], ids=["compiled", "plain", "mixed"])
@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_one_rank_alone(plain: Sequence[int], op: str, dtype: torch.dtype) -> None:
    if native.load().name != "c" and not plain:
        pytest.skip("no C compiler here")
    if op == "avg" and dtype == torch.bool:
        return
    ranks = meetings(3, plain)
    for count in (0, 1, PIECE // 8, PIECE // 4 + 1, 1000):
        given = values(3, count, dtype)
        tensors = [tensor.clone() for tensor in given]
        together([rank.all_reduce(tensor, op) for rank, tensor in zip(ranks, tensors, strict=True)])
        for tensor in tensors:
            assert torch.equal(tensor, rounds.summed(given, 3 if op == "avg" else 0))


def test_half_precision_is_rounded_once() -> None:
    # In bfloat16 256 + 1 is 256: only a sum in single precision gets to 260.
    ranks = meetings(5)
    tensors = [torch.tensor([256.0 if rank == 0 else 1.0], dtype=torch.bfloat16) for rank in range(5)]
    together([rank.all_reduce(tensor, "sum") for rank, tensor in zip(ranks, tensors, strict=True)])
    assert [tensor.item() for tensor in tensors] == [260.0] * 5


def test_bits_of_infinity_and_nan() -> None:
    special = [float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-45, -0.0]
    for plain in ((), (0, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            ranks = meetings(2, plain)
            given = [torch.tensor(special, dtype=dtype), torch.tensor([1.0, 1.0, 1.0, 3.4e38, 0.0, -0.0], dtype=dtype)]
            tensors = [tensor.clone() for tensor in given]
            together([rank.all_reduce(tensor, "sum") for rank, tensor in zip(ranks, tensors, strict=True)])
            expected = (given[0].float() + given[1].float()).to(dtype)
            torch.testing.assert_close(tensors[0], expected, rtol=0, atol=0, equal_nan=True)


def test_a_sum_is_the_same_on_both_sides_of_the_size_at_which_it_goes_another_way() -> None:
    for count in (DIRECT_BYTES // 4, DIRECT_BYTES // 4 + 1):
        ranks = meetings(4, piece=128 << 10)
        given = values(4, count, torch.float32)
        tensors = [tensor.clone() for tensor in given]
        begun = [rank.all_reduce(tensor, "sum") for rank, tensor in zip(ranks, tensors, strict=True)]
        together(begun[::-1])
        for tensor in tensors:
            assert torch.equal(tensor, ((given[0] + given[1]) + given[2]) + given[3])


def test_a_groups_calls_run_in_the_order_they_were_begun() -> None:
    ranks = meetings(2)
    first = [torch.full((700,), rank + 1.0) for rank in range(2)]
    second = [torch.full((3,), rank + 5.0) for rank in range(2)]
    begun = [(rank.all_reduce(first[k], "sum"), rank.all_reduce(second[k], "max")) for k, rank in enumerate(ranks)]
    # Whoever waits for the second has to get the first done.
    together([later for _, later in begun])
    assert all(earlier.done for earlier, _ in begun)
    assert bool((first[1] == 3).all()) and second[0].tolist() == [6.0] * 3


def test_other_calls_are_named() -> None:
    ranks = meetings(2)
    calls: list[Callable[[], Collective]] = [
        lambda: ranks[0].all_reduce(torch.ones(3, dtype=torch.float64), "max"),
        lambda: ranks[1].all_reduce(torch.ones(4, dtype=torch.float64), "max"),
    ]
    begun = calls[0]()
    with pytest.raises(MismatchError, match=r"rank 0 calls all_reduce \(max\) of 24 bytes of float64") as found:
        calls[1]()
    assert "Rank 1 calls all_reduce (max) of 32 bytes of float64 in group all" in str(found.value)
    with pytest.raises(MismatchError, match="Rank 0 calls"):
        begun.advance(0, 0, 0)


def test_who_is_missing_is_known_before_and_after_the_first_call() -> None:
    layout = RegionLayout(world_size=3, piece_bytes=PIECE)
    region = torch.zeros(layout.bytes, dtype=torch.uint8)
    ports = [Port(region, rank, 3, layout=layout) for rank in range(3)]
    first = Meeting(ports[0], "all", range(3))
    begun = first.barrier()
    second = Meeting(ports[1], "all", range(3))
    assert not begun.advance(0, 0, 0) and begun.missing() == [2]
    third = Meeting(ports[2], "all", range(3))
    also = third.barrier()
    assert not begun.advance(0, 0, 0) and begun.missing() == [1]
    together([begun, also, second.barrier()])


def test_seats_and_memory_that_do_not_suffice_are_said() -> None:
    ranks = meetings(2)
    port = ranks[0].port
    Meeting(port, "second", [0, 1])
    with pytest.raises(RequestError, match="Rank 0 is in 2 groups and cannot join third"):
        Meeting(port, "third", [0, 1])
    with pytest.raises(RequestError, match="exchange_bytes"):
        Port(torch.zeros(100, dtype=torch.uint8), 0, 2)
