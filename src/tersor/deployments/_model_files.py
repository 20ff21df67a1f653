"""The files of an artifact that its runtime reads."""

import shutil
from pathlib import Path

from tersor.core import packing
from tersor.core.artifact import Artifact


def copy_model(artifact: Artifact, folder: Path) -> Path:
    """Copy them into a folder, unpacked; return the one that is loaded."""
    kept = artifact.model_files
    with packing.unpacked(kept[0]) as first:
        packed = first != kept[0]
        for file in sorted(first.parent.iterdir()) if packed else kept:
            shutil.copyfile(file, folder / file.name)
        return folder / first.name
