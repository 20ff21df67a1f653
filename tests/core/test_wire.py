"""Messages between processes."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import TargetError
from tersor.core.wire import Message, receive, send


def sent(message: Message) -> io.BytesIO:
    stream = io.BytesIO()
    send(stream, message)
    stream.seek(0)
    return stream


@given(
    st.sampled_from(["float32", "float64", "int64", "uint8", "bool", "float16"]),
    st.lists(st.integers(0, 3), max_size=4),
)
def test_what_is_sent_arrives(dtype: str, shape: list[int]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    arrays = {"x": array, "transposed": array.T}
    got = receive(sent(Message(fields={"do": "run", "n": 3}, arrays=arrays)))
    assert got is not None
    assert got.fields == {"do": "run", "n": 3}
    for name, wanted in arrays.items():
        assert got.arrays[name].dtype == wanted.dtype
        assert got.arrays[name].shape == wanted.shape
        assert np.array_equal(got.arrays[name], wanted)


def test_the_end_of_a_stream_is_none() -> None:
    assert receive(io.BytesIO()) is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x01", "not a message"),
        (b"\xff" * 8, "not a message"),
        ((50).to_bytes(8, "little") + b"{}", "ends after 2 of 50 bytes"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        receive(io.BytesIO(data))


def test_objects_are_not_read() -> None:
    header = json.dumps({"arrays": [{"name": "x", "dtype": "|O", "shape": [1]}]}).encode()
    with pytest.raises(ValueError, match="arrays of objects are not read"):
        receive(io.BytesIO(len(header).to_bytes(8, "little") + header + b"\0" * 8))


def test_what_would_arrive_as_something_else_is_not_sent() -> None:
    stream = io.BytesIO()
    odd = np.zeros(2, [("half", "u2")])
    for array in (np.array(["a", None], object), odd):
        with pytest.raises(TargetError, match=r"array 'x' is of .*, which another process cannot"):
            send(stream, Message(fields={}, arrays={"y": np.ones(1), "x": array}))
    assert stream.getvalue() == b""
