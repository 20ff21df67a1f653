"""Scales and codes against plain loops, and at their edges."""

import math

import numpy as np
import pytest
import torch

from tersor.ops.quantize import (
    activation_grid,
    channel_scales,
    exact_scale,
    group_codes,
    symmetric_codes,
)


def test_activation_grid_covers_range_and_holds_zero() -> None:
    scale, zero, low, high = activation_grid(-1.0, 3.0)
    assert (low, high) == (0, 255)
    assert scale == pytest.approx(4 / 255, rel=1e-3)
    assert zero == round(1 / (4 / 255))


def test_positive_range_is_widened_to_zero() -> None:
    scale, zero, _, _ = activation_grid(2.0, 5.0)
    assert zero == 0
    assert scale == pytest.approx(5 / 255, rel=1e-3)


def test_negative_range_ends_at_the_highest_code() -> None:
    assert activation_grid(-5.0, -1.0)[1] == 255


def test_symmetric_grid_is_signed_without_zero() -> None:
    scale, zero, low, high = activation_grid(-1.0, 2.0, symmetric=True)
    assert (zero, low, high) == (0, -128, 127)
    assert scale == pytest.approx(2 / 127, rel=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (0.0, 1e-40), (-1e-45, 1e-45), (0.0, 3e38), (-3e38, 3e38)]
)
def test_scale_is_never_zero_or_infinite(low: float, high: float, symmetric: bool) -> None:
    scale, zero, least, most = activation_grid(low, high, symmetric=symmetric)
    assert 0 < scale < math.inf
    assert math.isfinite(1 / scale)
    assert least <= zero <= most


@pytest.mark.parametrize("top", [6.0, 1.0, 0.7, 5.9999])
def test_inside_never_passes_the_end(top: float) -> None:
    scale, zero, _, high = activation_grid(0.0, top, inside=True)
    scale32 = torch.tensor(scale, dtype=torch.float32)
    assert float(scale32 * (high - zero)) <= top
    assert scale == pytest.approx(top / 255, rel=1e-3)


def test_scales_are_exact_in_float32() -> None:
    generator = np.random.default_rng(0)
    for scale, zero in zip(10 ** generator.uniform(-6, 3, 500), range(500), strict=True):
        zero %= 256
        made = exact_scale(float(scale), zero)
        assert made == pytest.approx(scale, rel=1e-3)
        low, high = np.float32(-zero * made), np.float32((255 - zero) * made)
        assert (float(low), float(high)) == (-zero * made, (255 - zero) * made)
        # the zero as OpenVINO computes it from the ends
        assert -low * (np.float32(255) / (high - low)) == zero
        assert exact_scale(float(scale), zero, most=float(scale)) < scale


def test_range_must_be_finite() -> None:
    with pytest.raises(ValueError, match=r"range 0.0..inf is not finite"):
        activation_grid(0.0, math.inf)


def test_channel_scales_and_codes_against_loops() -> None:
    weight = torch.randn(5, 7)
    scale = channel_scales(weight)
    codes = symmetric_codes(weight, scale)
    for o in range(5):
        step = max(abs(float(w)) for w in weight[o]) / 127
        assert float(scale[o]) == pytest.approx(step, rel=1e-6)
        for i in range(7):
            assert abs(int(codes[o, i]) * step - float(weight[o, i])) <= step * 0.5001
            assert -127 <= int(codes[o, i]) <= 127


def test_dead_channel_gets_a_scale_its_bias_fits() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-12, 0.0], [1.0, -1.0], [0.0, 0.0]])
    bias = torch.tensor([0.5, 0.5, 0.5, 0.0])
    scale = channel_scales(weight, bias_O=bias, input_scale=0.02)
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(scale).all())
    codes = bias / (scale * 0.02)
    assert bool((codes.abs() < 2**31).all())
    assert float(codes[0]) > 1e6  # fine steps, too
    assert float(scale[2]) == pytest.approx(1 / 127)
    assert float(scale[3]) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_must_be_finite(bad: float) -> None:
    weight = torch.ones(2, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="its weights hold NaN or infinity"):
        channel_scales(weight)
    with pytest.raises(ValueError, match="its weights hold NaN or infinity"):
        group_codes(weight, bits=4, group_size=2, symmetric=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_group_codes_against_loops(bits: int, symmetric: bool) -> None:
    weight = torch.randn(3, 8).double().float()
    codes, scale, zero = group_codes(weight, bits=bits, group_size=4, symmetric=symmetric)
    lowest = -(2 ** (bits - 1)) if symmetric else 0
    assert int(codes.min()) >= lowest
    assert int(codes.max()) <= lowest + 2**bits - 1
    for o in range(3):
        for g in range(2):
            group = [float(w) for w in weight[o, 4 * g : 4 * g + 4]]
            z = 0 if zero is None else int(zero[o, g])
            mine = sum(
                (float(scale[o, g]) * (int(codes[o, 4 * g + i]) - z) - group[i]) ** 2
                for i in range(4)
            )
            if symmetric:
                step = max(abs(w) for w in group) / (2 ** (bits - 1) - 1)
                plain = sum((round(w / step) * step - w) ** 2 for w in group)
                assert (
                    mine <= plain * (1 + 1e-4) + 1e-12
                )  # never worse than the highest code for the largest
            else:
                step = (max(*group, 0) - min(*group, 0)) / (2**bits - 1)
                assert float(scale[o, g]) == pytest.approx(step, rel=1e-5)
                assert mine <= 4 * (1.0001 * step) ** 2


def test_zero_group_stays_zero() -> None:
    for symmetric in (True, False):
        codes, scale, zero = group_codes(
            torch.zeros(2, 4), bits=4, group_size=4, symmetric=symmetric
        )
        assert bool((scale == 1).all())
        assert not codes.any()
        assert zero is None or not zero.any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipped_channels_err_less(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 64)
    weight[:, 0] = 12.0  # an outlier each

    def error(clip: bool) -> torch.Tensor:
        scale = channel_scales(weight, bits=bits, clip=clip)
        codes = symmetric_codes(weight, scale, bits=bits)
        return (codes * scale[:, None] - weight).square().sum(1)

    assert bool((error(clip=True) <= error(clip=False)).all())
    assert bits != 4 or float(error(clip=True).sum()) < 0.95 * float(error(clip=False).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_groups_err_less(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    weight[0] = 0

    def error(clip: bool) -> torch.Tensor:
        codes, scale, zero = group_codes(
            weight, bits=4, group_size=32, symmetric=symmetric, clip=clip
        )
        zeros = 0 if zero is None else zero.float().repeat_interleave(32, 1)
        rounded = (codes.float() - zeros) * scale.repeat_interleave(32, 1)
        return (rounded - weight).view(6, 2, 32).square().sum(2)

    assert bool((error(clip=True) <= error(clip=False) + 1e-6).all())
    assert float(error(clip=True).sum()) < 0.97 * float(error(clip=False).sum())
