"""Exported programs: inputs by name, and every way in which a .pt2 file could run code."""

import io
import json
import os
import zipfile

import pytest
import torch
from torch import nn

from tersor.core.errors import ModelError
from tersor.ops.expressions import unsafe_guard, unsafe_size
from tersor.sources import exported
from tests.sources import programs

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    file = tmp_path_factory.mktemp("program") / "x.pt2"
    programs.save(file)
    return file


class Attack:
    """Unpickling it makes a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def pickled(canary) -> bytes:
    made = io.BytesIO()
    torch.save(Attack(canary), made)
    return made.getvalue()


def test_a_program_is_read_with_its_inputs(program):
    model = exported.load(str(program))
    assert model.form == "exported"
    assert {name: tuple(t.shape) for name, t in model.inputs.example.items()} == {
        "x": (3, 2),
        "y": (3, 4),
    }
    assert model.inputs.dynamic == {"x": {0: "batch"}, "y": {0: "batch"}}
    assert model.net.module()(**{k: v[:2] for k, v in model.inputs.example.items()}).shape == (2, 4)


@pytest.mark.parametrize("rows", [1, 3])
def test_positional_inputs_are_named_and_a_batch_of_one_doubled(tmp_path, rows):
    net = programs.save(tmp_path / "x.pt2", named=False, rows=max(rows, 2))
    model = exported.load(str(tmp_path / "x.pt2"))
    x, y = torch.randn(5, 2), torch.randn(5, 4)
    torch.testing.assert_close(model.net.module()(y=y, x=x), net(x, y))
    assert len(model.inputs.example["x"]) >= 2


def test_a_named_program_lowers_to_onnx(program, tmp_path):
    pytest.importorskip("onnxscript")
    from tersor.ops.lower import lower

    model = exported.load(str(program))
    assert {i.name for i in lower(model.net, "onnx", model.inputs).graph.input} == {"x", "y"}


def test_real_networks_pass_the_check(tmp_path, workload):
    """Attention, embeddings and masks: the check must not refuse honest programs."""
    from torch.export import Dim

    from tersor.ops.lower import plain_attention

    sentiment = workload("sentiment")
    batch = next(iter(sentiment.data()["test"]))
    example = {k: v[:4] for k, v in batch.items() if k != "labels"}
    dim = Dim("batch", min=1, max=1024)
    with plain_attention():
        made = torch.export.export(
            sentiment.transformer(),
            (),
            kwargs=example,
            dynamic_shapes={k: {0: dim} for k in example},
        )
    torch.export.save(made, tmp_path / "x.pt2")
    assert set(exported.load(str(tmp_path / "x.pt2")).inputs.example) == {"tokens", "mask"}


def _refused(program, tmp_path, change, said):
    file = programs.alter(program, tmp_path / "evil.pt2", change)
    with pytest.raises(ModelError) as caught:
        exported.load(str(file))
    assert said in str(caught.value)
    assert str(caught.value).count("\n") <= 2


def test_an_unaltered_copy_is_read(program, tmp_path):
    exported.load(str(programs.alter(program, tmp_path / "copy.pt2", lambda entries: entries)))


def test_a_pickled_weight_is_refused_and_runs_nothing(program, tmp_path):
    canary = tmp_path / "canary"

    def change(entries):
        raw = json.loads(entries[WEIGHTS])
        raw["config"]["fc.weight"]["use_pickle"] = True
        return {
            **entries,
            WEIGHTS: json.dumps(raw).encode(),
            "data/weights/weight_0": pickled(canary),
        }

    _refused(program, tmp_path, change, "marks the payload of 'fc.weight' as a pickle")
    assert not canary.exists()


def test_example_inputs_that_run_code_are_refused(program, tmp_path):
    """torch falls back to the unsafe unpickler for these."""
    canary = tmp_path / "canary"
    _refused(
        program,
        tmp_path,
        lambda e: {**e, SAMPLES: pickled(canary)},
        "example inputs that are more than tensors",
    )
    assert not canary.exists()


@pytest.mark.parametrize("prefix", ["custom_obj_0", "opaque_obj_0"])
def test_pickled_objects_among_the_constants_are_refused(program, tmp_path, prefix):
    canary = tmp_path / "canary"

    def change(entries):
        raw = json.loads(entries[CONSTANTS])
        raw["config"]["thing"] = {
            "path_name": prefix,
            "is_param": False,
            "use_pickle": False,
            "tensor_meta": None,
        }
        return {
            **entries,
            CONSTANTS: json.dumps(raw).encode(),
            f"data/constants/{prefix}": pickled(canary),
        }

    _refused(program, tmp_path, change, f"stores 'thing' as '{prefix}', which is not plain numbers")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["data/weights/model.pt", "data/constants/model.pt"])
def test_pickled_weights_of_old_archives_are_refused(program, tmp_path, name):
    canary = tmp_path / "canary"
    _refused(program, tmp_path, lambda e: {**e, name: pickled(canary)}, "holds pickled weights")
    assert not canary.exists()


def test_a_size_that_is_a_program_is_refused(program, tmp_path):
    """torch gives sizes to sympify, which evaluates them as Python."""
    canary = tmp_path / "canary"
    attack = f"__import__('os').system('touch {canary}')"

    def change(entries):
        text = entries[MODEL].decode()
        assert "Symbol(" in text
        start = text.index('"expr_str": "') + len('"expr_str": "')
        return {**entries, MODEL: (text[:start] + attack + text[text.index('"', start) :]).encode()}

    _refused(program, tmp_path, change, "has a size that is not arithmetic")
    assert not canary.exists()


def test_torch_alone_would_run_it(program, tmp_path):
    """Why the check exists: the day that this fails, torch has become safer."""
    canary = tmp_path / "canary"

    def change(entries):
        text = entries[MODEL].decode()
        start = text.index('"expr_str": "') + len('"expr_str": "')
        attack = f"__import__('os').system('touch {canary}')"
        return {**entries, MODEL: (text[:start] + attack + text[text.index('"', start) :]).encode()}

    file = programs.alter(program, tmp_path / "evil.pt2", change)
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            torch.export.load(str(file))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert canary.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: m.update(guards_code=["__import__('os').system('true')"]),
            "has a guard that is not arithmetic",
        ),
        (
            lambda m: m["graph_module"]["graph"]["nodes"][0].update(target="torch.os.system"),
            "calls 'torch.os.system', which is not an operator",
        ),
        (
            lambda m: m["graph_module"]["graph"]["nodes"][0].update(target="torch.hub.load"),
            "is not an operator on tensors",
        ),
        (
            lambda m: m["graph_module"]["graph"]["nodes"][0].update(
                target="torch.ops.aten.from_file.default"
            ),
            "which opens files",
        ),
        (
            lambda m: m["graph_module"]["graph"]["nodes"][0].update(
                target="torch.ops.aten.no_such_op.default"
            ),
            "which is not installed here",
        ),
        (
            lambda m: m["graph_module"]["graph"]["nodes"][0].update(
                target="torch.ops.other.op.default"
            ),
            "is not an operator on tensors",
        ),
        (
            lambda m: m["graph_module"]["graph"]["nodes"][0].update(
                target="_operator.methodcaller"
            ),
            "is not an operator on tensors",
        ),
        (
            lambda m: m["graph_module"]["graph"]["nodes"][0]["outputs"][0]["as_tensor"].update(
                name="x\nimport os"
            ),
            "unusual name",
        ),
        (
            lambda m: m["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
                parameter_name="a b"
            ),
            "a layer with the unusual name 'a b'",
        ),
        (
            lambda m: m["graph_module"]["graph"].update(
                custom_obj_values={"a": {"name": "a", "class_fqn": "x.Y"}}
            ),
            "neither tensor nor number",
        ),
        (
            lambda m: m["graph_module"]["module_call_graph"][0]["signature"].update(
                in_spec='[1, {"type": "collections.defaultdict", "context": {"default_factory_module": "os", "default_factory_name": "system", "dict_context": []}, "children_spec": []}]'
            ),
            "takes or returns 'collections.defaultdict'",
        ),
        (
            lambda m: m["graph_module"]["module_call_graph"][0]["signature"].update(
                in_spec='[1, {"type": "builtins.dict", "context": "[{\\"__enum__\\": true, \\"fqn\\": \\"os:x\\"}]", "children_spec": []}]'
            ),
            "keys that are not text",
        ),
    ],
)
def test_programs_that_could_run_code(program, tmp_path, change, said):
    _refused(program, tmp_path, programs.alter_json(MODEL, change), said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            lambda c: c["config"]["fc.weight"].update(path_name="../../x"),
            "which is not plain numbers",
        ),
        (
            lambda c: c["config"]["fc.weight"].update(path_name="weight_99"),
            "lacks the payload 'weight_99'",
        ),
        (
            lambda c: c["config"]["fc.weight"]["tensor_meta"].update(sizes=[{"as_int": 2**50}]),
            "impossible size",
        ),
        (
            lambda c: c["config"]["fc.weight"]["tensor_meta"].update(sizes=[{"as_int": -1}]),
            "impossible size",
        ),
        (lambda c: c["config"]["fc.weight"].update(tensor_meta=None), "a payload without a size"),
        (lambda c: c.update(config=[]), "a damaged list of payloads"),
    ],
)
def test_payloads_that_are_not_what_they_should_be(program, tmp_path, config, said):
    _refused(program, tmp_path, programs.alter_json(WEIGHTS, config), said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: {**e, "data/aotinductor/model/x.so": b"\x7fELF"}, "holds compiled code"),
        (lambda e: {**e, "models/other.json": b"{}"}, "not one called 'model'"),
        (lambda e: {k: v for k, v in e.items() if k != SAMPLES}, f"lacks '{SAMPLES}'"),
        (lambda e: {**e, MODEL: b"{"}, f"has a damaged entry '{MODEL}'"),
        (lambda e: {**e, MODEL: b"[" * 100_000}, f"has a damaged entry '{MODEL}'"),
        (lambda e: {**e, "../../x": b"1"}, "has an entry that leads outside"),
        (
            lambda e: {k: v for k, v in e.items() if k != "archive_format"},
            "is a zip archive, but no exported program",
        ),
    ],
)
def test_archives_that_are_not_exported_programs(program, tmp_path, change, said):
    _refused(program, tmp_path, change, said)


def test_torchscript_and_checkpoints_are_refused(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "x.pt2").write_bytes(pickled(canary))
    with pytest.raises(
        ModelError, match="TorchScript archive or a pickled checkpoint, which can run code; refused"
    ):
        exported.load(str(tmp_path / "x.pt2"))
    assert not canary.exists()


def test_two_entries_of_one_name_are_refused(program, tmp_path):
    """Zip readers differ in which of the two they take."""
    file = tmp_path / "x.pt2"
    file.write_bytes(program.read_bytes())
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr(next(n for n in archive.namelist() if n.endswith(MODEL)), b"{}")
    with pytest.raises(ModelError, match="has two entries called"):
        exported.load(str(file))


def test_every_cut_is_refused(program, tmp_path):
    data = program.read_bytes()
    for part in range(64):
        (tmp_path / "cut.pt2").write_bytes(data[: len(data) * part // 64])
        with pytest.raises(ModelError):
            exported.load(str(tmp_path / "cut.pt2"))


def test_weights_beside_a_program_are_refused(program, tmp_path):
    with pytest.raises(ModelError, match="holds its own weights; leave --weights out"):
        exported.load(str(program), weights=tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="does not exist"):
        exported.load(str(tmp_path / "none.pt2"))


def test_nested_inputs_are_refused(tmp_path):
    class Nested(nn.Module):
        def forward(self, x):
            return x["a"] + x["b"]

    made = torch.export.export(Nested(), ({"a": torch.ones(2), "b": torch.ones(2)},))
    torch.export.save(made, tmp_path / "x.pt2")
    with pytest.raises(ModelError, match="takes lists or dicts of tensors"):
        exported.load(str(tmp_path / "x.pt2"))


def test_nan_weights_are_refused(tmp_path):
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, float("nan"))
    torch.export.save(torch.export.export(net, (torch.ones(2, 2),)), tmp_path / "x.pt2")
    with pytest.raises(ModelError, match="NaN or infinite values in 1 tensor: weight"):
        exported.load(str(tmp_path / "x.pt2"))


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(64), Symbol('s31', positive=True, integer=True))",
        "Max(Integer(1), TruncToInt(Mul(Float('0.5', precision=53), ToFloat(Symbol('s0', positive=True, integer=True)))))",
        "Add(Pow(Symbol('s0'), Integer(2)), Integer(-1))",
        "s0*4 + 1",
        "s0**2",
    ],
)
def test_sizes_that_are_arithmetic(text):
    assert unsafe_size(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "s0.__class__",
        "Symbol.__class__",
        "exec('1')",
        "[x for x in ()]",
        "(lambda: 1)()",
        "open('x')",
        "9**9**9",
        "Pow(9, 999999)",
        "Symbol('s0); import os')",
        "s0 if 1 else 2",
        "f'{s0}'",
        "s0 := 3",
        "getattr(s0, 'x')",
        "(" * 5000,
        "x" * 30_000,
    ],
)
def test_sizes_that_are_not(text):
    assert unsafe_size(text)


def test_guards():
    good = "(L['x'].size()[2] // 3) <= math.trunc(0.5*torch.sym_float(L['x'].size()[2]))"
    assert unsafe_guard(good) == ""
    for bad in (
        "torch.load('x')",
        "L['x'].__class__",
        "math.os",
        "L[__import__('os')]",
        "print(1)",
        "torch.os.system('x')",
    ):
        assert unsafe_guard(bad)
