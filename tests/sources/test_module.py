"""Networks from the user's code, with and without weights."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tersor.core.errors import ModelError
from tersor.sources.module import load

SCRIPT = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))

def net():
    torch.manual_seed(0)
    return Net().train()

def tied():
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    made[1].weight = made[0].weight
    return made

def broken():
    made = net()
    with torch.no_grad():
        made.head.weight[0, 0] = float("nan")
        made.body[0].bias[1] = float("inf")
    return made

def masked():
    made = net()
    made.register_buffer("mask", torch.triu(torch.full((5, 5), float("-inf")), 1))
    return made

def klass():
    return Net

def number():
    return 3
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "nets.py").write_text(SCRIPT)
    return lambda name: f"{tmp_path / 'nets.py'}:{name}"


@pytest.fixture
def weights(tmp_path, place):
    """Save the state of `net`, changed by a function, as a safetensors file."""
    state = {
        k: v + 1 if v.is_floating_point() else v
        for k, v in load(place("net")).net.state_dict().items()
    }

    def save(change=lambda state: state):
        file = tmp_path / "x.safetensors"
        save_file({k: v.contiguous() for k, v in change(dict(state)).items()}, file)
        return file

    save.state = state
    return save


def test_a_factory_is_called_and_the_network_is_in_eval_mode(place):
    model = load(place("net"))
    assert isinstance(model.net, nn.Module)
    assert not model.net.training
    assert (model.form, model.notes) == ("module", ())
    assert model.origin == f"module:{place('net')}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("number", "returned int, not an nn.Module"),
        ("klass", r"returned the class Net; return Net\(\)"),
        ("nett", r"has no factory 'nett'. Did you mean 'net'\?"),
        (
            "broken",
            "NaN or infinite values in 2 tensors: body.0.bias, head.weight; train or repair",
        ),
    ],
)
def test_what_a_factory_may_not_return(place, name, said):
    with pytest.raises(ModelError, match=said):
        load(place(name))


def test_a_mask_of_infinities_is_not_a_broken_weight(place):
    load(place("masked"))


def test_weights_are_loaded(place, weights):
    model = load(place("net"), weights=weights())
    for name, tensor in model.net.state_dict().items():
        torch.testing.assert_close(tensor, weights.state[name])
    assert model.notes == ()


def test_missing_batch_counters_are_fine(place, weights):
    file = weights(lambda s: {k: v for k, v in s.items() if "num_batches" not in k})
    assert load(place("net"), weights=file).notes == ()


def test_one_name_of_a_tied_tensor_is_enough(place, tmp_path):
    file = tmp_path / "tied.safetensors"
    whole = {k: v + 1 for k, v in load(place("tied")).net.state_dict().items()}
    save_file({k: v for k, v in whole.items() if k != "1.weight"}, file)
    net = load(place("tied"), weights=file).net
    torch.testing.assert_close(net[1].weight.data, whole["0.weight"])


def test_converted_numbers_are_said(place, weights):
    model = load(
        place("net"),
        weights=weights(
            lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}
        ),
    )
    assert model.notes == ("weights 'x.safetensors': 8 entries converted from float16 to float32",)


def test_what_does_not_fit_is_listed(place, weights):
    def change(state):
        state["head.weight"] = torch.zeros(10, 8)
        state["extra"] = torch.zeros(1)
        del state["body.0.bias"]
        return state

    with pytest.raises(ModelError) as caught:
        load(place("net"), weights=weights(change))
    said = str(caught.value)
    assert "do not fit Net: 1 missing: body.0.bias; 1 unexpected: extra; " in said
    assert "1 of another shape: head.weight (10x8 in the file, 3x8 in the network)" in said
    assert "--partial loads the 7 entries that fit" in said
    assert said.count("\n") <= 2


def test_long_lists_are_shortened(place, weights):
    with pytest.raises(ModelError, match=r"8 missing: .* and 4 more; 9 unexpected.* and 5 more"):
        load(
            place("net"), weights=weights(lambda s: {k.replace(".", "_"): v for k, v in s.items()})
        )


@pytest.mark.parametrize("prefix", ["module.", "model.net."])
def test_a_common_prefix_is_proposed_and_removed(place, weights, prefix):
    file = weights(lambda s: {prefix + k: v for k, v in s.items()})
    with pytest.raises(
        ModelError,
        match=f"likely (saved from DataParallel: )?with prefix '{prefix}' removed from its names "
        "all entries fit; --partial does that",
    ):
        load(place("net"), weights=file)
    model = load(place("net"), weights=file, partial=True)
    assert model.notes == (f"weights 'x.safetensors': prefix '{prefix}' removed from its names",)
    torch.testing.assert_close(model.net.head.weight.data, weights.state["head.weight"])


def test_a_missing_prefix_is_added(place, weights, tmp_path):
    (tmp_path / "outer.py").write_text(
        "import nets\nfrom torch import nn\ndef net():\n    return nn.ModuleDict({'model': nets.net()})\n"
    )
    outer = f"{tmp_path / 'outer.py'}:net"
    with pytest.raises(ModelError, match=r"likely with prefix 'model\.' added to its names"):
        load(outer, weights=weights())
    model = load(outer, weights=weights(), partial=True)
    torch.testing.assert_close(model.net["model"].head.weight.data, weights.state["head.weight"])


def test_a_moved_layer_is_proposed(place, weights):
    file = weights(lambda s: {k.replace("head.", "classifier.final."): v for k, v in s.items()})
    with pytest.raises(
        ModelError, match=r"likely renamed, 2 entries of the same shapes: classifier\.final -> head"
    ):
        load(place("net"), weights=file)


def test_partial_says_what_it_left_out(place, weights):
    def change(state):
        state["head.weight"] = torch.zeros(10, 8)
        del state["body.0.bias"]
        return state

    before = load(place("net")).net.state_dict()
    model = load(place("net"), weights=weights(change), partial=True)
    (note,) = model.notes
    assert "loaded partially, 7 entries; 2 keep the values of the network's code" in note
    assert "1 missing: body.0.bias" in note
    torch.testing.assert_close(model.net.head.weight.data, before["head.weight"])
    torch.testing.assert_close(model.net.head.bias.data, weights.state["head.bias"])


def test_partial_with_nothing_that_fits_is_an_error(place, weights):
    with pytest.raises(ModelError, match="nothing fits, even partially"):
        load(place("net"), weights=weights(lambda s: {"a": torch.zeros(77)}), partial=True)


def test_nan_in_the_weights_is_refused(place, weights):
    def change(state):
        state["head.bias"][1] = float("nan")
        return state

    with pytest.raises(ModelError, match=r"NaN or infinite values in 1 tensor: head\.bias"):
        load(place("net"), weights=weights(change))


def test_the_real_networks_load(shared):
    model = load(
        f"{shared / 'workloads' / 'cifar.py'}:ResNet8",
        weights=shared / "data" / "models" / "cifar10_jpeg_resnet8.safetensors",
    )
    assert sum(p.numel() for p in model.net.parameters()) == 78_186
    with pytest.raises(ModelError, match=r"do not fit ResNet8: .* unexpected"):
        load(
            f"{shared / 'workloads' / 'cifar.py'}:ResNet8",
            weights=shared / "data" / "models" / "cifar10_jpeg_resnet20.safetensors",
        )
