"""`tersor log`: a report as a run of TensorBoard or MLflow."""

from pathlib import Path

from tersor._cli_talk import show, show_json


def log(artifact: str, *, to: str, as_json: bool) -> int:
    """Write the run, and say how to look at it."""
    from tersor.logs import write

    place = write(artifact, to)
    name = to.partition(":")[0]
    look = {
        "tensorboard": f"tensorboard --logdir {place}",
        "mlflow": f"mlflow ui --backend-store-uri sqlite:///{place}",
    }[name]
    if as_json:
        show_json({"log": {"artifact": str(Path(artifact)), "path": str(place), "look": look}})
    else:
        show(f"to look at it:\n  {look}")
    return 0
