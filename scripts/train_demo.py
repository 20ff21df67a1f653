"""Train the network of `tersor demo` on the train split of the digits and store its weights.

    python scripts/train_demo.py

About two minutes on one core. One thread and a fixed seed: the same machine and versions give the
same weights. Reports the accuracy on the splits that training has not seen.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.core.context import Batch
from tersor.datasets.digits import load
from tersor.demo.network import WEIGHTS, untrained

BATCH = 64
PEAK_LR = 4e-3


def main() -> None:
    """Train, report, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    data = load("")
    assert data.train is not None
    images, labels = joined(data.train)
    net = train(untrained(), images, labels, epochs=arguments.epochs, seed=arguments.seed)
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        if split is not None:
            x, y = joined(split)
            print(f"{name}: {accuracy(net, x, y):.2f} % of {len(y)}")
    save_file(
        {name: tensor.contiguous() for name, tensor in net.state_dict().items()}, arguments.out
    )
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes")


def joined(batches: "list[Batch]") -> tuple[Tensor, Tensor]:
    """Concatenate batches to images (N, 1, 8, 8) and labels (N,)."""
    both = [(batch["x"], batch["labels"]) for batch in batches]
    return torch.cat([x for x, _ in both]), torch.cat([y for _, y in both])


def train(net: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> nn.Module:
    """AdamW, one cycle with warm-up and cosine decay, label smoothing, shifts of one pixel."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR, weight_decay=0.05)
    steps = epochs * math.ceil(len(labels) / BATCH)
    warm = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            (i + 1) / warm
            if i < warm
            else 0.5 + 0.5 * math.cos(math.pi * (i - warm) / (steps - warm))
        ),
    )
    for _ in range(epochs):
        net.train()
        for chosen in torch.randperm(len(labels), generator=rng).split(BATCH):
            optimizer.zero_grad()
            logits = net(shifted(images[chosen], rng))
            F.cross_entropy(logits, labels[chosen], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Shift every image by -1, 0 or 1 pixel in both directions; zeros come in."""
    padded = F.pad(images, (1, 1, 1, 1))
    places = torch.randint(0, 3, (len(images), 2), generator=rng).tolist()
    return torch.stack(
        [p[:, y : y + 8, x : x + 8] for p, (y, x) in zip(padded, places, strict=True)]
    )


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of `images` that the network gets right."""
    return 100 * float((net(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
