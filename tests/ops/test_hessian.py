"""The Hessian of a layer's squared error."""

import numpy as np
import pytest
import torch

from tersor.core.errors import StepError
from tersor.ops.hessian import (
    accumulate_hessian,
    accumulate_squares,
    damped,
    dead_inputs,
    inverse_factor,
    squared_error,
)


def made(groups: int = 2, rows: int = 40, columns: int = 5) -> torch.Tensor:
    mix = torch.randn(groups, columns, columns)
    return torch.randn(groups, rows, columns) @ mix


def test_it_is_twice_the_sum_of_outer_products() -> None:
    x = made()
    wanted = np.zeros((2, 5, 5))
    for g in range(2):
        for row in x[g].double().numpy():
            for i in range(5):
                for j in range(5):
                    wanted[g, i, j] += 2 * row[i] * row[j]
    found = accumulate_hessian(torch.zeros(2, 5, 5), x)
    # float32 sums of 40 terms
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-4)
    squares = accumulate_squares(torch.zeros(2, 5), x)
    assert np.allclose(squares, wanted.diagonal(axis1=1, axis2=2) / 2, rtol=1e-5)


def test_parts_sum_up_and_the_running_sum_is_not_modified() -> None:
    x = made()
    start = torch.zeros(2, 5, 5)
    parts = start
    for part in x.split(7, dim=1):
        parts = accumulate_hessian(parts, part)
    assert torch.allclose(parts, accumulate_hessian(start, x), rtol=1e-5, atol=1e-4)
    assert not start.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    x = made()
    x[1, 3, 2] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        accumulate_hessian(torch.zeros(2, 5, 5), x)
    with pytest.raises(ValueError, match="NaN or infinity"):
        accumulate_squares(torch.zeros(2, 5), x)


def test_damping_adds_a_share_of_the_mean_and_makes_dead_inputs_invertible() -> None:
    x = made()
    x[0, :, 3] = 0
    hessian = accumulate_hessian(torch.zeros(2, 5, 5), x)
    assert dead_inputs(hessian).nonzero().tolist() == [[0, 3]]
    before = hessian.clone()
    found = damped(hessian, 0.1)
    assert torch.equal(hessian, before)
    for g in range(2):
        wanted = hessian[g].double()
        if g == 0:
            wanted[3, 3] = 1
        wanted = wanted + 0.1 * wanted.diagonal().mean() * torch.eye(5)
        assert torch.allclose(found[g], wanted)


def test_the_factor_belongs_to_the_inverse() -> None:
    hessian = damped(accumulate_hessian(torch.zeros(2, 5, 5), made()), 0.01)
    upper = inverse_factor(hessian)
    assert torch.equal(upper, upper.triu())
    for g in range(2):
        wanted = np.linalg.inv(hessian[g].numpy())
        assert np.allclose(upper[g].T @ upper[g], wanted, rtol=1e-8)


def test_a_hessian_that_cannot_be_inverted_says_what_to_do() -> None:
    with pytest.raises(StepError, match="cannot be inverted; use a larger damp or more calibrat"):
        inverse_factor(-torch.eye(3, dtype=torch.float64).unsqueeze(0))


def test_squared_error_is_that_of_the_outputs() -> None:
    x = made(groups=1)
    difference = torch.randn(1, 3, 5)
    found = squared_error(accumulate_hessian(torch.zeros(1, 5, 5), x), difference)
    wanted = (x[0].double() @ difference[0].double().T).square().sum()
    assert found == pytest.approx(float(wanted), rel=1e-5)
