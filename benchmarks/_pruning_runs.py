"""One run of pruning_peers.py in a process of its own: cut resnet56, recover, score, quantize.

    python benchmarks/_pruning_runs.py METHOD SEED FOLDER PART [LIMIT]

Writes the ONNX files fp32.onnx and int8.onnx into FOLDER and what is told of the run into PART.
LIMIT is a number of training batches, for trying the script out. A run that was stopped goes on
from the trainer's checkpoint.
"""

import copy
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _networks import context, ways, workload
from torch import nn

from tersor.core.layers import Layers

MACS = 1 / 2.1
"""Share of the multiply-accumulates that is left: 2.1 times fewer."""
SCRATCH_LR = 0.1
"""What residual networks of CIFAR are trained with from scratch; recovery takes the default."""
_TP_STEPS = 400
"""Of Torch-Pruning's reproduction: small ones, until the speed-up is reached."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a network is made smaller before its epoch of training."""

    cut: Callable[[nn.Module, "Given"], tuple[nn.Module, dict[str, Any]]]
    lr: float | None = None
    epochs: float = 1
    steered: str = "macs"


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a method may use; the same for all."""

    inputs: Any
    data: Mapping[str, Any]
    folder: Path
    reference: nn.Module
    seed: int


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, seed, folder, part = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    limit = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    from tersor import trainer
    from tersor.core.hardware import environment
    from tersor.ops.losses import labelled_loss

    module = workload("cifar")
    data = module.data()
    if limit:
        data["train"] = Limited(data["train"], limit)
    original = module.resnet56()
    method = METHODS[name]
    given = Given(
        inputs=ways(next(iter(data["calibration"]))),
        data=data,
        folder=folder,
        reference=original,
        seed=seed,
    )
    torch.manual_seed(seed)
    began = time.perf_counter()
    net, told = method.cut(copy.deepcopy(original), given)
    row: dict[str, Any] = {"method": name, "seed": seed, "limit_batches": limit, **told}
    row["steered"] = method.steered
    row["cut_seconds"] = time.perf_counter() - began
    row |= sizes(original, net, given)
    row["accuracy_unrecovered"] = accuracy(net, data["test"])
    net.requires_grad_(True)
    began = time.perf_counter()
    net = trainer.fit(
        net,
        labelled_loss,
        batches=data["train"],
        epochs=method.epochs,
        lr=method.lr,
        seed=seed,
        checkpoint=folder / "fit.safetensors",
        threads=1,
    )
    row["train_seconds"] = time.perf_counter() - began
    row["fp32"] = scored(net, given, folder / "fp32.onnx")
    row["int8"] = scored(int8(net, given), given, folder / "int8.onnx")
    row["environment"] = environment()
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


class Limited:
    """The first batches of each pass."""

    def __init__(self, batches: Any, count: int) -> None:
        self.batches, self.count = batches, min(count, len(batches))

    @property
    def seed(self) -> int:
        return int(self.batches.seed)

    @seed.setter
    def seed(self, value: int) -> None:
        self.batches.seed = value

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _, batch in zip(range(self.count), self.batches, strict=False):
            yield batch


# --- ways to make it smaller ---------------------------------------------------------------------


def steps(*asked: tuple[str, Mapping[str, Any]]) -> Callable[..., tuple[nn.Module, dict[str, Any]]]:
    """Apply techniques of tersor."""

    def cut(net: nn.Module, given: Given) -> tuple[nn.Module, dict[str, Any]]:
        from tersor.core import plugins

        facts = {}
        for name, settings in asked:
            made = context_of(given)
            step = plugins.technique(name)
            net = step.apply(net, step.config(**settings), made)
            facts[name] = made.facts
        settings = {
            name: {k: str(v) if k == "layers" else v for k, v in own.items()} for name, own in asked
        }
        return net, {"steps": settings, "facts": facts}

    return cut


def context_of(given: Given) -> Any:
    from tersor.candidate import latencies
    from tersor.core.context import Data

    plain = context(
        given.inputs,
        given.folder,
        calibration=given.data["calibration"],
        train=given.data["train"],
        reference=given.reference,
    )

    def timed(nets: Any) -> Any:
        data = Data(calibration=given.data["calibration"])
        return latencies(nets, given.inputs, plain.target, data, given.folder)

    return replace(plain, latency=timed, seed=given.seed)


def torch_pruning(
    importance: str, *, everything: bool
) -> Callable[..., tuple[nn.Module, dict[str, Any]]]:
    """Prune as Torch-Pruning's own reproduction on CIFAR-10 does: globally, in small steps.

    Its graph takes the zero-padding of this network's shortcuts for an operator that keeps each
    channel's place. `everything=False` therefore protects the layers that write to the shortcuts,
    as somebody would who has noticed.
    """

    def cut(net: nn.Module, given: Given) -> tuple[nn.Module, dict[str, Any]]:
        import torch_pruning as tp

        net.requires_grad_(True)
        kinds = {
            "l1": functools.partial(tp.importance.MagnitudeImportance, p=1),
            "group_norm": functools.partial(tp.importance.GroupMagnitudeImportance, p=2),
        }
        layers = dict(net.named_modules())
        ignored = [layers["linear"]]
        if not everything:
            ignored += [m for n, m in layers.items() if n == "conv1" or n.endswith(".conv2")]
        pruner = tp.pruner.BasePruner(
            net,
            given.inputs.example["x"][:1],
            importance=kinds[importance](),
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=_TP_STEPS,
            ignored_layers=ignored,
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        full = macs(net, given)
        taken = 0
        while macs(net, given) > MACS * full and taken < _TP_STEPS:
            pruner.step()
            taken += 1
        return net, {"steps_taken": taken}

    return cut


def from_scratch(net: nn.Module, given: Given) -> tuple[nn.Module, dict[str, Any]]:
    """The control: the architecture that tersor's default makes, with new weights."""
    net, told = METHODS[DEFAULT].cut(net, given)
    torch.manual_seed(given.seed)
    for module in net.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return net, {**told, "weights": "new"}


def as_it_is(net: nn.Module, given: Given) -> tuple[nn.Module, dict[str, Any]]:
    """The network that all are compared with."""
    del given
    return net, {}


INNER = ("!conv1", "!*.conv2")
"""All but the layers that write to the shortcuts."""
DEFAULT = "tersor fisher per_cost inner"
"""Whose architecture is trained from scratch: the best of ours before recovery, on validation."""
METHODS: dict[str, Method] = {
    "original": Method(cut=as_it_is, epochs=0, steered="nothing"),
    **{
        f"tersor {importance} {ranking}{' inner' * inner}": Method(
            cut=steps(
                (
                    "channels",
                    {
                        "macs": MACS,
                        "importance": importance,
                        "ranking": ranking,
                        "multiple": 1,
                        "layers": Layers(patterns=INNER if inner else ("*",)),
                    },
                )
            )
        )
        for importance in ("l1", "l2", "taylor", "fisher")
        for ranking in ("local", "global", "global_normalized", "per_cost")
        for inner in (False, True)
    },
    "torch-pruning l1": Method(cut=torch_pruning("l1", everything=True)),
    "torch-pruning group_norm": Method(cut=torch_pruning("group_norm", everything=True)),
    "torch-pruning l1 inner": Method(cut=torch_pruning("l1", everything=False)),
    "torch-pruning group_norm inner": Method(cut=torch_pruning("group_norm", everything=False)),
    "from scratch": Method(cut=from_scratch, lr=SCRATCH_LR),
    **{
        f"tersor blocks {share}": Method(
            cut=steps(("drop_layers", {"latency": share})), steered="latency"
        )
        for share in (0.75, 0.6, 0.5, 0.4)
    },
    "tersor widths": Method(
        cut=steps(
            (
                "channels",
                {
                    "latency": 0.5,
                    "importance": "fisher",
                    "ranking": "per_cost",
                    "multiple": 8,
                    "layers": Layers(patterns=INNER),
                },
            )
        ),
        steered="latency",
    ),
    "tersor blocks 0.6 widths": Method(
        cut=steps(("drop_layers", {"latency": 0.6}), ("channels", {"ratio": 0.25, "multiple": 16})),
        steered="latency",
    ),
}


# --- what came out -------------------------------------------------------------------------------


def macs(net: nn.Module, given: Given) -> float:
    from tersor.metrics.macs import count

    return count(net, {"x": given.inputs.example["x"][:1].numpy()})


def sizes(original: nn.Module, net: nn.Module, given: Given) -> dict[str, Any]:
    full, left = macs(original, given), macs(net, given)
    return {
        "macs": left,
        "times_fewer_macs": full / left,
        "parameters": sum(p.numel() for p in net.parameters()),
        "widths": [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)],
    }


def halves(count: int) -> dict[str, np.ndarray]:
    """Return the samples that choices are made on, and those of the report."""
    order = np.random.default_rng(0).permutation(count)
    return {"validation": np.sort(order[: count // 2]), "test": np.sort(order[count // 2 :])}


def accuracy(net: nn.Module, batches: Any) -> dict[str, float]:
    net.eval()
    with torch.no_grad():
        right = np.concatenate([(net(b["x"]).argmax(1) == b["labels"]).numpy() for b in batches])
    return {half: 100 * float(right[rows].mean()) for half, rows in halves(len(right)).items()}


def int8(net: nn.Module, given: Given) -> nn.Module:
    """Quantize with the defaults."""
    from tersor.core import plugins
    from tersor.ops.fake_quantize import settle

    net = copy.deepcopy(net)
    for name in ("fuse_batch_norm", "static"):
        step = plugins.technique(name)
        net = step.apply(net, step.config(), context_of(given))
    return settle(net)  # type: ignore[no-any-return]


def scored(net: nn.Module, given: Given, file: Path) -> dict[str, Any]:
    """Write ONNX, and score that file on both halves of the test split."""
    from tersor import benchmark
    from tersor.core.runtime import Target
    from tersor.core.scoring import hits
    from tersor.ops.lower import lower
    from tersor.runtimes.onnxruntime import load

    model = lower(net, "onnx", given.inputs)
    file.write_bytes(model.SerializeToString(deterministic=True))
    runner = load(file, Target(runtime="onnxruntime", options={"threads": 1}))
    outputs, labels = benchmark.evaluate(runner, given.data["test"])
    right = hits(outputs, labels).astype(bool)
    found: dict[str, Any] = {"size_bytes": file.stat().st_size}
    for half, rows in halves(len(right)).items():
        found[half] = {
            "accuracy": 100 * float(right[rows].mean()),
            "samples": len(rows),
            "hits": np.packbits(right[rows]).tobytes().hex(),
        }
    return found


if __name__ == "__main__":
    main()
