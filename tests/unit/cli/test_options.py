from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.cli.main import build
from shoal.cli.options import SETTABLE, find_cluster, find_target, parse_plan, settings
from shoal.errors import RequestError

GOLDEN = Path(__file__).parents[2] / "golden" / "cli_options.txt"


def options() -> list[str]:
    """Every option and argument of every command, one a line."""
    parser = build()
    found = [f"shoal {_line(parameter)}" for parameter in parser.params]
    for name, command in parser.commands.items():
        found += [f"shoal {name} {_line(parameter)}" for parameter in command.params]
    return found


def _line(parameter: Any) -> str:
    names = " ".join([*parameter.opts, *parameter.secondary_opts])
    if not names.startswith("-"):
        return str(parameter.metavar)
    value = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar}"
    return names + value + (" …" if parameter.multiple else "")


def test_options_are_those_that_were_promised() -> None:
    expected = GOLDEN.read_text().splitlines()
    assert options() == expected, f"scripts rely on these; if it is meant, change {GOLDEN.name} by hand"


def test_settings_are_read_by_the_type_of_their_field() -> None:
    pairs = ["batch_size=256", "grad_clip=1e-1", "name=my-net", "patience=none", "scheduler_every = epoch"]
    assert settings(pairs, seed=3) == {
        "batch_size": 256, "grad_clip": 0.1, "name": "my-net", "patience": None, "scheduler_every": "epoch", "seed": 3,
    }  # fmt: skip
    assert settings(["name=a=b"]) == {"name": "a=b"}
    assert settings(["seed=4"], seed=4) == {"seed": 4}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["batch_size"], "has no value"),
        (["=3"], "has no value"),
        (["batch_size=2.5"], "give a whole number"),
        (["batch_size=none"], "give a whole number"),
        (["grad_clip=much"], "give a number, or none"),
        (["batchsize=3"], 'Did you mean "batch_size"'),
        (["model=x"], "It can change " + ", ".join(SETTABLE)),
        (["seed=4"], "contradict"),
    ],
)
def test_settings_that_make_no_sense(pairs: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        settings(pairs, seed=3)


def test_a_target_is_changed_as_the_options_say(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import shoal.job\njob = shoal.job.Job(model=print, train_data=print, seed=1)\n")
    name = f"{tmp_path / 'mine.py'}:job"
    assert find_target(name, None, None).job.seed == 1
    changed = find_target(name, ["batch_size=7"], 5).job
    assert (changed.batch_size, changed.seed, changed.model) == (7, 5, print)
    with pytest.raises(RequestError, match="batch_size is 0"):
        find_target(name, ["batch_size=0"], None)


def test_the_memory_limit_belongs_to_the_cluster_also_to_a_described_one(tmp_path: Path) -> None:
    assert find_cluster(None, None) is None
    local = find_cluster(None, "2GB")
    assert local is not None and local.memory_limit_bytes == 2_000_000_000


def test_a_plan_that_was_not_given_is_none_and_auto_is_a_plan() -> None:
    assert parse_plan(None) is None
    assert str(parse_plan("dp=2")) == "dp=2"
    auto = parse_plan("auto")
    assert auto is not None and str(auto) == "auto"
