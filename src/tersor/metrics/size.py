"""Bytes on disk of everything the runtime needs."""

from tersor.core.errors import ArtifactError
from tersor.core.metric import Measurement, Subject, metric


@metric(unit="B", better="lower", needs=("files",))
def size(subject: Subject) -> Measurement:
    """Add up the files; reports do not count.

    Raises:
        ArtifactError: a file is missing.
    """
    assert subject.files is not None
    files = sorted({file.resolve() for file in subject.files})
    for file in files:
        if not file.is_file():
            raise ArtifactError(f"{file.name} is missing from {file.parent}; export it again")
    return Measurement(
        metric="size",
        value=float(sum(file.stat().st_size for file in files)),
        unit="B",
        better="lower",
        conditions={"files": len(files)},
        how=f"bytes on disk of {', '.join(file.name for file in files)}",
    )
