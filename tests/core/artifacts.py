"""Small artifacts for tests: their model is a file of known content, for no real runtime."""

from pathlib import Path
from typing import Any

from tersor.core.artifact import Artifact, write_artifact
from tersor.core.metric import Measurement
from tersor.core.report import Report, StageReport
from tersor.core.runtime import Target

RECIPE = {"steps": ["fuse_batch_norm"], "target": "onnxruntime:cpu"}


def report(value: float = 1.5) -> Report:
    size = Measurement(
        metric="size",
        value=value,
        unit="B",
        better="lower",
        spread=(1.0, 2.0),
        conditions={"batch": 1},
        count=3,
    )
    stage = StageReport(
        name="fuse_batch_norm", verdict="kept", reason="smaller", measurements=(size,)
    )
    return Report(
        origin="module:x.py:f",
        target="onnxruntime:cpu",
        before=(size,),
        after=(size,),
        stages=(stage,),
    )


def sources(folder: Path, word: str = "one", size: int = 3000) -> list[Path]:
    """Two model files whose content tells which version they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "model.onnx", folder / "model.data"]
    for file in files:
        file.write_bytes((word.encode() * size)[:size])
    return files


def write(out: Path, word: str = "one", **changes: Any) -> Artifact:
    """Write an artifact of version `word`."""
    files = sources(out.parent / f"sources-{word}", word)
    given: dict[str, Any] = {
        "files": files,
        "manifest": {
            "recipe": RECIPE,
            "target": Target(runtime="onnxruntime"),
            "origin": word,
            "seed": 0,
        },
        "report": report(),
        "texts": {"report.md": f"# {word}\n"},
    }
    return write_artifact(out, **{**given, **changes})


def version(out: Path) -> str:
    """Return which version is there, after checking that it is whole."""
    opened = Artifact.open(out, check="hashes")
    word = str(opened.manifest["origin"])
    for file in opened.model_files:
        assert file.read_bytes() == (word.encode() * 3000)[:3000]
    assert (out / "report.md").read_text() == f"# {word}\n"
    return word
