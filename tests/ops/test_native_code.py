"""Compiled files: the compiler that is taken, and the processors that are refused."""

from pathlib import Path
from typing import Any

import pytest

from tersor.core.errors import DependencyError, TargetError
from tersor.ops import native_code

HERE: dict[str, Any] = {
    "system": "Linux",
    "architecture": "x86_64",
    "cpu": "Small",
    "instructions": ["avx2", "fma"],
}


def proc(root: Path, text: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(text)
    return root


def test_instructions_are_those_of_the_first_core(tmp_path: Path) -> None:
    text = (
        "model name\t: Big\nflags\t\t: fpu avx2 avx512_vnni hypervisor sse4_2\n\n"
        "model name\t: Big\nflags\t\t: fpu\n"
    )
    found = native_code.processor(proc(tmp_path, text))
    assert found["cpu"] == "Big"
    assert found["instructions"] == ["avx2", "avx512_vnni", "sse4_2"]


def test_arm_calls_them_features(tmp_path: Path) -> None:
    found = native_code.processor(proc(tmp_path, "Features\t: fp asimd asimddp cpuid sve i8mm\n"))
    assert found["instructions"] == ["asimd", "asimddp", "i8mm", "sve"]


def test_this_processor_runs_its_own_code() -> None:
    here = native_code.processor()
    native_code.check_processor("a", here, here)


def test_more_instructions_than_needed_are_fine() -> None:
    native_code.check_processor("a", {**HERE, "instructions": ["fma"]}, HERE)


def test_missing_instructions_are_named() -> None:
    made_for = {**HERE, "cpu": "Big", "instructions": ["avx2", "avx512f", "amx_int8"]}
    with pytest.raises(
        TargetError,
        match=r"compiled\.pt2 was compiled for Big; this processor \(Small\) lacks its "
        "instructions amx_int8, avx512f; export the network again on this machine",
    ):
        native_code.check_processor("compiled.pt2", made_for, HERE)


@pytest.mark.parametrize(("word", "value"), [("system", "Darwin"), ("architecture", "aarch64")])
def test_another_kind_of_machine_is_refused(word: str, value: str) -> None:
    with pytest.raises(
        TargetError, match=f"was compiled for {value}, this machine is {HERE[word]}"
    ):
        native_code.check_processor("a", {**HERE, word: value}, HERE)


def test_without_instructions_the_model_must_be_the_same() -> None:
    unknown = {**HERE, "instructions": []}
    native_code.check_processor("a", unknown, unknown)
    with pytest.raises(TargetError, match="was compiled for Big, this processor is Small"):
        native_code.check_processor("a", {**unknown, "cpu": "Big"}, unknown)


def test_a_missing_compiler_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DependencyError, match=r"needs a C\+\+ compiler.* and there is none\. Install"
    ):
        native_code.cxx_compiler()
    monkeypatch.setenv("CXX", "missing++")
    with pytest.raises(DependencyError, match=r"CXX is 'missing\+\+', which is not there"):
        native_code.cxx_compiler()


def test_the_compiler_of_cxx_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine++"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o700)
    monkeypatch.setenv("CXX", str(mine))
    assert native_code.cxx_compiler() == str(mine)


def test_folders_are_blanked_in_place(tmp_path: Path) -> None:
    library, other = tmp_path / "a.so", tmp_path / "a.json"
    text = f"\x7fELF {tmp_path}/x.cpp".encode()
    library.write_bytes(text)
    other.write_bytes(text)
    native_code.blank_folders([library, other], str(tmp_path))
    blank = b"." * len(str(tmp_path).encode())
    assert library.read_bytes() == b"\x7fELF " + blank + b"/x.cpp"
    assert other.read_bytes() == text
