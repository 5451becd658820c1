"""What a tolerance lets through."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.errors import RequestError
from shoal.serve.tolerance import Distance, Tolerance


def test_parse() -> None:
    assert Tolerance.parse("cosine=0.99, max_error=0.01") == Tolerance(0.99, 0.01)
    assert Tolerance.parse("none").exact
    assert Tolerance.of(None).exact
    assert Tolerance.of({"cosine": 0.5}) == Tolerance(cosine=0.5)
    assert str(Tolerance(0.99, 0.01)) == "cosine ≥ 0.99 and error ≤ 0.01"


@pytest.mark.parametrize(
    "text", ["", "0.99", "cosine", "cosine=x", "cosine=2", "max_error=0", "max_error=inf", "mean=1", "cosine=nan"]
)
def test_what_makes_no_sense(text: str) -> None:
    with pytest.raises(RequestError):
        Tolerance.parse(text)


def test_the_worst_row_and_the_worst_number_count() -> None:
    exact = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]], np.float32)
    found = np.array([[1.0, 0.0], [4.0, 3.0], [0.0, 0.1]], np.float32)
    distance = Distance.between([exact, exact], [exact, found])
    assert distance.cosine == pytest.approx(24 / 25)
    assert distance.max_error == pytest.approx(1.0)
    assert Tolerance(cosine=0.97).refuses(distance)
    assert Tolerance(max_error=0.9).refuses(distance)
    assert not Tolerance(cosine=0.95, max_error=1.1).refuses(distance)


def test_what_cannot_be_compared_is_refused() -> None:
    loose = Tolerance(cosine=0.01)
    whole = np.array([1, 2])
    infinite, finite = np.array([[np.inf, 1.0]]), np.array([[1.0, 1.0]])
    assert loose.refuses(Distance.between([whole], [whole + 1]))
    assert loose.refuses(Distance.between([infinite], [finite]))
    assert loose.refuses(Distance.between([finite], [finite * np.nan]))
    assert not loose.refuses(Distance.between([whole, infinite], [whole, infinite]))
