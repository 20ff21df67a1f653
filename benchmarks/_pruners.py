"""What the contestants of pruning_coverage.py do to one network, in a process of its own.

    python benchmarks/_pruners.py NETWORK FOLDER [CONTESTANT ...]

Writes FOLDER/CONTESTANT.json after each, so that a crash costs one answer only, and
FOLDER/CONTESTANT.onnx where it can be exported. "original" is the network as it is, which the
others are compared with. With `time` instead of contestants the ONNX files of FOLDER are timed in
turns on ONNX Runtime, one thread, batch 1.

**Exactness** is checked without asking the contestant what it removed: each number of the smaller
weights is looked up in the original's, which tells the places that went. Two references are made
of the original: one in which nothing reads those places (columns of the layers that would), and one
in which all that was removed is zero. A contestant is exact if its network computes what either of
them does. A norm over channels that were removed computes something else.
"""

import copy
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _networks import context
from _zoo import Entry, entries, make, shim
from torch import Tensor, nn

Pruned = tuple[nn.Module, dict[str, Any]]
"""The network, and what is told of the way there."""
TOLERANCE = 1e-3
RATIO = 0.5
SECONDS = 3.0
SAMPLED = 64


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shim()
    name, folder, contestants = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    entry = entries()[name]
    if contestants == ["time"]:
        write(folder / "time.json", timed(entry, folder))
        return
    original = make(entry)
    torch.manual_seed(1)
    samples = entry.inputs(3)
    for contestant in contestants:
        began = time.perf_counter()
        row: dict[str, Any] = {}
        try:
            net, told = PRUNERS[contestant](copy.deepcopy(original), entry, folder)
            row |= told
            row["prune_seconds"] = time.perf_counter() - began
            if "fails" not in row:
                row |= examine(original, net, entry, samples)
            if row.get("runs"):
                row |= exported(net, entry, folder / f"{contestant}.onnx")
        except Exception as error:
            row |= failure(error)
        row["seconds"] = time.perf_counter() - began
        write(folder / f"{contestant}.json", row)


def write(file: Path, row: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(row, indent=1), encoding="utf-8")


def failure(error: Exception) -> dict[str, str]:
    """Tell what went wrong, and where in whose code."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    place = f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.lineno}"
    line = " ".join(str(error).split())[:600]
    return {"fails": type(error).__name__, "message": without_paths(line), "at": place}


def without_paths(text: str) -> str:
    return re.sub(r"/(?:[\w.+-]+/)+", "", text)


# --- contestants ---------------------------------------------------------------------------------


def as_it_is(net: nn.Module, entry: Entry, folder: Path) -> Pruned:
    del entry, folder
    return net, {}


def ways(entry: Entry) -> Any:
    from tersor.core.model import Inputs

    torch.manual_seed(2)
    example = entry.inputs(2)
    return Inputs(example=example, dynamic={name: {0: "batch"} for name in example})


def tersor(net: nn.Module, entry: Entry, folder: Path) -> Pruned:
    """Apply `channels`: half of the channels of each group."""
    from tersor.core import plugins
    from tersor.core.errors import TersorError
    from tersor.ops.capture import capture
    from tersor.ops.groups import find_groups

    inputs = ways(entry)
    found: dict[str, Any] = {}
    captured = capture(net, inputs)
    found["protected"] = protected(find_groups(captured, net))
    step = plugins.technique("channels")
    given = context(inputs, folder, calibration=None)
    try:
        net = step.apply(net, step.config(ratio=RATIO, multiple=1), given)
    except TersorError as error:
        return net, found | failure(error)
    found["groups"] = len(given.facts["groups"])
    return net, found


def protected(groups: Any) -> dict[str, int]:
    """Count the channels that must stay, by the reason without the place."""
    counts: dict[str, int] = {}
    for group in groups:
        if group.protected:
            reason = re.sub(r" \([\w.]+\)$", "", group.protected)
            reason = re.sub(r"^[\w.]+ is used", "a parameter is used", reason)
            counts[reason] = counts.get(reason, 0) + group.size
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def torch_pruning(net: nn.Module, entry: Entry, folder: Path) -> Pruned:
    """Apply Torch-Pruning as its examples do; where heads are found, whole heads as second way."""
    del folder
    import torch_pruning as tp

    heads = attention_layers(net)
    ways_to = [{}, {"prune_num_heads": True, "prune_head_dims": False}] if heads else [{}]
    torch.manual_seed(2)
    example = entry.inputs(1)
    failed: Exception | None = None
    for way in ways_to:
        trial = copy.deepcopy(net)
        layers = dict(trial.named_modules())
        ignored = [
            m
            for m in trial.modules()
            if isinstance(m, nn.Linear) and entry.classes == m.out_features
        ]
        if not ignored:
            ignored = last_layers(trial, example)
        numbers = {layers[name]: count for name, count in heads.items()}
        multi = [m.num_heads for m in trial.modules() if isinstance(m, nn.MultiheadAttention)]
        try:
            for parameter in trial.parameters():
                parameter.requires_grad_(True)
            pruner = tp.pruner.BasePruner(
                trial,
                example if len(example) > 1 else next(iter(example.values())),
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=RATIO,
                global_pruning=False,
                ignored_layers=ignored,
                num_heads=numbers,
                head_pruning_ratio=RATIO if way else 0.0,
                round_to=multi[0] if multi else None,
                in_channel_groups={},
                out_channel_groups={},
                **way,
            )
            for group in pruner.step(interactive=True):
                group.prune()
            adjust(trial, pruner.num_heads)
            with torch.no_grad():
                trial(**example)
        except Exception as error:
            failed = failed or error
            continue
        sizes = [sum(p.numel() for p in each.parameters()) for each in (net, trial)]
        if sizes[0] == sizes[1]:
            return trial, {"fails": "nothing", "message": "nothing was pruned"}
        return trial, {"way": "heads" if way else "channels"}
    assert failed is not None
    raise failed


_FUSED = ("qkv", "qkv_proj", "Wqkv", "query_key_value", "in_proj_qkv")
_APART = (("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "kv"))
_COUNTS = ("num_heads", "num_attention_heads", "heads", "n_heads")


def attention_layers(net: nn.Module) -> dict[str, int]:
    """Find the layers that make queries, keys and values, with their numbers of heads."""
    found = {}
    for name, module in net.named_modules():
        count = next(
            (getattr(module, a) for a in _COUNTS if isinstance(getattr(module, a, None), int)), 0
        )
        if not count or isinstance(module, nn.MultiheadAttention):
            continue
        shared = getattr(module, "num_key_value_heads", count)
        for group in (*((one,) for one in _FUSED), *_APART):
            layers = [getattr(module, each, None) for each in group]
            if all(isinstance(each, (nn.Linear, nn.Conv2d)) for each in layers):
                for each in group:
                    found[f"{name}.{each}"] = shared if each.startswith(("k", "v")) else count
    return found


def adjust(net: nn.Module, heads: Mapping[Any, int]) -> None:
    """Set the numbers that forward computes with, as Torch-Pruning's examples do."""
    for module in net.modules():
        if type(module).__name__ == "VisionTransformer" and hasattr(module, "conv_proj"):
            module.hidden_dim = module.conv_proj.out_channels
        for group in (*((one,) for one in _FUSED), *_APART):
            layers = [getattr(module, each, None) for each in group]
            if not all(each in heads for each in layers):
                continue
            count = heads[layers[0]]
            width = weight_of(layers[0]).shape[0] // (3 if len(group) == 1 else 1)
            numbers = {
                **dict.fromkeys(_COUNTS, count),
                **dict.fromkeys(("head_dim", "attention_head_size", "dim_head"), width // count),
                **dict.fromkeys(("attn_dim", "all_head_size", "inner_dim"), width),
            }
            if hasattr(module, "num_key_value_heads"):
                numbers["num_key_value_heads"] = heads[layers[1]]
            for attribute, value in numbers.items():
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, value)


def weight_of(layer: Any) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def last_layers(net: nn.Module, example: Mapping[str, Tensor]) -> list[nn.Module]:
    """Return the last convolution or linear layer that is called."""
    called: list[nn.Module] = []
    hooks = [
        m.register_forward_hook(lambda m, *_: called.append(m))
        for m in net.modules()
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    ]
    with torch.no_grad():
        net(**example)
    for hook in hooks:
        hook.remove()
    return called[-1:]


PRUNERS: dict[str, Callable[[nn.Module, Entry, Path], Pruned]] = {
    "original": as_it_is,
    "tersor": tersor,
    "torch-pruning": torch_pruning,
}


# --- what came out -------------------------------------------------------------------------------


def examine(
    original: nn.Module, net: nn.Module, entry: Entry, samples: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Count what is left, run other batch sizes, check exactness."""
    from tersor.metrics import macs

    batch = {name: tensor.numpy() for name, tensor in entry.inputs(1).items()}
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "channels": channels(net, entry),
    }
    net.eval()
    try:
        with torch.no_grad():
            found = output(net, samples)
            one = output(net, {k: v[:1] for k, v in samples.items()})
            row["runs"] = found.shape[0] == 3 and one.shape[0] == 1
            row["batch_difference"] = difference(found[:1], one)
    except Exception as error:
        return row | {"runs": False} | failure(error)
    row["macs"] = macs.count(net, batch)
    with torch.no_grad():
        wanted = output(original, samples)
    row["responds"] = difference(wanted[:1], wanted[1:2])
    row["finite"] = bool(torch.isfinite(wanted).all())
    row["moved"] = difference(wanted, found)
    if net is not original and row["moved"] > 0:
        row |= exactness(original, net, samples, found)
    return row


def output(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    from tersor.ops.losses import first_output

    return first_output(net(**batch))


def difference(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    return float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-9))


def channels(net: nn.Module, entry: Entry) -> int:
    """Count output channels of all layers but classifiers."""
    count = 0
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            made = getattr(module, "out_features", None) or module.out_channels  # type: ignore[union-attr]
            count += 0 if made == entry.classes else made
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            count += module.in_proj_weight.shape[0]
        elif isinstance(module, nn.RNNBase):
            count += module.hidden_size * module.num_layers
    return count


def exactness(
    original: nn.Module, net: nn.Module, samples: Mapping[str, Tensor], found: Tensor
) -> dict[str, Any]:
    """Compare with the original without what was removed; see the top of the file."""
    try:
        gone = removed(original, net)
    except LookupError as error:
        return {"exact": None, "exact_unknown": str(error)}
    answer: dict[str, Any] = {}
    for way in ("unread", "zeroed"):
        masked = copy.deepcopy(original)
        tensors = dict(masked.named_parameters())
        with torch.no_grad():
            for name, dims in gone.items():
                for dim, places in dims.items():
                    if way == "zeroed" or dim == reading(masked, name):
                        tensors[name].index_fill_(dim, torch.tensor(places), 0.0)
            answer[way] = difference(output(masked, samples), found)
    answer["exact"] = min(answer.values()) <= TOLERANCE
    return answer


def reading(net: nn.Module, name: str) -> int | None:
    """Return the dimension of a weight along which it reads."""
    owner, _, leaf = name.rpartition(".")
    layer = net.get_submodule(owner)
    if "weight" not in leaf:
        return None
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return 0
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
    return 1 if isinstance(layer, kinds) else None


def removed(original: nn.Module, net: nn.Module) -> dict[str, dict[int, list[int]]]:
    """For each parameter that shrank, the places that are gone, by dimension."""
    # attention modules are split: their projections are then layers of their own
    after = {n.replace("in_projection.", "in_proj_"): p for n, p in net.named_parameters()}
    gone: dict[str, dict[int, list[int]]] = {}
    for name, tensor in original.named_parameters():
        if name not in after:
            raise LookupError(f"{name} is no parameter of the pruned network")
        if after[name].shape == tensor.shape:
            continue
        try:
            gone[name] = places(name, tensor.detach().numpy(), after[name].detach().numpy())
        except LookupError:
            if reading(original, name) is not None:
                raise
            # scales of a norm may have been changed; what they scale is read by nobody
    return gone


def places(name: str, before: np.ndarray, after: np.ndarray) -> dict[int, list[int]]:
    """Look the smaller tensor's numbers up in the original's."""
    flat = before.reshape(-1)
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    rng = np.random.default_rng(0)
    gone = {}
    for dim in range(before.ndim):
        if before.shape[dim] == after.shape[dim]:
            continue
        kept = [-1]
        for index in range(after.shape[dim]):
            values = after.take(index, dim).reshape(-1)
            values = values[rng.integers(len(values), size=min(SAMPLED, len(values)))]
            left = np.searchsorted(ordered, values, "left")
            right = np.searchsorted(ordered, values, "right")
            alone = right - left == 1
            if alone.any():
                where = np.unravel_index(order[left[alone]], before.shape)[dim]
                kept.append(int(np.bincount(where).argmax()))
                continue
            # only numbers that stand there several times: places stay in order
            where = np.unravel_index(order[left[0] : right[0]], before.shape)[dim]
            later = where[where > kept[-1]]
            if not len(later):
                raise LookupError(f"{name}: numbers of place {index} are not in the original")
            kept.append(int(later.min()))
        if len(set(kept)) != after.shape[dim] + 1:
            raise LookupError(f"{name}: places of dimension {dim} are not told apart")
        gone[dim] = sorted(set(range(before.shape[dim])) - set(kept))
    return gone


# --- ONNX ----------------------------------------------------------------------------------------


def exported(net: nn.Module, entry: Entry, file: Path) -> dict[str, Any]:
    """Write ONNX and compare it with the network."""
    from tersor.core.runtime import Target
    from tersor.ops.lower import lower
    from tersor.runtimes.onnxruntime import load

    try:
        model = lower(net, "onnx", ways(entry))
        file.write_bytes(model.SerializeToString(deterministic=True))
        runner = load(file, Target(runtime="onnxruntime", options={"threads": 1}))
        torch.manual_seed(3)
        batch = entry.inputs(3)
        made = runner.bind({name: tensor.numpy() for name, tensor in batch.items()})()
        with torch.no_grad():
            wanted = output(net, batch)
        wrong = difference(wanted, torch.from_numpy(np.array(next(iter(made.values())))))
    except Exception as error:
        file.unlink(missing_ok=True)
        told = failure(error)
        return {"exports": False, "export_message": f"{told['fails']}: {told['message']}"}
    return {"exports": wrong <= 1e-2, "export_difference": wrong}


def timed(entry: Entry, folder: Path) -> dict[str, Any]:
    from tersor.core.runtime import Target
    from tersor.core.statistics import judge
    from tersor.core.timing import interleave
    from tersor.runtimes.onnxruntime import load

    names = [name for name in PRUNERS if (folder / f"{name}.onnx").exists()]
    target = Target(runtime="onnxruntime", options={"threads": 1})
    runners = [load(folder / f"{name}.onnx", target) for name in names]
    torch.manual_seed(4)
    feeds = [{k: v.numpy() for k, v in entry.inputs(1).items()} for _ in range(8)]
    calls = [[runner.bind(feed) for feed in feeds] for runner in runners]
    seconds = float(os.environ.get("SECONDS_OF_TIMING", SECONDS))
    found = interleave(calls, budget_s=seconds, seed=0)
    made: dict[str, Any] = {
        "ms": {n: float(np.median(t)) for n, t in zip(names, found, strict=True)}
    }
    times = dict(zip(names, found, strict=True))
    for slow, fast in (
        ("original", "tersor"),
        ("original", "torch-pruning"),
        ("torch-pruning", "tersor"),
    ):
        if slow in times and fast in times:
            ratio = judge(times[slow], times[fast])
            made[f"{fast} to {slow}"] = {
                key: getattr(ratio, key) for key in ("speedup", "low", "high", "verdict", "blocks")
            }
    return made


if __name__ == "__main__":
    main()
