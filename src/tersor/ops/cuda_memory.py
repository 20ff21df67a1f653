"""Memory of an NVIDIA GPU and a stream to copy on, without torch.

Not verified on hardware beyond the errors of a machine without a GPU.
"""

import weakref
from typing import Any

import numpy as np

from tersor.core.errors import TargetError


def check_gpu() -> None:
    """Refuse a machine without a GPU that works.

    Raises:
        TargetError: there is none, or its driver does not fit.
    """
    from cuda.bindings import runtime as cuda

    error, count = cuda.cudaGetDeviceCount()
    if int(error) or not count:
        reason = _reason(error) if int(error) else "none is there"
        raise TargetError(
            f"no NVIDIA GPU can be used: {reason}; run where there is one, or choose another target"
        )


class Stream:
    """A queue of work on the GPU."""

    handle: int

    def __init__(self) -> None:
        """Make one.

        Raises:
            TargetError: CUDA cannot.
        """
        from cuda.bindings import runtime as cuda

        made = _checked(cuda.cudaStreamCreate())
        self.handle = int(made)
        self._end = weakref.finalize(self, cuda.cudaStreamDestroy, made)

    def wait(self) -> None:
        """Wait until everything in it is done.

        Raises:
            TargetError: something failed.
        """
        from cuda.bindings import runtime as cuda

        _checked(cuda.cudaStreamSynchronize(self.handle))

    def close(self) -> None:
        """Free it."""
        self._end()


class Buffer:
    """Bytes on the GPU that hold one array; freed with the object."""

    address: int
    host: np.ndarray

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Allocate.

        Raises:
            TargetError: there is not enough memory.
        """
        from cuda.bindings import runtime as cuda

        self.host = np.empty(shape, dtype)
        self.address = int(_checked(cuda.cudaMalloc(max(self.host.nbytes, 1))))
        self._end = weakref.finalize(self, cuda.cudaFree, self.address)

    def write(self, array: np.ndarray, stream: Stream) -> None:
        """Copy an array of its shape in."""
        from cuda.bindings import runtime as cuda

        self.host[...] = array
        kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        _checked(
            cuda.cudaMemcpyAsync(
                self.address, self.host.ctypes.data, self.host.nbytes, kind, stream.handle
            )
        )

    def read(self, stream: Stream) -> np.ndarray:
        """Queue a copy out; the array is filled once the stream has been waited for."""
        from cuda.bindings import runtime as cuda

        made = np.empty_like(self.host)
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _checked(
            cuda.cudaMemcpyAsync(made.ctypes.data, self.address, made.nbytes, kind, stream.handle)
        )
        return made


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return what a call of CUDA made.

    Raises:
        TargetError: it failed.
    """
    error, *made = answer
    if int(error):
        raise TargetError(f"CUDA failed: {_reason(error)}")
    return made[0] if made else None


def _reason(error: Any) -> str:
    from cuda.bindings import runtime as cuda

    _, text = cuda.cudaGetErrorString(error)
    return text.decode() if text else str(error)
