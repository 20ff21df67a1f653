"""Exported programs for tests, and ways to alter their archives."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(torch.cat([x, y], 1).reshape(-1, 6)) * self.scale


def save(file: Path, *, named: bool = True, rows: int = 3) -> nn.Module:
    """Write an exported program with two inputs of a free batch size."""
    torch.manual_seed(0)
    net, batch = Net().eval(), Dim("batch")
    example = {"x": torch.randn(rows, 2), "y": torch.randn(rows, 4)}
    shapes = {"x": {0: batch}, "y": {0: batch}}
    if named:
        program = torch.export.export(net, (), kwargs=example, dynamic_shapes=shapes)
    else:
        program = torch.export.export(net, tuple(example.values()), dynamic_shapes=shapes)
    torch.export.save(program, file)
    return net


def alter(
    source: Path, place: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> Path:
    """Copy an archive; `change` gets its entries, by name below the top folder."""
    with zipfile.ZipFile(source) as archive:
        entries = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
        for name, data in change(entries).items():
            archive.writestr(f"a/{name}", data)
    return place


def alter_json(
    name: str, change: Callable[[Any], None]
) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Return a change of one JSON entry."""

    def apply(entries: dict[str, bytes]) -> dict[str, bytes]:
        raw = json.loads(entries[name])
        change(raw)
        return {**entries, name: json.dumps(raw).encode()}

    return apply
