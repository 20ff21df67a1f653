import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tersor.core.errors import ArtifactError, ModelError
from tersor.core.model import Inputs
from tersor.ops import edits
from tersor.ops.capture import capture
from tests import networks


def same(a, b):
    x = networks.digits()[0][:7]
    with torch.no_grad():
        return torch.equal(a(x), b(x))


@pytest.mark.parametrize("make", [networks.tiny_cnn, networks.tiny_transformer])
def test_a_captured_network_is_built_from_nothing(make, tmp_path):
    net = make()
    captured = capture(net, networks.inputs())
    edits.store(captured, nn.Module(), tmp_path)
    assert same(edits.replay(tmp_path, None), net)


def test_a_smaller_layer_is_replayed_on_the_original(tmp_path):
    net = networks.tiny_cnn()
    cut = copy.deepcopy(net)
    cut.block2 = copy.deepcopy(net.block2)
    cut.block1.conv2 = nn.Identity()
    cut.block1.bn2 = nn.Identity()
    cut.fc = nn.Linear(16, 7)
    edits.store(cut, net, tmp_path)
    stored = json.loads((tmp_path / "network.json").read_text())
    assert sorted(stored["layers"]) == ["block1.bn2", "block1.conv2", "fc"]
    assert same(edits.replay(tmp_path, copy.deepcopy(net)), cut)


def test_a_foreign_class_is_refused(tmp_path):
    class Mine(nn.Linear):
        pass

    net = networks.tiny_cnn()
    cut = copy.deepcopy(net)
    cut.fc = Mine(16, 10)
    with pytest.raises(ModelError, match="layer 'fc' of class Mine cannot be stored"):
        edits.store(cut, net, tmp_path)


def damaged(tmp_path, change):
    net = networks.tiny_cnn()
    edits.store(capture(net, networks.inputs()), nn.Module(), tmp_path)
    plain = json.loads((tmp_path / "network.json").read_text())
    change(plain)
    (tmp_path / "network.json").write_text(json.dumps(plain))
    return tmp_path


@pytest.mark.parametrize(
    "target",
    [
        "torch:load",
        "os:system",
        "torch:hub",
        "operator:methodcaller",
        "functional:handle_torch_function.__globals__",
        "eval",
        "torch:from_file",
        "torch:compile",
    ],
)
def test_a_stored_graph_can_call_nothing_else(tmp_path, target):
    def change(plain):
        next(e for e in plain["graph"] if e["op"] == "call_function")["target"] = target

    with pytest.raises(ArtifactError, match="may not call"):
        edits.replay(damaged(tmp_path, change), None)


def test_a_stored_graph_can_read_no_other_attribute(tmp_path):
    def change(plain):
        entry = next(e for e in plain["graph"] if e["op"] == "call_function")
        entry.update(target="getattr", args={"tuple": [{"node": "x"}, "__class__"]}, kwargs={})

    with pytest.raises(ArtifactError, match="may not read the attribute"):
        edits.replay(damaged(tmp_path, change), None)


def test_an_unknown_layer_class_is_refused(tmp_path):
    def change(plain):
        plain["layers"]["fc"]["class"] = "Popen"

    with pytest.raises(ArtifactError, match="unknown class 'Popen'"):
        edits.replay(damaged(tmp_path, change), None)


def test_buffers_outside_the_state_dict_are_kept(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)

        def forward(self, x):
            return self.fc(x) * self.scale

    net = Scaled().eval()
    ways = Inputs(example={"x": torch.randn(2, 3)})
    edits.store(capture(net, ways), nn.Module(), tmp_path)
    assert "scale" in load_file(tmp_path / "weights.safetensors")
    x = torch.randn(4, 3)
    torch.testing.assert_close(edits.replay(tmp_path, None)(x), net(x))


def test_weights_are_what_is_replayed(tmp_path):
    net = networks.tiny_cnn()
    edits.store(net, net, tmp_path)
    tensors = load_file(tmp_path / "weights.safetensors")
    tensors["fc.bias"] += 1
    save_file(tensors, tmp_path / "weights.safetensors")
    again = edits.replay(tmp_path, copy.deepcopy(net))
    x = networks.digits()[0][:2]
    torch.testing.assert_close(again(x), net(x) + 1)
