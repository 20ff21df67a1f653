"""The Hessian of a layer's squared error: how its weights act together on its outputs.

A layer computes y = W x. Another W' is off by |W X - W' X|^2 over the inputs X of the calibration
data, a quadratic function of W' with the same Hessian H = 2 X X^T for every row. Only H is kept,
so memory does not grow with the data.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersor.core.errors import StepError

# G groups of a convolution, 1 for a linear layer; R rows: its outputs; C columns: its inputs
# N inputs of the layer, one for each token or place of an image (ops/matrices.py, input_rows)


def accumulate_hessian(
    hessian_GCC: Float[Tensor, "G C C"], batch_GNC: Float[Tensor, "G N C"]
) -> Float[Tensor, "G C C"]:
    """Add a batch to the Hessian of the layer's squared error.

    Args:
        hessian_GCC: Running sum, float32, symmetric. Not modified.
        batch_GNC: Inputs of the layer, one row per token; any float type.

    Returns:
        hessian + 2 * batch.T @ batch, in float32.

    Raises:
        ValueError: the batch holds NaN or infinity.

    Source:
        Frantar et al., GPTQ, arXiv:2210.17323: H = 2 X X^T. The sum is not divided by the number
        of inputs: no method that reads it depends on its scale.
    """
    batch_GNC = batch_GNC.float()
    added = torch.baddbmm(hessian_GCC, batch_GNC.mT, batch_GNC, alpha=2)
    # an input that is not finite makes its place of the diagonal so, and nothing makes it finite
    if not torch.isfinite(added.diagonal(dim1=-2, dim2=-1)).all():
        raise ValueError("NaN or infinity")
    return added


def accumulate_squares(
    squares_GC: Float[Tensor, "G C"], batch_GNC: Float[Tensor, "G N C"]
) -> Float[Tensor, "G C"]:
    """Add a batch to the squared norms of the inputs: half the diagonal of the Hessian.

    Args:
        squares_GC: Running sum, float32. Not modified.
        batch_GNC: Inputs of the layer; any float type.

    Raises:
        ValueError: the batch holds NaN or infinity.
    """
    added = squares_GC + batch_GNC.float().square().sum(1)
    if not torch.isfinite(added).all():
        raise ValueError("NaN or infinity")
    return added


def dead_inputs(hessian_GCC: Float[Tensor, "G C C"]) -> Bool[Tensor, "G C"]:
    """Tell which inputs were always zero: their weights count for nothing."""
    return hessian_GCC.diagonal(dim1=-2, dim2=-1) == 0


def damped(hessian_GCC: Float[Tensor, "G C C"], damp: float) -> Float[Tensor, "G C C"]:
    """Add a share of the mean of its diagonal to the diagonal; dead inputs get 1 there first.

    Args:
        hessian_GCC: As accumulated. Not modified.
        damp: Share; makes a Hessian of fewer inputs than columns invertible.

    Returns:
        In float64: sums of many inputs are ill conditioned.
    """
    wide = hessian_GCC.double()
    diagonal_GC = wide.diagonal(dim1=-2, dim2=-1) + dead_inputs(wide)
    extra_G1 = damp * diagonal_GC.mean(-1, keepdim=True)
    made = wide.clone()
    made.diagonal(dim1=-2, dim2=-1).copy_(diagonal_GC + extra_G1)
    return made


def inverse_factor(hessian_GCC: Float[Tensor, "G C C"]) -> Float[Tensor, "G C C"]:
    """Return the upper triangular U with U^T U = H^-1.

    Row i of U, divided by U[i, i], tells how the columns after i make up for a change of column i
    when all columns before it are fixed.

    Args:
        hessian_GCC: Damped, float64.

    Raises:
        StepError: it cannot be inverted.

    Source:
        Frantar et al., GPTQ, arXiv:2210.17323, section 3.3, step 3.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian_GCC)
    upper: Tensor
    upper, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if failed.any() or failed_again.any():
        raise StepError(
            "the Hessian of its inputs cannot be inverted; use a larger damp or more calibration "
            "data"
        )
    return upper


def squared_error(
    hessian_GCC: Float[Tensor, "G C C"], difference_GRC: Float[Tensor, "G R C"]
) -> float:
    """Return the layer's squared error on the inputs that the Hessian was made from.

    Args:
        hessian_GCC: As accumulated.
        difference_GRC: Weights minus the weights before.
    """
    wide = difference_GRC.double()
    return float(((wide @ hessian_GCC.double()) * wide).sum()) / 2
