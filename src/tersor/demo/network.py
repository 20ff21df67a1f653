"""A residual CNN for handwritten digits, trained by scripts/train_demo.py.

Small enough to ship and to recover within a minute, and large enough that its convolutions, not the
calls between them, decide its latency: the 8x8 images are enlarged to 16x16 first.
"""

from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("weights.safetensors")


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a 1x1 shortcut where the shape changes."""

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    conv2: nn.Conv2d
    bn2: nn.BatchNorm2d
    shortcut: nn.Module

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        same = stride == 1 and inputs == planes
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, planes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, planes, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class DigitNet(nn.Module):
    """Grey 8x8 images in [0, 1] to ten classes; two stages of residual blocks."""

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    stage1: nn.Sequential
    stage2: nn.Sequential
    fc: nn.Linear

    def __init__(self, width: int = 24, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(*(Block(width, width, 1) for _ in range(blocks)))
        self.stage2 = nn.Sequential(
            Block(width, 2 * width, 2), *(Block(2 * width, 2 * width, 1) for _ in range(blocks - 1))
        )
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, 10)."""
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage2(self.stage1(x))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def untrained() -> nn.Module:
    """Return the architecture with random weights."""
    return DigitNet()


def trained() -> nn.Module:
    """Return the network with the weights that ship with the package, in eval mode."""
    net = DigitNet()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval()
