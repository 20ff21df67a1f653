"""What `advise` tries: ideas by the kind of network, the target and the goal, strongest first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tersor.core import plugins
from tersor.core.context import Data
from tersor.core.goal import Goal
from tersor.core.hardware import probe
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops.blocks import find_blocks

SHARES = (0.5, 0.65, 0.8)
"""Of the blocks, of the work or of the parameters, that a smaller network is to keep."""
_ANEW_LR, _ANEW_HARD = 2e-3, 0.3
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, kw_only=True)
class Idea:
    """A stage that may help, and why."""

    stage: tuple[Any, ...]
    why: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What decides which ideas there are."""

    shares: Mapping[str, float]
    """Of the multiply-accumulates, by kind of layer."""
    depthwise: bool
    norms: bool
    """Whether batch norms stand in it."""
    blocks: int
    """Residual blocks that it runs without."""
    target: Target
    data: Data
    best: str
    sized: bool
    """Whether the goal limits the size."""
    epochs: float
    """Of recovery that there is time for."""

    def share(self, kind: str) -> float:
        """Return a kind's share of the multiply-accumulates."""
        return self.shares.get(kind, 0.0)


def facts_of(
    net: nn.Module,
    inputs: Inputs,
    work: Mapping[str, Any],
    target: Target,
    data: Data,
    goal: Goal,
    epochs: float,
) -> Facts:
    """Gather them.

    Args:
        net: The network.
        inputs: How to call it.
        work: By kind of layer, as `explainer.work_of` counts it.
        target: Where it is to run.
        data: Batches by role.
        goal: What to improve, within which limits.
        epochs: Of recovery, at most.
    """
    total = sum(each.macs for each in work.values()) or 1
    return Facts(
        shares={kind: each.macs / total for kind, each in work.items()},
        depthwise=any(each.depthwise for each in work.values()),
        blocks=len(find_blocks(net, inputs)[0]),
        norms=any(isinstance(module, _NORMS) for module in net.modules()),
        target=target,
        data=data,
        best=goal.best,
        sized="size" in goal.limits,
        epochs=epochs,
    )


def config(name: str, **settings: Any) -> Any:
    """Return a step of a recipe."""
    return plugins.technique(name).config(**settings)


def foldings(facts: Facts) -> list[Idea]:
    """List what changes no output and helps whatever comes after it."""
    why = "batch norms cost a pass over memory each, and ranges are better without them"
    return [Idea(stage=(config("fuse_batch_norm"),), why=why)] if facts.norms else []


def fusions(facts: Facts) -> list[list[Idea]]:
    """List what changes no output and may help the runtime; each group may hinder quantizers."""
    groups = []
    if facts.share("linear layers") > 0.2:
        ones = (
            ("fuse_qkv", "three products of one input are one larger product"),
            ("fuse_norm_linear", "a norm's scale and shift are part of the products after it"),
        )
        groups.append([Idea(stage=(config(name),), why=why) for name, why in ones])
        why = "attention in one operator keeps its scores out of memory"
        groups.append([Idea(stage=(config("fuse_attention"),), why=why)])
    return groups


def quantizers(facts: Facts) -> list[Idea]:
    """List ways to compute, or to store, in fewer bits; one of them is taken."""
    smaller = [
        Idea(stage=(config("weight_only", bits=4),), why="weights of 4 bits are an eighth"),
        Idea(stage=(config("weight_only"),), why="weights of 8 bits are a quarter"),
    ]
    if facts.best == "size":
        why = "weights of 8 bits are a quarter, and compute so"
        return [*smaller, Idea(stage=(config("static"),), why=why)]
    found = smaller if facts.sized else []
    runtime = plugins.runtime(facts.target.runtime)
    fast = "8-bit integers do more of the arithmetic at once, and weights are a quarter to read"
    if facts.share("recurrent layers") < 0.5:
        found.append(Idea(stage=(config("static"),), why=fast))
        if facts.depthwise or facts.share("linear layers") > 0.5:
            found.append(
                Idea(
                    stage=(config("equalize"), config("static"), config("bias_correction")),
                    why=f"{fast}; channels of unlike ranges are made alike first",
                )
            )
    if facts.share("linear layers") + facts.share("recurrent layers") > 0.3:
        found.append(
            Idea(
                stage=(config("dynamic"),),
                why="weights of 8 bits are a quarter to read, and activations need no calibration",
            )
        )
    if runtime.halves(facts.target.device):
        flags = probe().flags
        if facts.target.device == "cuda":
            found.append(
                Idea(stage=(config("half", format="fp16"),), why="tensor cores compute in fp16")
            )
        elif {"avx512_bf16", "amx_bf16", "bf16"} & set(flags):
            found.append(
                Idea(stage=(config("half"),), why="the processor multiplies bf16 natively")
            )
    return found


def packers(facts: Facts) -> list[Idea]:
    """List what makes files smaller, whatever is in them."""
    why = "what weights repeat is stored once; opening takes longer, runs do not"
    return [Idea(stage=(config("pack"),), why=why)] if facts.best == "size" or facts.sized else []


def shrinkers(facts: Facts) -> list[list[Idea]]:
    """List families of smaller networks; of each, the strongest that can recover is taken."""
    recovery = config("distill_logits", epochs=facts.epochs)
    families = []
    narrower = "narrower layers multiply less and move less"

    def family(step: str, why: str, settings: Sequence[Mapping[str, Any]]) -> list[Idea]:
        return [Idea(stage=(config(step, **each), recovery), why=why) for each in settings]

    if facts.share("recurrent layers") > 0.5:
        # gates that lost half of what they read learn anew, rather than recover
        recovery = replace(recovery, lr=_ANEW_LR, hard=_ANEW_HARD)
        return [family("student", narrower, [{"width": share} for share in SHARES])]
    counts = dict.fromkeys(round((1 - share) * facts.blocks) for share in SHARES)
    if any(counts):
        why = "whole residual blocks go, with all that it costs to start them"
        drops = [{"blocks": count} for count in counts if count]
        families.append(family("drop_layers", why, drops))
    measure = "parameters" if facts.best == "size" else "macs"
    cuts = [{measure: share, "ranking": "global_normalized"} for share in SHARES]
    families.append(family("channels", narrower, cuts))
    return families


def trained(stage: Sequence[Any], epochs: float) -> tuple[Any, ...]:
    """Return the stage with its recovery so many passes long."""
    return tuple(replace(c, epochs=epochs) if hasattr(c, "epochs") else c for c in stage)


def lacking(stage: Sequence[Any], data: Data) -> str:
    """Say which batches the stage needs that are not there; empty: none."""
    needs = {need for step in stage for need in plugins.technique_of(step).needs}
    absent = [n for n in ("calibration", "train") if n in needs and getattr(data, n) is None]
    return f"needs {' and '.join(absent)} batches; the data have none" if absent else ""
