"""``shoal eval``: evaluate a finished or stopped run."""

from __future__ import annotations

from shoal.cli.answer import Answer, table
from shoal.cli.options import DataOption, JsonFlag, RunArgument, load_data
from shoal.observe.lines import number


def evaluate(run: RunArgument, data: DataOption = None, json: JsonFlag = False) -> Answer:
    """Evaluate a run, on its own evaluation data or on other data."""
    other = None if data is None else load_data(data)
    from shoal.train.run import open_run

    metrics = open_run(run).evaluate(other)
    return Answer(metrics, table([(name, number(value)) for name, value in metrics.items()]))
