"""ONNX's LSTM and GRU in TensorFlow, step by step through time.

T: time, B: batch, H: hidden, D: directions.

Source: the operator specifications LSTM-14 and GRU-14 of ONNX; without lengths, peepholes, clipping
and other activations, which are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tersor.core.errors import TargetError

_DEFAULTS: Mapping[str, Sequence[Any]] = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
}


def lstm(values: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Return all hidden states, the last one, and the last cell."""
    _check("LSTM", values, attributes, given=(0, 1, 2, 3, 5, 6))
    hidden = attributes["hidden_size"]

    def direction(d: int, x_TBI: Any) -> list[Any]:
        weight, recurrent = tf.transpose(values[1][d]), tf.transpose(values[2][d])
        gates = tf.matmul(x_TBI, weight)
        if (bias := _input(values, 3)) is not None:
            gates = gates + bias[d][: 4 * hidden] + bias[d][4 * hidden :]

        def step(state: Any, gate_B4H: Any) -> Any:
            h, c = state
            i, o, f, new = tf.split(gate_B4H + tf.matmul(h, recurrent), 4, -1)
            c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(new)
            return tf.sigmoid(o) * tf.tanh(c), c

        first = [_start(values, place, d, x_TBI, hidden) for place in (5, 6)]
        return list(tf.scan(step, gates, tuple(first)))

    return _both(direction, values[0], attributes)


def gru(values: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Return all hidden states, and the last one."""
    _check("GRU", values, attributes, given=(0, 1, 2, 3, 5))
    hidden = attributes["hidden_size"]
    reset_after = bool(attributes.get("linear_before_reset", 0))

    def direction(d: int, x_TBI: Any) -> list[Any]:
        weight, recurrent = tf.transpose(values[1][d]), tf.transpose(values[2][d])
        gates, bias = tf.matmul(x_TBI, weight), _input(values, 3)
        inner = tf.zeros([3 * hidden], gates.dtype)
        if bias is not None:
            gates, inner = gates + bias[d][: 3 * hidden], tf.constant(bias[d][3 * hidden :])

        def step(h: Any, gate_B3H: Any) -> Any:
            z_in, r_in, new_in = tf.split(gate_B3H, 3, -1)
            z_own, r_own, new_own = tf.split(tf.matmul(h, recurrent) + inner, 3, -1)
            z, r = tf.sigmoid(z_in + z_own), tf.sigmoid(r_in + r_own)
            if not reset_after:
                new_own = tf.matmul(r * h, recurrent[:, 2 * hidden :]) + inner[2 * hidden :]
                return (1 - z) * tf.tanh(new_in + new_own) + z * h
            return (1 - z) * tf.tanh(new_in + r * new_own) + z * h

        return [tf.scan(step, gates, _start(values, 5, d, x_TBI, hidden))]

    return _both(direction, values[0], attributes)


def _both(
    direction: Callable[[int, Any], list[Any]], x_TBI: Any, attributes: Mapping[str, Any]
) -> list[Any]:
    """Run the directions; return states as (T, D, B, H), and the last of each as (D, B, H)."""
    word = attributes.get("direction", "forward")
    backwards = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[word]
    states, lasts = [], []
    for d, back in enumerate(backwards):
        made = direction(d, tf.reverse(x_TBI, [0]) if back else x_TBI)
        lasts.append([state[-1] for state in made])
        states.append(tf.reverse(made[0], [0]) if back else made[0])
    return [tf.stack(states, 1), *(tf.stack(each, 0) for each in zip(*lasts, strict=True))]


def _input(values: Sequence[Any], place: int) -> Any:
    return values[place] if len(values) > place else None


def _start(values: Sequence[Any], place: int, d: int, x_TBI: Any, hidden: int) -> Any:
    given = _input(values, place)
    if given is not None:
        return given[d]
    return tf.zeros([tf.shape(x_TBI)[1], hidden], x_TBI.dtype)


def _check(
    word: str, values: Sequence[Any], attributes: Mapping[str, Any], given: Sequence[int]
) -> None:
    names = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
    for place in range(len(values)):
        if values[place] is not None and place not in given:
            raise TargetError(f"input {names[place]}")
    for name in ("clip", "layout", "input_forget"):
        if attributes.get(name):
            raise TargetError(f"attribute {name}")
    activations = [
        x.decode() if isinstance(x, bytes) else x for x in attributes.get("activations", [])
    ]
    usual = list(_DEFAULTS[word])
    if activations and activations not in (usual, usual * 2):
        raise TargetError(f"activations {', '.join(activations)}")
