"""AOTInductor: code for this processor, integers where the network has them, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import DependencyError, TargetError
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops import native_code
from tersor.ops.lower import lower
from tersor.quantization.dynamic import Dynamic, dynamic
from tersor.quantization.static import Static, static
from tersor.runtimes import torch_compile
from tests import networks

TARGET = Target(runtime="torch_compile", options={"threads": 1})
INPUTS = Inputs(example={"x": networks.split(0, 64)[0]["x"][:2]}, dynamic={"x": {0: "batch"}})
compiles = pytest.mark.skipif(
    not any(map(shutil.which, native_code.COMPILERS)), reason="needs a C++ compiler"
)


class Named(nn.Module):
    """Two inputs, one of whole numbers, and outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, words: Tensor, scale: Tensor) -> dict[str, Tensor]:
        made = self.table(words) * scale[:, None, None]
        return {"all": made, "mean": made.mean(1)}


@pytest.mark.slow
@compiles
def test_integer_networks_compute_in_integers(tmp_path: Path) -> None:
    net = networks.tiny_cnn()
    made = static(net, Static(), networks.context(net, tmp_path / "work")).eval()
    files = torch_compile.export(lower(made, "exported", INPUTS), tmp_path, INPUTS)
    about = json.loads(files[1].read_text())
    # the first convolution has one input channel, which Inductor's integer one reads wrongly
    assert about["in_integers"] == {"convolutions": 7, "linear": 1}
    x = networks.split(0, 64)[0]["x"][:7]  # of another size than the example
    runner = torch_compile.load(files[0], TARGET)
    found = runner.bind({"x": x.numpy()})()["output"]
    runner.close()
    with torch.no_grad():
        wanted = made(x=x).numpy()
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()  # roundings of ties
    data = files[0].read_bytes()
    for folder in (str(tmp_path), str(Path(torch.__file__).parent), "tersor-"):
        assert folder.encode() not in data


@pytest.mark.slow
@compiles
def test_inputs_go_by_name_and_outputs_keep_theirs(tmp_path: Path) -> None:
    net = Named().eval()
    inputs = Inputs(
        example={"words": torch.randint(0, 9, (2, 3)), "scale": torch.tensor([1.0, 2.0])},
        dynamic={"words": {0: "batch"}, "scale": {0: "batch"}},
    )
    files = torch_compile.export(lower(net, "exported", inputs), tmp_path, inputs)
    arrays = {"scale": np.float32([3, 1, 2]), "words": np.arange(9).reshape(3, 3)}
    made = torch_compile.load(files[0], TARGET).bind(arrays)()
    wanted = net(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    assert list(made) == ["all", "mean"]
    for name, array in made.items():
        np.testing.assert_allclose(array, wanted[name].detach().numpy(), rtol=1e-5)


def test_a_missing_compiler_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "missing++")
    program = lower(nn.Linear(2, 2), "exported", Inputs(example={"input": torch.ones(1, 2)}))
    with pytest.raises(DependencyError, match=r"torch_compile needs a C\+\+ compiler"):
        torch_compile.export(program, tmp_path, INPUTS)
    assert list(tmp_path.iterdir()) == []


def test_operators_of_tersor_are_named(tmp_path: Path) -> None:
    net = networks.tiny_transformer()
    made = dynamic(net, Dynamic(), networks.context(net, tmp_path / "work")).eval()
    program = lower(made, "exported", INPUTS)
    with pytest.raises(TargetError, match=r"compiled networks cannot call tersor\.\w+"):
        torch_compile.export(program, tmp_path, INPUTS)


def compiled(folder: Path, **changes: object) -> Path:
    """Write a file that is no package, with what lies beside one."""
    file = folder / "compiled.pt2"
    file.write_bytes(b"not a package")
    about = {"inputs": ["x"], "torch": torch.__version__, "processor": native_code.processor()}
    file.with_suffix(".json").write_text(json.dumps({**about, **changes}))
    return file


def test_code_for_another_processor_is_refused(tmp_path: Path) -> None:
    here = native_code.processor()
    more = {**here, "cpu": "Big", "instructions": [*here["instructions"], "avx1024"]}
    with pytest.raises(TargetError, match=r"compiled\.pt2 was compiled for Big.* avx1024"):
        torch_compile.load(compiled(tmp_path, processor=more), TARGET)


def test_code_for_another_torch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"was compiled for torch 2\.1\.0, this is"):
        torch_compile.load(compiled(tmp_path, torch="2.1.0"), TARGET)


def test_a_file_without_its_description_is_not_loaded(tmp_path: Path) -> None:
    file = compiled(tmp_path)
    for text in ("{}", "[]", "no", '{"inputs": 1, "torch": "2", "processor": {}}'):
        file.with_suffix(".json").write_text(text)
        with pytest.raises(TargetError, match=r"has no readable compiled\.json beside it"):
            torch_compile.load(file, TARGET)
    file.with_suffix(".json").unlink()
    with pytest.raises(TargetError, match=r"has no readable compiled\.json beside it"):
        torch_compile.load(file, TARGET)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"torch cannot load compiled\.pt2"):
        torch_compile.load(compiled(tmp_path), TARGET)


def test_bare_files_are_not_run() -> None:
    assert torch_compile.RUNTIME.suffixes == ()
    assert torch_compile.RUNTIME.inputs is None
