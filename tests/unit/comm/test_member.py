"""What torchrun and Slurm say of a process's place."""

from __future__ import annotations

import pytest

from shoal.comm.member import Member, first_node, shares_memory
from shoal.errors import RequestError

SLURM = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


def test_torchrun_is_joined() -> None:
    assert Member.of({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}) == Member(1, 4, 2, "env://")


@pytest.mark.parametrize("environ", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "2"}])
def test_a_process_alone_joins_nothing(environ: dict[str, str]) -> None:
    assert Member.of(environ) is None


@pytest.mark.parametrize("environ", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_a_place_that_makes_no_sense_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(RequestError):
        Member.of(environ)


def test_slurm_names_the_first_node_and_one_port_for_all() -> None:
    members = [Member.of({**SLURM, "SLURM_PROCID": str(rank)}) for rank in range(8)]
    assert [member.rank for member in members if member] == list(range(8))
    assert {(member.world_size, member.local_size) for member in members if member} == {(8, 4)}
    (address,) = {member.init_method for member in members if member}
    assert address.startswith("tcp://gpu03:") and 20000 <= int(address.rpartition(":")[2]) < 50000
    other = Member.of({**SLURM, "SLURM_STEP_ID": "1"})
    assert other is not None and other.init_method != address


def test_a_batch_script_outside_srun_is_alone() -> None:
    assert Member.of({key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[07-09,11]", "n07"), ("n[5,7],m1", "n5"), ("x-1.y", "x-1.y")]
)
def test_the_first_of_a_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_the_transport_can_be_chosen_and_nothing_else() -> None:
    assert not shares_memory({"SHOAL_TRANSPORT": "group"})
    with pytest.raises(RequestError, match="arena or group"):
        shares_memory({"SHOAL_TRANSPORT": "pigeon"})
