"""Faults 23, 31 and 32: data that are broken, dangerous or too large."""

import io
import os
import pickle
import resource
import time
import zipfile

import numpy as np
import pytest
import torch

from tersor.core.context import Data
from tersor.core.errors import DataError
from tersor.datasets import arrays
from tersor.datasets._check import check
from tersor.ops.splits import leaks
from tests.faults.jobs import fork, wait


def refuse(place, said: str) -> None:
    began = time.perf_counter()
    with pytest.raises(DataError) as caught:
        arrays.load(str(place))
    assert said in str(caught.value)
    assert str(caught.value).count("\n") <= 2
    assert caught.value.exit_code == 2
    assert time.perf_counter() - began < 5


def npy(shape, dtype="<f4", data=b"") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue() + data


def pack(file, **entries) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)


def test_23_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    file = tmp_path / "x.npz"
    block = bytes(1 << 20)
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("test_x.npy", "w") as stream,
    ):
        stream.write(npy((300 << 18,)))
        for _ in range(300):
            stream.write(block)
    assert file.stat().st_size < 4 << 20

    def work() -> None:
        resource.setrlimit(
            resource.RLIMIT_DATA,
            (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + (250 << 20),) * 2,
        )
        refuse(file, "a zip bomb")

    assert wait(fork(work)) == 0


def test_23_impossible_shapes_allocate_nothing(tmp_path):
    file = tmp_path / "x.npz"
    pack(file, test_x=npy((2**40,), data=b"\0" * 16))
    refuse(
        file,
        "has an array 'test_x' whose shape (1099511627776,) needs 4398046511104 bytes, but 16 bytes of data",
    )
    pack(file, test_x=npy((-4,), data=b"\0" * 16))
    with pytest.raises(DataError):
        arrays.load(str(file))


def test_23_objects_are_refused_and_run_nothing(tmp_path):
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch '{canary}'",)

    file = tmp_path / "x.npz"
    np.savez(file, test_x=np.array([Attack()], dtype=object))
    refuse(file, "has an array of Python objects, 'test_x', which could run code; store numbers")
    file.write_bytes(pickle.dumps(Attack()))
    refuse(file, "is a pickle, which can run code when it is loaded, and is not read")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("test_x.pkl", pickle.dumps(Attack()))
    refuse(file, "has an entry that is no array: 'test_x.pkl'")
    assert not canary.exists()


def test_23_damaged_files(tmp_path):
    file = tmp_path / "x.npz"
    refuse(file, "does not exist")
    file.write_bytes(b"")
    refuse(file, "is an empty file")
    file.write_bytes(b"<html>404")
    refuse(file, "looks like an HTML page")
    pack(file, test_x=b"garbage")
    refuse(file, "has a damaged array 'test_x'")
    np.savez(file, test_x=np.ones((50, 50)))
    whole = file.read_bytes()
    for part in range(64):
        file.write_bytes(whole[: len(whole) * part // 64])
        with pytest.raises(DataError):
            arrays.load(str(file))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(bytes(flipped))
    refuse(file, "is damaged")


def batch(n=4, **changes):
    return {"x": torch.ones(n, 2), "labels": torch.zeros(n, dtype=torch.long), **changes}


def late(bad):
    return [batch(), batch(), bad]


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ([], "split 'test' is empty"),
        (
            (b for b in [batch()]),
            "split 'test' is a generator, which can be read only once; give a list, or an object",
        ),
        (iter([batch()]), "split 'test' is a list_iterator, which can be read only once"),
        ([3], "batch 0 is int, not a mapping of forward's parameters (and labels) to tensors"),
        ([{"x": [1, 2]}], "batch 0: 'x' is list, not a tensor"),
        ([{"x": np.ones(3)}], "batch 0: 'x' is ndarray, not a tensor"),
        ([batch(labels=torch.zeros(3))], "batch 0: 4 samples but 3 labels"),
        ([batch(y=torch.ones(5))], "its inputs hold different numbers of samples: 'x' 4, 'y' 5"),
        ([{"labels": torch.zeros(3)}], "batch 0 has no inputs"),
        ([batch(0)], "batch 0: 'x' holds no samples"),
        ([batch(x=torch.full((4, 2), float("nan")))], "batch 0: 'x' has NaN or infinite values"),
        ([batch(x=torch.full((4, 2), float("inf")))], "batch 0: 'x' has NaN or infinite values"),
    ],
)
def test_31_first_batches_that_are_wrong(split, said):
    with pytest.raises(DataError) as caught:
        check(Data(test=split), "mine")
    assert said in str(caught.value)
    assert "data 'mine', split 'test'" in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (
            batch(x=torch.ones(4, 2).double()),
            "batch 2: 'x' is float64 of 2 dimensions, before it was float32 of 2",
        ),
        (batch(x=torch.ones(4, 2, 1)), "batch 2: 'x' is float32 of 3 dimensions"),
        ({"x": torch.ones(4, 2)}, "batch 2: 'labels' is missing"),
        (batch(z=torch.ones(4)), "batch 2: 'z' is not in the first batch"),
        (batch(x=torch.full((4, 2), float("nan"))), "batch 2: 'x' has NaN or infinite values"),
        (None, "batch 2 is NoneType, not a mapping"),
    ],
)
def test_31_later_batches_that_are_wrong(bad, said):
    data = check(Data(test=late(bad)), "mine")
    with pytest.raises(DataError) as caught:
        list(data.test)
    assert said in str(caught.value)


class Once:
    """Can be iterated again, but gives nothing the second time."""

    def __init__(self, batches):
        self.iterator = iter(batches)

    def __iter__(self):
        yield from self.iterator


class Failing:
    """Fails in its third batch."""

    def __iter__(self):
        yield from [batch(), batch()]
        raise OSError("the disk is gone")


def test_31_data_that_end_or_fail():
    with pytest.raises(
        DataError,
        match="gives nothing when it is read again; every pass must give the same batches",
    ):
        check(Data(test=Once([batch()])), "mine")
    data = check(Data(test=Failing()), "mine")
    with pytest.raises(
        DataError, match="split 'test', batch 2: reading it failed: OSError: the disk is gone"
    ):
        list(data.test)


def test_31_splits_that_do_not_fit_together():
    with pytest.raises(DataError, match="splits 'train' and 'test' differ: 'x' is missing"):
        check(Data(train=[batch()], test=[{"image": torch.ones(4, 2)}]), "mine")
    check(Data(calibration=[{"x": torch.ones(4, 2)}], test=[batch()]), "mine")


def test_31_streaming_holds_memory_flat():
    class Large:
        def __iter__(self):
            for _ in range(30):
                yield {"x": torch.ones(1, 4 << 20)}

    split = check(Data(test=Large()), "mine").test
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in split) == 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_32_the_same_samples_twice_are_warned_of():
    data = check(Data(calibration=[batch()], test=[batch()]), "mine")
    assert leaks(data) == [
        "the splits 'calibration' and 'test' hold the same samples: the figures will flatter"
    ]
    other = check(Data(calibration=[batch(x=torch.zeros(4, 2))], test=[batch()]), "mine")
    assert leaks(other) == []
