"""Operators of TensorFlow that a network may not have; no TensorFlow is needed to tell."""

import pytest

from tersor.sources._keras_convert import _CALLS_OUT


@pytest.mark.parametrize(
    "operator",
    [
        "ReadFile",
        "WriteFile",
        "EagerPyFunc",
        "SaveV2",
        # with debug_urls, it writes what passes through to a file or an address
        "DebugIdentityV2",
        "DebugNanCount",
        # these read a file that an attribute names
        "ImmutableConst",
        "LoadAndRemapMatrix",
        "GenerateVocabRemapping",
        "DecodeProtoV2",
    ],
)
def test_what_reaches_outside_is_known(operator: str) -> None:
    assert _CALLS_OUT.fullmatch(operator)


@pytest.mark.parametrize(
    "operator", ["Conv2D", "MatMul", "StatefulPartitionedCall", "VarHandleOp", "Identity", "Const"]
)
def test_what_computes_passes(operator: str) -> None:
    assert not _CALLS_OUT.fullmatch(operator)
