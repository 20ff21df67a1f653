"""The CUDA device that a target of PyTorch asks for; PyTorch is imported where one does."""

from tersor.core.errors import DependencyError
from tersor.core.runtime import Target


def present(target: Target) -> None:
    """Check that it is there.

    Raises:
        DependencyError: this PyTorch finds none.
    """
    if target.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise DependencyError("this PyTorch finds no CUDA device; use :cpu")
