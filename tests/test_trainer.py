"""Training: schedule, seeds, resume to the bit, and what happens when it goes wrong."""

import copy
import math
import os
import re
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from tersor.core.errors import DataError, StepError, TargetError
from tersor.core.hardware import usable_cores
from tersor.trainer import choose_threads, fit
from tests import networks


def loss(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch["x"]), batch["labels"])


class Shuffled:
    """Batches that differ with `seed`, as a user's would."""

    def __init__(self, count: int = 320, seed: int = 7) -> None:
        self.count, self.seed, self.passes = count, seed, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return self.count // 64

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.passes.append(self.seed)
        images, labels = networks.digits()
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed))
        for rows in order.split(64):
            yield {"x": images[rows], "labels": labels[rows]}


class Plain(nn.Module):
    """With dropout, which draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.last = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.norm(self.hidden(x.flatten(1)))), 0.2, self.training)
        return self.last(y)


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain()


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return all(torch.equal(one[k], other[k]) for k in one)


def test_it_learns() -> None:
    net = networks.tiny_cnn(trained=False)
    before = copy.deepcopy(net.state_dict())
    found = fit(net, loss, batches=networks.split(0, 1200), epochs=3, lr=0.1, threads=1)
    assert found is net
    assert not any(m.training for m in net.modules())
    images, labels = networks.digits()
    accuracy = (net(images[1200:]).argmax(1) == labels[1200:]).float().mean()
    assert accuracy > 0.8
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in net.parameters())
    assert all(p.grad is None for p in net.parameters())
    assert not torch.equal(net.bn1.running_mean, before["bn1.running_mean"])


def test_a_seed_decides_everything() -> None:
    nets = [fit(plain(), loss, batches=Shuffled(), epochs=2, seed=s, threads=1) for s in (3, 3, 4)]
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


def test_the_outside_stays_as_it_was() -> None:
    net, threads, batches = plain(), torch.get_num_threads(), Shuffled()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fit(net, loss, batches=batches, epochs=2, seed=10, threads=1)
    assert torch.equal(torch.rand(3), wanted)
    assert torch.get_num_threads() == threads
    assert batches.passes == [10, 11]
    assert batches.seed == 7


@pytest.mark.parametrize(("epochs", "count"), [(0.4, 2), (1, 5), (1.5, 8), (0, 0)])
def test_parts_of_an_epoch(epochs: float, count: int) -> None:
    steps: list[int] = []
    net = plain()
    before = copy.deepcopy(net)
    fit(
        net,
        loss,
        batches=Shuffled(),
        epochs=epochs,
        on_step=lambda step, _: steps.append(step),
        threads=1,
    )
    assert steps == list(range(1, count + 1))
    assert same(net, before) is (count == 0)


def test_batches_without_a_length() -> None:
    class Stream:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter(networks.split(0, 192))

    steps: list[int] = []
    fit(
        plain(),
        loss,
        batches=Stream(),
        epochs=2,
        on_step=lambda step, _: steps.append(step),
        threads=1,
    )
    assert len(steps) == 6


def test_sgd_step_by_step() -> None:
    """Two steps against the update written out: Nesterov momentum, decay on matrices, the schedule."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    weight, bias = (p.detach().clone() for p in net.parameters())
    batches = [{"input": b["x"].double(), "labels": b["labels"]} for b in networks.split(0, 128)]

    def own(net: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch["input"]), batch["labels"])

    fit(net, own, batches=batches, epochs=1, lr=0.1, optimizer="sgd", threads=1)
    moments = [torch.zeros_like(weight), torch.zeros_like(bias)]
    values = [weight, bias]
    for step, batch in enumerate(batches):
        rate = 0.1 * min(step + 1, 0.5 * (1 + math.cos(math.pi * step / 2)))
        leaves = [v.clone().requires_grad_() for v in values]
        F.cross_entropy(F.linear(batch["input"].flatten(1), *leaves), batch["labels"]).backward()
        for i, leaf in enumerate(leaves):
            assert leaf.grad is not None
            assert leaf.grad.norm() < 3  # the clip at 5 has no say here
            grad = leaf.grad + (5e-4 * values[i] if i == 0 else 0)
            moments[i] = 0.9 * moments[i] + grad
            values[i] = values[i] - rate * (grad + 0.9 * moments[i])
    for p, value in zip(net.parameters(), values, strict=True):
        torch.testing.assert_close(p.detach(), value)


def test_frozen_parameters_and_own_groups() -> None:
    net = plain()
    net.hidden.weight.requires_grad_(False)
    before = copy.deepcopy(net)
    fit(net, loss, batches=Shuffled(), epochs=1, threads=1)
    assert torch.equal(net.hidden.weight, before.hidden.weight)
    assert not torch.equal(net.last.weight, before.last.weight)
    net, before = plain(), plain()
    groups = [{"params": [net.last.bias], "weight_decay": 0.0}]
    fit(net, loss, batches=Shuffled(), epochs=1, groups=groups, threads=1)
    assert torch.equal(net.last.weight, before.last.weight)
    assert not torch.equal(net.last.bias, before.last.bias)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [3, 5, 9])
def test_resumed_to_the_bit(optimizer: Any, stop: int, tmp_path: Path) -> None:
    """Stopped after any step, in the middle of an epoch, too, it ends with the same bytes."""
    whole = fit(plain(), loss, batches=Shuffled(), epochs=2, seed=1, threads=1, optimizer=optimizer)
    file = tmp_path / "deep" / "checkpoint.safetensors"

    def interrupt(step: int, _: int) -> None:
        if step == stop + 1:
            raise StoppedError

    run: dict[str, Any] = {
        "epochs": 2,
        "seed": 1,
        "threads": 1,
        "optimizer": optimizer,
        "checkpoint": file,
    }
    with pytest.raises(StoppedError):
        fit(plain(), loss, batches=Shuffled(), on_step=interrupt, checkpoint_every_s=0, **run)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    steps: list[int] = []
    resumed = fit(
        plain(), loss, batches=Shuffled(), on_step=lambda step, _: steps.append(step), **run
    )
    assert steps == list(range(stop + 1, 11))
    assert same(resumed, whole)
    steps.clear()
    assert same(
        fit(plain(), loss, batches=Shuffled(), on_step=lambda step, _: steps.append(step), **run),
        whole,
    )
    assert steps == []


def test_every_epoch_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"

    def interrupt(step: int, _: int) -> None:
        if step == 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        fit(
            plain(),
            loss,
            batches=Shuffled(),
            epochs=2,
            checkpoint=file,
            on_step=interrupt,
            threads=1,
        )
    steps: list[int] = []
    fit(
        plain(),
        loss,
        batches=Shuffled(),
        epochs=2,
        checkpoint=file,
        on_step=lambda step, _: steps.append(step),
        threads=1,
    )
    assert steps[0] == 6


def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    fit(plain(), loss, batches=Shuffled(), epochs=1, checkpoint=file, threads=1)
    other = plain()
    with torch.no_grad():
        other.last.bias[0] += 1
    for changes in ({"seed": 2}, {"epochs": 2}, {"lr": 0.01}):
        steps: list[int] = []
        run: dict[str, Any] = {"epochs": 1, **changes}
        fit(
            plain(),
            loss,
            batches=Shuffled(),
            checkpoint=file,
            on_step=lambda step, _, steps=steps: steps.append(step),
            threads=1,
            **run,
        )
        assert steps[0] == 1
    steps = []
    fit(
        other,
        loss,
        batches=Shuffled(),
        epochs=1,
        checkpoint=file,
        on_step=lambda step, _: steps.append(step),
        threads=1,
    )
    assert steps[0] == 1


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    fit(plain(), loss, batches=Shuffled(), epochs=1, checkpoint=file, threads=1)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        StepError,
        match=r"checkpoint 'checkpoint.safetensors' cannot be read \(.*\); delete it to start anew",
    ):
        fit(plain(), loss, batches=Shuffled(), epochs=1, checkpoint=file, threads=1)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_keeps_the_weights_before(where: str) -> None:
    def breaks(net: nn.Module, batch: Any) -> Tensor:
        breaks.count += 1  # type: ignore[attr-defined]
        value = loss(net, batch)
        if breaks.count < 3:  # type: ignore[attr-defined]
            return value
        return value * float("nan") if where == "loss" else value + (value - value).abs().sqrt()

    breaks.count = 0  # type: ignore[attr-defined]
    net = plain()
    kept: list[dict[str, Tensor]] = []
    with pytest.raises(
        StepError, match=f"the {where} is nan at training step 3; the weights from before"
    ):
        fit(
            net,
            breaks,
            batches=Shuffled(),
            epochs=1,
            threads=1,
            on_step=lambda *_: kept.append(
                {k: v.detach().clone() for k, v in net.named_parameters()}
            ),
        )
    assert len(kept) == 2
    assert all(torch.equal(v, kept[-1][k]) for k, v in net.named_parameters())
    assert not net.training


def test_bf16_is_near_fp32() -> None:
    nets = []
    for precision in ("fp32", "bf16"):
        net = networks.tiny_cnn()
        fit(net, loss, batches=networks.split(0, 640), epochs=1, precision=precision, threads=1)  # type: ignore[arg-type]
        nets.append(net)
    images = networks.digits()[0][:300]
    one, other = (net(images).argmax(1) for net in nets)
    # eight bits of mantissa: most answers, not all
    assert (one == other).float().mean() > 0.9
    assert not same(*nets)


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="there are no batches to train on"):
        fit(plain(), loss, batches=[], epochs=1)
    with pytest.raises(StepError, match="epochs must not be negative, got -1"):
        fit(plain(), loss, batches=Shuffled(), epochs=-1)


def test_progress() -> None:
    seen: list[Any] = []

    def display(items: Any, what: str, total: int | None = None) -> Any:
        seen.append((what, total))
        return items

    fit(plain(), loss, batches=Shuffled(), epochs=1, display=display, threads=1)
    ((what, total),) = seen
    assert total == 5
    assert re.fullmatch(r"training, loss \d\.\d+", what())


def test_threads_are_measured_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    net = networks.tiny_cnn()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(net, networks.split(0, 64)) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = usable_cores()
    assert choose_threads(net, networks.split(0, 64)) in {1, max(1, cores // 2), cores}
    assert not net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_the_average_written_out() -> None:
    """Three steps: the result is the running average of the weights, not the last ones."""
    last, decay = plain(), 0.3
    seen: list[dict[str, Tensor]] = []
    before = {k: v.detach().clone() for k, v in last.named_parameters()}
    batches = Shuffled(192)
    run: dict[str, Any] = {"batches": batches, "epochs": 1, "threads": 1}
    fit(
        last,
        loss,
        on_step=lambda *_: seen.append({k: v.detach().clone() for k, v in last.named_parameters()}),
        **run,
    )
    averaged = fit(plain(), loss, ema=decay, **run)
    for name, parameter in averaged.named_parameters():
        wanted = before[name].double()
        for step, weights in enumerate(seen, 1):
            share = min(decay, (1 + step) / (10 + step))
            wanted = share * wanted + (1 - share) * weights[name].double()
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-5, atol=1e-6)
    assert not same(averaged, last)
    assert averaged.norm.num_batches_tracked == 3


def test_the_average_fills_no_zeros() -> None:
    """Weights that are pruned in the middle of a training are zero in the average, too."""
    net = plain()

    def prune(*_: int) -> None:
        with torch.no_grad():
            net.hidden.weight[:, :8] = 0

    fit(net, loss, batches=Shuffled(), epochs=1, ema=0.9, on_step=prune, threads=1)
    assert not net.hidden.weight[:, :8].any()
    assert net.hidden.weight[:, 8:].all()


class Smooth(nn.Module):
    """Without batch norm and dropout: a batch in parts is the same as the whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.hidden(x.flatten(1))))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulated_parts_are_the_whole_batch(optimizer: Any) -> None:
    """Also when the last part is smaller, and when the passes do not divide evenly."""
    parts, whole = networks.split(0, 150, 20), networks.split(0, 150, 60)
    steps: list[int] = []
    nets = [
        fit(
            Smooth(),
            loss,
            batches=batches,
            epochs=1,
            accumulate=count,
            threads=1,
            optimizer=optimizer,
            on_step=lambda step, total: steps.append(total),
        )
        for batches, count in ((parts, 3), (whole, 1))
    ]
    assert steps == [3] * 6
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stop", [1, 4])
def test_average_scale_and_accumulation_are_resumed_to_the_bit(
    precision: Any, stop: int, tmp_path: Path
) -> None:
    run: dict[str, Any] = {
        "batches": Shuffled(),
        "epochs": 2.2,
        "threads": 1,
        "ema": 0.8,
        "accumulate": 2,
        "precision": precision,
    }
    whole = fit(plain(), loss, **run)
    file = tmp_path / "checkpoint.safetensors"

    def interrupt(step: int, _: int) -> None:
        if step == stop + 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        fit(plain(), loss, checkpoint=file, on_step=interrupt, checkpoint_every_s=0, **run)
    steps: list[int] = []
    resumed = fit(plain(), loss, checkpoint=file, on_step=lambda s, _: steps.append(s), **run)
    assert steps == list(range(stop + 1, 7))
    assert same(resumed, whole)


def test_a_loss_is_scaled_in_fp16_and_steps_that_overflow_are_skipped() -> None:
    """The first scale, 65536, is too large for gradients of this size; it falls until it fits."""

    def large(net: nn.Module, batch: Any) -> Tensor:
        return 100 * loss(net, batch)

    net, seen = Smooth(), []
    before = copy.deepcopy(net)
    fit(
        net,
        large,
        batches=Shuffled(640),
        epochs=1,
        precision="fp16",
        threads=1,
        on_step=lambda *_: seen.append(same(net, before)),
    )
    assert seen[0]
    assert not seen[-1]
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_what_overflows_at_every_scale_is_not_finite() -> None:
    def breaks(net: nn.Module, batch: Any) -> Tensor:
        value = loss(net, batch)
        return value + (value - value).abs().sqrt()

    with pytest.raises(StepError, match="the gradient is nan at training step 17; the weights"):
        fit(plain(), breaks, batches=Shuffled(1280), epochs=1, precision="fp16", threads=1)


def test_clip_warm_up_and_decay_reach_the_optimizer() -> None:
    batches = networks.split(0, 64)
    moved = {}
    for name, changes in {
        "plain": {},
        "clip": {"clip": 1e-3},
        "decay": {"decay": 0.0},
        "warm_up": {"warm_up": 1.0},
    }.items():
        net = Smooth()
        before = net.hidden.weight.detach().clone()
        fit(net, loss, batches=batches, epochs=4, optimizer="sgd", threads=1, **changes)  # type: ignore[arg-type]
        moved[name] = (net.hidden.weight.detach() - before).norm().item()
    assert moved["clip"] < 0.1 * moved["plain"]
    assert moved["warm_up"] < moved["plain"]
    assert moved["decay"] != moved["plain"]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """The kernel refuses to write past a limit, as a full disk does; no part of ours is replaced."""
    file = tmp_path / "checkpoint.safetensors"
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, _: int) -> None:
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, usual[1]))

    run: dict[str, Any] = {"batches": Shuffled(), "epochs": 1, "threads": 1, "checkpoint": file}
    try:
        with pytest.raises(
            StepError,
            match=r"the checkpoint of step 3 \(0.0 MB\) cannot be written to "
            r"'checkpoint.safetensors': File too large; the one of step 2 stays. Make room, then",
        ):
            fit(plain(), loss, on_step=fill, checkpoint_every_s=0, **run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    steps: list[int] = []
    resumed = fit(plain(), loss, on_step=lambda s, _: steps.append(s), **run)
    assert steps == [3, 4, 5]
    del run["checkpoint"]
    assert same(resumed, fit(plain(), loss, **run))


def test_a_full_disk_before_the_first_checkpoint(tmp_path: Path) -> None:
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, usual[1]))
    try:
        with pytest.raises(StepError, match="File too large; there is none before it"):
            fit(plain(), loss, batches=Shuffled(), epochs=1, checkpoint=tmp_path / "c", threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    count = 0

    def breaks(net: nn.Module, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        return loss(net, batch) * (float("inf") if count == 4 else 1)

    file = tmp_path / "checkpoint.safetensors"
    run: dict[str, Any] = {"batches": Shuffled(), "epochs": 1, "threads": 1, "checkpoint": file}
    with pytest.raises(StepError, match="the loss is inf at training step 4"):
        fit(plain(), breaks, checkpoint_every_s=0, **run)
    steps: list[int] = []
    fit(plain(), loss, on_step=lambda s, _: steps.append(s), **run)
    assert steps == [4, 5]


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(TargetError, match="training on 'cuda' was asked for, but PyTorch sees no"):
        fit(plain(), loss, batches=Shuffled(), epochs=1, device="cuda")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"decay": -1.0}, "decay must not be negative, got -1.0"),
        ({"warm_up": 2.0}, r"warm_up must be in \[0, 1\], got 2.0"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(plain(), loss, batches=Shuffled(), epochs=1, **settings)


# --- several processes ----------------------------------------------------------------------------


def together(rank: int, count: int, folder: str) -> None:
    """What each of the spawned processes does: torchrun's environment, and a training."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    torch.set_num_threads(1)
    place = Path(folder)
    run: dict[str, Any] = {"batches": networks.split(0, 333), "epochs": 2, "threads": 1}
    run |= {"checkpoint": place / "checkpoint.safetensors", "ema": 0.5, "accumulate": 2}
    net = fit(Smooth(), loss, **run)
    torch.save(net.state_dict(), place / f"{rank}.pt")
    other = Smooth() if rank else plain()
    try:
        fit(other, loss, batches=networks.split(0, 64), epochs=1, threads=1)
    except StepError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Rows are shared out, gradients added: the same steps as of whole batches, to rounding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(together, (2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    alone = fit(
        Smooth(), loss, batches=networks.split(0, 333), epochs=2, threads=1, ema=0.5, accumulate=2
    )
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, wanted in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], wanted, rtol=1e-4, atol=1e-6)
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        assert {"random.0", "random.1"} <= set(file.keys())
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.txt").read_text() == (
            "process 1 of 2 has a network, settings or a checkpoint other than process 0; all must "
            "be given the same network, batches, settings and checkpoint"
        )
