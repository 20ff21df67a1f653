"""tersor makes a trained neural network smaller, faster and cheaper to run on a named target.

Nothing heavy is imported until it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.advisor import advise as advise
    from tersor.benchmark import compare as compare
    from tersor.benchmark import measure as measure
    from tersor.core.artifact import Artifact as Artifact
    from tersor.core.context import Data as Data
    from tersor.core.errors import TersorError as TersorError
    from tersor.core.goal import Goal as Goal
    from tersor.core.layers import Layers as Layers
    from tersor.core.metric import Measurement as Measurement
    from tersor.core.model import Inputs as Inputs
    from tersor.core.plugins import catalog as catalog
    from tersor.core.recipe import Recipe as Recipe
    from tersor.core.runtime import Target as Target
    from tersor.deployer import deploy as deploy
    from tersor.explainer import explain as explain
    from tersor.pipeline import compress as compress
    from tersor.pipeline import load as load
    from tersor.pipeline import load_data as load_data

__version__ = "0.1.0"
_PLACES = {
    "Artifact": "tersor.core.artifact",
    "Data": "tersor.core.context",
    "Goal": "tersor.core.goal",
    "Inputs": "tersor.core.model",
    "Layers": "tersor.core.layers",
    "Measurement": "tersor.core.metric",
    "Recipe": "tersor.core.recipe",
    "Target": "tersor.core.runtime",
    "TersorError": "tersor.core.errors",
    "advise": "tersor.advisor",
    "catalog": "tersor.core.plugins",
    "compare": "tersor.benchmark",
    "compress": "tersor.pipeline",
    "deploy": "tersor.deployer",
    "explain": "tersor.explainer",
    "load": "tersor.pipeline",
    "load_data": "tersor.pipeline",
    "measure": "tersor.benchmark",
}
__all__ = ["__version__", *sorted(_PLACES)]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
