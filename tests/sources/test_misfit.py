"""Weights that do not fit: what is said of real mistakes, by names and shapes alone and on networks."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tersor.core.errors import ModelError
from tersor.sources._misfit import compare, explain
from tersor.sources._weights import load_weights


class Block(nn.Module):
    def __init__(self, inputs, outputs, conv="conv", norm="bn"):
        super().__init__()
        for i, size in ((1, inputs), (2, outputs)):
            self.add_module(f"{conv}{i}", nn.Conv2d(size, outputs, 3, padding=1, bias=False))
            self.add_module(f"{norm}{i}", nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A network like torchvision's: stem, numbered blocks in numbered stages, head."""

    def __init__(self, width=8, depth=2, classes=10, head="fc"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for i, size in ((1, width), (2, 2 * width)):
            blocks = [Block(width if i == 1 else size // 2, size)]
            blocks += [Block(size, size) for _ in range(depth - 1)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        if head:
            self.add_module(head, nn.Linear(2 * width, classes))


class Flat(nn.Module):
    """The same layers in one list, under names of one's own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList(
            Block(a, b, "convolution_", "norm_") for a, b in ((8, 8), (8, 8), (8, 16), (16, 16))
        )
        self.classifier = nn.Linear(16, 10)


class Attention(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 18 if name == "qkv" else 6))


class Encoder(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attention": Attention(*names), "norm": nn.LayerNorm(6)})
            for _ in range(3)
        )
        self.head = nn.Linear(6, 2)


def told(net, state, tmp_path):
    """Return what a refusal adds to its lists."""
    file = tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    with pytest.raises(ModelError) as caught:
        load_weights(net, file, partial=False)
    said = str(caught.value)
    assert said.count("\n") <= 2
    assert f"do not fit {type(net).__name__}: " in said.splitlines()[0]
    return "\n".join(said.splitlines()[1:])


def prefixed(prefix, state, but="?"):
    return {k if k.startswith(but) else prefix + k: v for k, v in state.items()}


CASES = [
    pytest.param(
        Residual(),
        prefixed("module.", Residual().state_dict()),
        "likely saved from DataParallel: with prefix 'module.' removed from its names all entries "
        "fit; --partial does that",
        id="DataParallel",
    ),
    pytest.param(
        Residual(),
        prefixed("_orig_mod.", Residual().state_dict()),
        "likely saved from torch.compile: with prefix '_orig_mod.' removed from its names all "
        "entries fit; --partial does that",
        id="compiled",
    ),
    pytest.param(
        Residual(),
        prefixed("backbone.", Residual().state_dict(), but="fc"),
        "likely with prefix 'backbone.' removed from its names all entries fit; --partial does that",
        id="backbone",
    ),
    pytest.param(
        Residual(classes=100),
        prefixed("model.", Residual().state_dict()),
        "likely with prefix 'model.' removed from its names 54 of 56 entries fit; only the head "
        "'fc' differs: 10 outputs in the file, 100 in the network\n"
        "--partial loads the 54 entries that fit then",
        id="prefix and head",
    ),
    pytest.param(
        Residual(classes=100),
        Residual().state_dict(),
        "likely only the head 'fc' differs: 10 outputs in the file, 100 in the network\n"
        "--partial loads the 54 entries that fit",
        id="classes",
    ),
    pytest.param(
        Residual(),
        Residual(head="").state_dict(),
        "likely only the head 'fc' is missing in the file\n--partial loads the 54 entries that fit",
        id="no head in the file",
    ),
    pytest.param(
        Residual(head=""),
        Residual().state_dict(),
        "likely only 'fc' of the file has no place in the network\n"
        "--partial loads the 54 entries that fit",
        id="no head in the network",
    ),
    pytest.param(
        Residual(head="classifier", classes=5),
        Residual().state_dict(),
        "likely another head: 'fc' with 10 outputs in the file, 'classifier' with 5 in the network\n"
        "--partial loads the 54 entries that fit",
        id="another head",
    ),
    pytest.param(
        Residual(width=16),
        Residual().state_dict(),
        "likely another width: 8, 16 channels in the file where the network has 16, 32 (19 layers); "
        "build it with the file's",
        id="width",
    ),
    pytest.param(
        Residual(depth=2),
        Residual(depth=5).state_dict(),
        "likely another depth: 'layer1' and 'layer2' have 5 blocks each in the file, 2 in the "
        "network; build it with the file's\n--partial loads the 56 entries that fit",
        id="deeper",
    ),
    pytest.param(
        Residual(depth=5),
        Residual(depth=2).state_dict(),
        "likely another depth: 'layer1' and 'layer2' have 2 blocks each in the file, 5 in the "
        "network; build it with the file's\n--partial loads the 56 entries that fit",
        id="shallower",
    ),
    pytest.param(
        Flat(),
        Residual().state_dict(),
        "likely renamed, 47 entries of the same shapes: conv1 -> stem.0, bn1 -> stem.1, "
        "layer1.0.conv1 -> blocks.0.convolution_1, layer1.0.bn1 -> blocks.0.norm_1 and 1 more",
        id="other names",
    ),
    pytest.param(
        Residual(),
        {k.replace("bn1.weight", "bn1.gamma"): v for k, v in Residual().state_dict().items()},
        "likely renamed, 5 entries of the same shapes: bn1.gamma -> bn1.weight, "
        "layer1.0.bn1.gamma -> layer1.0.bn1.weight\n--partial loads the 51 entries that fit",
        id="gamma",
    ),
    pytest.param(
        Encoder("qkv"),
        Encoder("q", "k", "v").state_dict(),
        "likely query, key and value are apart in the file, in one in the network "
        "(blocks.0.attention.q, blocks.0.attention.k, blocks.0.attention.v and "
        "blocks.0.attention.qkv)\n--partial loads the 8 entries that fit",
        id="fused projections",
    ),
    pytest.param(
        Encoder("query", "key", "value"),
        Encoder("qkv").state_dict(),
        "likely query, key and value are in one in the file, apart in the network "
        "(blocks.0.attention.query, blocks.0.attention.key, blocks.0.attention.value and "
        "blocks.0.attention.qkv)\n--partial loads the 8 entries that fit",
        id="separate projections",
    ),
    pytest.param(
        Residual(),
        {
            k: v.permute(2, 3, 1, 0) if v.dim() == 4 else v
            for k, v in Residual().state_dict().items()
        },
        "likely 9 weights are transposed (conv1.weight), as TensorFlow and GPT-2 store them: turn "
        "the axes in the file\n--partial loads the 47 entries that fit",
        id="axes of TensorFlow",
    ),
    pytest.param(
        Residual(),
        {
            k.replace("bn", "conv"): v
            for k, v in Residual().state_dict().items()
            if "bn" not in k or k.endswith("bias")
        },
        "likely the file's 9 batch norms are folded into the layers before them: build the network "
        "without them\n--partial loads the 11 entries that fit",
        id="folded",
    ),
    pytest.param(
        Residual(),
        {f"base.{i}.lora_A.weight": torch.zeros(2, 8) for i in range(4)},
        "likely it holds LoRA adapters, not a network: merge them into theirs first",
        id="adapters",
    ),
    pytest.param(
        Residual(),
        {f"layers.{i}.qweight": torch.zeros(2, 8) for i in range(4)},
        "likely its weights are quantized already: give the float ones",
        id="quantized",
    ),
    pytest.param(
        Residual(),
        Encoder("qkv").state_dict(),
        "likely the file of another network: 0 entries agree of 14",
        id="another network",
    ),
]


@pytest.mark.parametrize(("net", "state", "said"), CASES)
def test_what_is_said(tmp_path, net, state, said):
    assert told(net, state, tmp_path) == said


def test_the_original_is_not_explained(tmp_path):
    net, twin = Residual(), Residual()
    save_file(twin.state_dict(), tmp_path / "x.safetensors")
    assert load_weights(net, tmp_path / "x.safetensors", partial=False) == ()
    torch.testing.assert_close(net.fc.weight, twin.fc.weight)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert compare(shapes, shapes).fits
    assert explain(compare(shapes, shapes)) == ""


def test_a_prefix_is_added_where_it_is_missing_only(tmp_path):
    """The head's names fit already; the others get the prefix."""
    net = nn.ModuleDict({"body": Residual(head=""), "fc": nn.Linear(16, 10)})
    twin = Residual()
    save_file(twin.state_dict(), tmp_path / "x.safetensors")
    notes = load_weights(net, tmp_path / "x.safetensors", partial=True)
    assert notes == ("weights 'x.safetensors': prefix 'body.' added to its names",)
    torch.testing.assert_close(net["fc"].weight, twin.fc.weight)
    torch.testing.assert_close(net["body"].layer2[1].conv2.weight, twin.layer2[1].conv2.weight)


def test_a_partial_load_says_why(tmp_path):
    save_file(Residual().state_dict(), tmp_path / "x.safetensors")
    (note,) = load_weights(Residual(classes=100), tmp_path / "x.safetensors", partial=True)
    assert note.endswith(
        "Likely only the head 'fc' differs: 10 outputs in the file, 100 in the network"
    )


@pytest.mark.parametrize(
    ("factory", "weights", "said"),
    [
        (
            ("cifar", "ResNet", 3),
            "cifar10_resnet56",
            "likely another depth: 'layer1', 'layer2' and 'layer3' have 9 blocks each in the file, "
            "3 in the network",
        ),
        (
            ("cifar", "ResNet", 9),
            "cifar10_resnet20",
            "'layer1', 'layer2' and 'layer3' have 3 blocks each in the file, 9 in the network",
        ),
        (
            ("fashion", "VisionTransformer", 192),
            "fashion_vit",
            "likely another width: 96, 288, 384 channels in the file where the network has 192, 576",
        ),
        (
            ("fashion", "UNet", 21),
            "fashion_unet",
            "likely only the head 'head' differs: 11 outputs in the file, 21 in the network",
        ),
        (
            ("fashion", "MobileNetV2"),
            "cifar10_resnet20",
            "likely the file of another network: 0 entries agree of 97",
        ),
    ],
    ids=str,
)
def test_real_files_and_networks(shared, workload, factory, weights, said):
    module, name, *arguments = factory
    net = getattr(workload(module), name)(*arguments)
    with pytest.raises(ModelError) as caught:
        load_weights(net, shared / "data" / "models" / f"{weights}.safetensors", partial=False)
    assert said in str(caught.value)


def test_a_real_file_from_data_parallel(shared, workload, tmp_path):
    state = load_file(shared / "data" / "models" / "cifar10_resnet20.safetensors")
    wrapped = nn.DataParallel(workload("cifar").ResNet(3))
    wrapped.module.load_state_dict(state)
    save_file(wrapped.state_dict(), tmp_path / "x.safetensors")
    net = workload("cifar").ResNet(3)
    (note,) = load_weights(net, tmp_path / "x.safetensors", partial=True)
    assert note == "weights 'x.safetensors': prefix 'module.' removed from its names"
    torch.testing.assert_close(net.state_dict()["linear.weight"], state["linear.weight"])
