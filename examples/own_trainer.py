"""Recover with your own trainer instead of ours.

    python examples/own_trainer.py

A trainer is a function of a network, a loss and batches. Techniques call it, so a distillation, a
fine-tuning and any method to come train the way your project trains: your optimizer, your schedule.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tersor


def fit(
    net: nn.Module,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    *,
    batches: Iterable[Any],
    epochs: float,
    lr: float | None = None,
    groups: Any = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> nn.Module:
    """Nesterov momentum at a constant rate; whole passes only."""
    del groups, checkpoint
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr or 0.01, momentum=0.9, nesterov=True)
    net.train()
    step = 0
    for _ in range(max(1, round(epochs))):
        for batch in batches:
            optimizer.zero_grad()
            loss(net, batch).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            step += 1
            if on_step is not None:
                on_step(step)
    return net.eval()


def main(out: Path) -> None:
    recipe = tersor.Recipe.parse(
        {
            "steps": [[{"drop_layers": {"blocks": 1}}, {"distill_logits": {"epochs": 2}}]],
            "target": "onnxruntime:cpu",
        }
    )
    artifact = tersor.compress(
        tersor.load("tersor.demo.network:trained"),
        recipe,
        data=tersor.load_data("digits"),
        metrics=("size", "latency", "accuracy"),
        fit=fit,
        out=out,
    )
    for before, after in zip(artifact.report.before, artifact.report.after, strict=True):
        print(f"{before.metric}: {before.value:.4g} -> {after.value:.4g} {before.unit}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/own_trainer"))
