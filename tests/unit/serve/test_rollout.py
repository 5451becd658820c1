"""When a new version is promoted, and when it is rolled back."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import RequestError
from shoal.serve.rollout import Trial

OLD = {"p95_ms": 10.0}


def seen(**changes: Any) -> dict[str, Any]:
    return {"answered": 100, "failed": 0, "p95_ms": 12.0, "worst_difference": 0.5, **changes}


@pytest.mark.parametrize(
    ("trial", "numbers", "verdict"),
    [
        (Trial(canary=0.1, requests=100), seen(), ""),
        (Trial(canary=0.1, requests=101), seen(), None),
        (Trial(canary=0.1, requests=101), seen(failed=1), "1 of its requests failed"),
        (Trial(canary=0.1, requests=100), seen(p95_ms=17.5), "95th percentile is 17.5 ms, the old one's 10.0 ms"),
        (Trial(canary=0.1, requests=100, slower=2.0), seen(p95_ms=17.5), ""),
        (Trial(shadow=True, requests=100, tolerance=0.4), seen(answered=1), "0.5 away from the old one, more than 0.4"),
        (Trial(shadow=True, requests=100, tolerance=0.5), seen(p95_ms_active=9.0), ""),
        (Trial(shadow=True, requests=100), seen(p95_ms_active=1.0), "the old one's 1.0 ms"),
    ],
)
def test_verdict(trial: Trial, numbers: dict[str, Any], verdict: str | None) -> None:
    found = trial.verdict(numbers, OLD)
    assert found == verdict if not verdict else found is not None and verdict in found


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"canary": 0}, "canary's share is 0"),
        ({"canary": 0.5, "shadow": True}, "one of them"),
        ({"tolerance": 0.1}, "give shadow as well"),
        ({"requests": 0}, "0 requests"),
        ({"requests": True}, "requests is a int"),
        ({"slower": 0}, "slower is 0"),
        ({"shadow": 1}, "shadow is a bool"),
        ({"canary": "a lot"}, "canary is a float"),
        ({"canary": 10**400}, "canary is beyond"),
        ({"slower": -(10**400)}, "slower is beyond"),
        ({"config": "{}"}, "not loaded with config"),
    ],
)
def test_parameters_that_make_no_sense(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Trial.from_parameters(parameters)


def test_parameters() -> None:
    assert Trial.from_parameters({"shadow": True, "tolerance": 0, "requests": 7}) == Trial(shadow=True, tolerance=0, requests=7)
