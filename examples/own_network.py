"""A network of your own, from training to a measured artifact, in one program.

    python examples/own_network.py

Trains a small convolutional network on handwritten digits for some seconds, compresses it for ONNX
Runtime with a recipe written in Python, prints every verdict, and runs the artifact.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tersor
from tersor.distillation.distill_logits import DistillLogits
from tersor.pruning.channels import Channels
from tersor.quantization.static import Static


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean(dim=(2, 3)))


def train(net: nn.Module, data: tersor.Data, epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    net.train()
    for _ in range(epochs):
        for batch in data.train:
            optimizer.zero_grad()
            F.cross_entropy(net(batch["x"]), batch["labels"]).backward()
            optimizer.step()
    return net.eval()


def main(out: Path) -> None:
    torch.manual_seed(0)
    data = tersor.load_data("digits")
    net = train(Net(), data, epochs=15)
    recipe = tersor.Recipe(
        stages=((Channels(), DistillLogits(epochs=3)), (Static(),)),
        target=tersor.Target(runtime="onnxruntime", options={"threads": 1}),
        goal=tersor.Goal(best="latency", limits={"accuracy": "-1pt"}),
    )
    artifact = tersor.compress(net, recipe, data=data, out=out)
    for stage in artifact.report.stages:
        print(f"{stage.name}: {stage.verdict}: {stage.reason}")
    for ratio in artifact.report.ratios:
        print(f"{ratio.metric}: {ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]")
    runner = artifact.load()
    image = next(iter(data.test))["x"][:1].numpy()
    (logits,) = runner.bind({"x": image})().values()
    print("the first test image is a", int(np.argmax(logits)))
    runner.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/own_network"))
