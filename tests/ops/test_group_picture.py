"""The drawing of coupled channels: whole, inside its frame, a mark for each place."""

import inspect
import re
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

from tersor.core.model import Inputs
from tersor.ops.capture import capture
from tersor.ops.group_picture import draw
from tersor.ops.groups import Coupling, couple
from tests import networks

SVG = "{http://www.w3.org/2000/svg}"


def coupling_of(net: nn.Module, x: Tensor) -> Coupling:
    name = "x" if "x" in inspect.signature(net.forward).parameters else "input"
    return couple(capture(net.eval(), Inputs(example={name: x})), net)


def rows(picture: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(picture).findall(f"{SVG}g")


def test_a_row_a_group_with_a_mark_for_each_layer() -> None:
    coupling = coupling_of(networks.tiny_cnn(), networks.digits()[0][:2])
    picture = draw(coupling)
    drawn = rows(picture)
    assert len(drawn) == len(coupling.groups) == 6
    for row, group in zip(drawn, coupling.groups, strict=True):
        marks = [circle.get("class") for circle in row.findall(f"{SVG}circle")]
        assert marks.count("made") == len(group.makers)
        assert marks.count("passed") == len(group.passed)
        assert marks.count("read") == len(group.readers)
        texts = [text.text for text in row.findall(f"{SVG}text")]
        assert texts[:2] == [group.name, str(group.size)]
        assert row.findtext(f"{SVG}title") == str(group)
    assert [row.get("class") for row in drawn] == ["free"] * 5 + ["stays"]
    assert drawn[-1].findall(f"{SVG}text")[-1].text == "the network's output"
    assert "64 of 74 channels can be cut" in picture
    assert coupling._repr_html_() == picture


def test_columns_follow_the_graph_and_marks_stand_in_theirs() -> None:
    net = networks.tiny_cnn()
    root = ElementTree.fromstring(draw(coupling_of(net, networks.digits()[0][:2])))
    names = [t for t in root.findall(f"{SVG}text") if t.get("transform")]
    assert [t.text for t in names][:5] == ["conv1", "bn1", "block1.conv1", "block1.bn1", "block1.conv2"]  # fmt: skip
    column = {t.get("x"): t.text for t in names}
    first = [column[c.get("cx")] for c in root.findall(f"{SVG}g")[1].findall(f"{SVG}circle")]
    assert first == ["block1.bn1", "block1.conv1", "block1.conv2"]


class Odd(nn.Module):
    """Names that XML would trip over; a bare parameter that is added to channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"<a>&": nn.Linear(4, 6), "b": nn.Linear(6, 3)})
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers["b"](self.layers["<a>&"](x) + self.shift)
        return made


def test_odd_names_are_escaped_and_bare_parameters_pass() -> None:
    coupling = coupling_of(Odd(), torch.ones(2, 4))
    picture = draw(coupling)
    assert rows(picture)[0].findtext(f"{SVG}text") == "layers.<a>&"
    assert coupling.groups[0].passed == ("shift",)
    assert str(coupling.groups[0]) == "6 channels out of layers.<a>& through shift into layers.b"


def test_all_lies_inside_the_frame_and_nothing_is_loaded() -> None:
    layers = [nn.Linear(4, 4) for _ in range(40)]
    picture = draw(coupling_of(nn.Sequential(*layers), torch.ones(2, 4)))
    root = ElementTree.fromstring(picture)
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    for element in root.iter():
        for key, bound in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(element.get(key, "0")) <= bound
    assert set(re.findall(r"https?://[^\"]*", picture)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in picture
    assert len(rows(picture)) == 40


def test_a_network_without_channels_is_an_empty_picture() -> None:
    picture = draw(coupling_of(nn.ReLU(), torch.ones(2, 4)))
    assert rows(picture) == []
    assert "0 of 0 channels can be cut" in picture
