"""Which weights stay."""

from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.errors import UnfitError
from tersor.ops.patterns import (
    check_amount,
    fitting,
    keep_n_of_m,
    keep_share,
    parse_pattern,
    weaker_amount,
)


def test_patterns_are_read() -> None:
    assert parse_pattern("2:4") == (2, 4)
    assert parse_pattern("1:16") == (1, 16)


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "2", "2:", "a:b", "-1:4", "2:4:8", "124"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f'pattern must be "N:M" with 0 < N < M.*got {text!r}'):
        parse_pattern(text)


def test_n_of_every_m_stay_the_largest() -> None:
    score = torch.rand(2, 5, 12)
    for n, m in ((2, 4), (1, 4), (3, 4), (1, 2), (2, 6)):
        keep = keep_n_of_m(score, (n, m))
        for g in range(2):
            for r in range(5):
                for start in range(0, 12, m):
                    row = score[g, r, start : start + m].tolist()
                    wanted = sorted(range(m), key=lambda i: -row[i])[:n]
                    found = keep[g, r, start : start + m].nonzero().flatten().tolist()
                    assert found == sorted(wanted)


def test_each_row_loses_the_same_share() -> None:
    score = torch.rand(2, 5, 10)
    for sparsity, gone in ((0.0, 0), (0.3, 3), (0.55, 5), (0.99, 9)):
        keep = keep_share(score, sparsity)
        assert ((~keep).sum(-1) == gone).all()
        for g in range(2):
            for r in range(5):
                row = score[g, r]
                assert gone == 0 or row[~keep[g, r]].max() <= row[keep[g, r]].min()


def test_ties_go_first_come_first_gone() -> None:
    assert keep_share(torch.zeros(1, 1, 4), 0.5).tolist() == [[[False, False, True, True]]]
    assert keep_n_of_m(torch.zeros(1, 4), (1, 4)).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize(
    ("sparsity", "pattern", "text"),
    [
        (0.5, "2:4", "give sparsity or pattern, not both"),
        (1.0, None, r"sparsity must be in \[0, 1\), got 1.0"),
        (-0.1, None, r"sparsity must be in \[0, 1\), got -0.1"),
        (None, "4:4", 'pattern must be "N:M"'),
    ],
)
def test_amounts_are_checked(sparsity: Any, pattern: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_amount(sparsity, pattern)


def test_weaker_amounts() -> None:
    assert weaker_amount(0.5, None) == {"sparsity": 0.35}
    assert weaker_amount(0.05, None) is None
    assert weaker_amount(0.5, "2:4") == {"pattern": "3:4"}
    assert weaker_amount(0.5, "3:4") is None


def test_layers_that_a_pattern_does_not_fit_are_named_with_what_fits() -> None:
    layers: dict[str, nn.Module] = {
        "stem": nn.Conv2d(3, 8, 3),
        "fc": nn.Linear(10, 4),
        "fine": nn.Linear(8, 4),
    }
    with pytest.raises(
        UnfitError,
        match=r"wanda: 2:4 needs input channels in multiples of 4, but 'stem' has 3, 'fc' has 10; "
        r"leave out what does not fit: layers: \[\"!stem\", \"!fc\"\]",
    ):
        fitting(layers, (2, 4), "wanda")
    same = {f"layer{i}": nn.Linear(24, 4) for i in range(7)}
    with pytest.raises(UnfitError, match=r"'layer3' has 24 and 3 others; use 3:4$"):
        fitting(same, (3, 5), "wanda")
    with pytest.raises(UnfitError, match=r"'fc' has 10; no pattern of this N fits all of them$"):
        fitting({"fc": layers["fc"]}, (10, 11), "wanda")
    kept, left = fitting({"fine": layers["fine"]}, (2, 4), "wanda")
    assert (list(kept), left) == (["fine"], {})


def test_one_input_channel_has_no_neighbors() -> None:
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    kept, left = fitting({"a": depthwise, "b": nn.Linear(8, 4)}, (2, 4), "wanda")
    assert list(kept) == ["b"]
    assert left == {"a": "it has one input channel, so no neighbors to choose from"}
    with pytest.raises(UnfitError, match="wanda: every chosen layer has one input channel"):
        fitting({"a": depthwise}, (2, 4), "wanda")
