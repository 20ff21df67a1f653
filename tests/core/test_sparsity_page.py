"""The picture of sparse execution: every curve, its break-even, and well-formed pages."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

from tersor.core.sparsity_page import COLORS, HEIGHT, Curve, draw, even_words, page, picture


def curve(label: str, *times: float, break_even: float | None = 80) -> Curve:
    zeros = (50.0, 80.0, 95.0)[: len(times)]
    return Curve(
        label=label,
        zeros=zeros,
        times=times,
        low=tuple(t * 0.9 for t in times),
        high=tuple(t * 1.1 for t in times),
        break_even=break_even,
    )


def test_every_curve_is_drawn_and_named() -> None:
    curves = [curve("a & b", 0.5, 1.0, 4.0), curve("never", 0.2, 0.3, 0.5, break_even=None)]
    root = ET.fromstring(picture(curves))
    space = {"s": "http://www.w3.org/2000/svg"}
    groups = root.findall("s:g", space)
    assert len(groups) == 2
    assert all(len(g.findall("s:circle", space)) >= 3 for g in groups)
    assert [len(g.findall("s:circle[@class='even']", space)) for g in groups] == [1, 0]
    names = [
        t.text for t in root.iter("{http://www.w3.org/2000/svg}text") if t.get("class") == "name"
    ]
    assert names == ["a & b: 80 %", "never: above 95 %"]


def test_labels_never_cover_each_other_and_stay_inside() -> None:
    curves = [curve(str(i), 0.5, 1.0, 3.0 + i / 1000) for i in range(COLORS + 3)]
    places = sorted(
        float(y) for y in re.findall(r'class="name" x="\d+" y="([\d.]+)"', draw(curves))
    )
    assert all(b - a >= 16.9 for a, b in pairwise(places))
    assert places[0] > 0
    assert places[-1] < HEIGHT


def test_one_share_and_one_speed_can_be_drawn() -> None:
    assert "svg" in draw(
        [Curve(label="x", zeros=(90.0,), times=(1.0,), low=(1.0,), high=(1.0,), break_even=None)]
    )


def test_words_of_the_break_even() -> None:
    assert even_words(curve("x", 1.0, 1.0, 1.0, break_even=71.6)) == "72 %"
    assert even_words(curve("x", 2.0, 2.0, 2.0, break_even=50)) == "50 % or less"
    assert even_words(curve("x", 0.1, 0.1, 0.1, break_even=None)) == "above 95 %"


def test_the_page_loads_nothing_and_escapes_all() -> None:
    made = page("<t1>", "<n1>", [curve("<c1>", 0.5, 1, 2)], (("<h0>",), [("<r1>",)]), ["<w1>"])
    assert "default-src 'none'" in made
    assert "<script" not in made
    for word in ("t1", "n1", "c1", "h0", "r1", "w1"):
        assert f"<{word}>" not in made
        assert f"&lt;{word}&gt;" in made
    assert not re.search(r"https?://(?!www\.w3\.org)", made)
