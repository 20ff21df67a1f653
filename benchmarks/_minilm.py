"""MiniLM as benchmarks load it, in the environment that has transformers where this one has not."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _networks import ROOT

SENTENCES = ROOT / "examples" / "minilm.py"


def loaded() -> tuple[Any, Any, Any]:
    """Load MiniLM as its module, its data (sentences) and what it takes."""
    from tersor import pipeline
    from tersor.plan import make_inputs

    sys.path.insert(0, str(SENTENCES.parent))
    sentences = importlib.import_module(SENTENCES.stem)
    model = pipeline.load(f"huggingface:{sentences.folder()}")
    data = pipeline.load_data(f"{SENTENCES}:data")
    return model, data, make_inputs(model, data)


def elsewhere(script: str, name: str) -> bool:
    """Run the script for this network where transformers is; False: it is here."""
    if importlib.util.find_spec("transformers") is not None:
        return False
    from quantization_peers import make_environment

    make_environment("minilm")
    python = ROOT / ".environments" / "minilm" / "bin" / "python"
    words = [str(python), str(Path(script).resolve()), *sys.argv[1:], "--networks", name]
    around = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(words, check=True, env=around)
    return True
