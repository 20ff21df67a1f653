"""Limits: how they are written, and what they allow."""

import pytest

from tersor.core.goal import Goal, Limit, inside


@pytest.mark.parametrize(
    ("text", "original", "unit", "better", "bound"),
    [
        ("-1pt", 90.0, "%", "higher", 89.0),
        ("-1%", 90.0, "%", "higher", 89.1),
        ("+2%", 5.0, "1", "lower", 5.1),
        ("-2%", 5.0, "1", "lower", 5.1),  # of its value worse
        ("+ 10 %", 2.0, "ms", "lower", 2.2),
        ("25%", 8.0, "B", "lower", 2.0),
        ("90%", 8.0, "1/s", "higher", 7.2),
        ("3 mJ", 1.0, "J", "lower", 0.003),
        ("500 ms", 1.0, "s", "lower", 0.5),
    ],
)
def test_a_limit_is_a_bound(
    text: str, original: float, unit: str, better: str, bound: float
) -> None:
    assert Limit.parse(text).bound(original, unit, better) == pytest.approx(bound)  # type: ignore[arg-type]


def test_above_the_original_is_for_metrics_where_lower_is_better() -> None:
    limit = Limit.parse("+2%")
    bound = limit.bound(4.911, "1", "lower")
    assert inside(5.0, bound, "lower")
    assert not inside(5.02, bound, "lower")
    with pytest.raises(ValueError, match=r"\+2% is for metrics where lower is better; write -2%"):
        limit.bound(90.0, "%", "higher")


def test_what_is_no_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"limit on perplexity: 'little' is not a limit; write"):
        Goal(limits={"perplexity": "little"})
    with pytest.raises(ValueError, match=r"'\+1pt': points are a loss allowed; write -1pt"):
        Limit.parse("+1pt")
