"""Small networks and data for tests."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tersor.core.context import Context, Data
from tersor.core.model import Inputs
from tersor.core.runtime import Target


class Block(nn.Module):
    """Residual block with batch norm; a 1x1 shortcut where the shape changes."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        same = stride == 1 and inputs == planes
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, planes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class TinyCnn(nn.Module):
    """1x8x8 digits to 10 classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.block1 = Block(width, width, 1)
        self.block2 = Block(width, 2 * width, 2)
        self.block3 = Block(2 * width, 2 * width, 1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(x.mean(dim=(2, 3)))


class TinyTransformer(nn.Module):
    """Eight rows of a digit as tokens; one pre-norm attention block."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(8, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1))
        batch, tokens, dim = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(batch, tokens, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.proj(y)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


class Residual(nn.Module):
    """A block of a deep perceptron."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


class DeepPerceptron(nn.Module):
    """1x8x8 digits through equal blocks to 10 classes."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(64) for _ in range(blocks)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class WrittenTransformer(nn.Module):
    """As the one above, with everything spelled out: projections, attention, RMS norm, GELU."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(8, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.ones(dim))
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1))
        batch, tokens, dim = x.shape
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        shares = torch.softmax(q @ k.transpose(-2, -1) / (dim // self.heads) ** 0.5, dim=-1)
        x = x + self.proj((shares @ v).transpose(1, 2).reshape(batch, tokens, dim))
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        y = self.fc1(y)
        return self.head((x + self.fc2(y * 0.5 * (1 + torch.erf(y * 0.7071067811865476)))).mean(1))


_TRAINED: dict[str, dict[str, Tensor]] = {}


class AttendingRows(nn.Module):
    """Eight rows of a digit as tokens for nn.MultiheadAttention, which hides its projections."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **settings)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x.flatten(1, 2))
        made: Tensor = self.fc(self.attention(y, y, y, need_weights=False)[0].mean(1))
        return made


def digits() -> tuple[Tensor, Tensor]:
    """Real handwritten digits: images (1797,1,8,8) in [0,1] and labels."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(raw.target, dtype=torch.long)


def split(start: int, stop: int, size: int = 64) -> list[dict[str, Tensor]]:
    images, labels = digits()
    return [
        {"x": images[i : min(i + size, stop)], "labels": labels[i : min(i + size, stop)]}
        for i in range(start, stop, size)
    ]


def data() -> Data:
    return Data(
        calibration=split(0, 256),
        train=split(0, 1200),
        validation=split(1200, 1500),
        test=split(1500, 1797),
    )


def tiny_cnn(width: int = 8, trained: bool = True) -> nn.Module:
    """A residual CNN, trained for a second on the digits (about 95 %)."""
    torch.manual_seed(0)
    return _train(TinyCnn(width), f"cnn{width}") if trained else TinyCnn(width).eval()


def sparse_cnn(zeros: float = 0.9) -> nn.Module:
    """The residual CNN with that share of each layer's weights, the smallest, set to zero."""
    net = tiny_cnn()
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.data.view(-1)
            weight[weight.abs().argsort()[: int(zeros * weight.numel())]] = 0
    return net


def deep_perceptron(blocks: int = 4, trained: bool = True) -> nn.Module:
    """Blocks that are alike."""
    net = DeepPerceptron(blocks)
    return _train(net, f"deep{blocks}") if trained else net.eval()


def tiny_transformer(trained: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return _train(TinyTransformer(), "transformer") if trained else TinyTransformer().eval()


def written_transformer(trained: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = WrittenTransformer()
    return _train(net, "written") if trained else net.eval()


def _train(net: nn.Module, key: str) -> nn.Module:
    if key not in _TRAINED:
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        net.train()
        for _ in range(4):
            for batch in split(0, 1200):
                optimizer.zero_grad()
                F.cross_entropy(net(batch["x"]), batch["labels"]).backward()
                optimizer.step()
        _TRAINED[key] = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(_TRAINED[key])
    return net.eval()


def inputs() -> Inputs:
    return Inputs(example={"x": digits()[0][:4]}, dynamic={"x": {0: "batch"}})


def context(net: nn.Module, work_dir: Path, **changes: Any) -> Context:
    """A context over the digits; latencies come from the real runtime."""
    from tersor.ops.sharing import keeping
    from tersor.trainer import fit

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch["x"]), batch["labels"])

    def latency(nets: Any) -> list[float]:
        from tersor.candidate import latencies

        return latencies(
            nets, inputs(), Target(runtime="onnxruntime", options={"threads": 1}), data(), work_dir
        )

    work_dir.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {
        "inputs": inputs(),
        "data": data().without_test(),
        "target": Target(runtime="onnxruntime", options={"threads": 1}),
        "loss": loss,
        "fit": keeping(fit),
        "latency": latency,
        "work_dir": work_dir,
        "reference": net,
    }
    return Context(**{**made, **changes})
