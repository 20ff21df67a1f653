"""Batch and threads of a subject, as they go into its measurements."""

from tersor.core.hardware import usable_cores
from tersor.core.metric import Subject


def threads(subject: Subject) -> int:
    """Return the threads a run uses: those asked for, or all usable cores."""
    return int(subject.conditions.get("threads", 0)) or subject.target.threads or usable_cores()


def batch(subject: Subject) -> int:
    """Return the samples in a batch: as noted, else the length of the first input."""
    assert subject.inputs is not None
    noted = int(subject.conditions.get("batch", 0))
    return noted or next((len(a) for a in subject.inputs[0].values() if a.ndim), 1)


def plural(count: int, word: str) -> str:
    """Write "1 thread", "2 threads"."""
    return f"{count} {word}" + ("" if count == 1 else "s")
