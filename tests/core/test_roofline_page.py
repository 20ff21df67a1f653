"""The picture of a profile: spots under roofs, on logarithmic axes, on one page that loads nothing."""

import math
import re
import xml.etree.ElementTree as ET

from tersor.core.roofline_page import HEIGHT, WIDTH, Roofs, Spot, draw, page

ROOFS = Roofs(peaks={"fp32": 100.0, "int8": 400.0}, slopes={"memory": 10.0, "second cache": 50.0})


def spot(number: int, intensity: float, gflops: float, **more: object) -> Spot:
    about = {"name": f"n{number}", "format": "fp32", "share": 0.5, "tip": f"tip {number}"}
    return Spot(number=number, intensity=intensity, gflops=gflops, **{**about, **more})  # type: ignore[arg-type]


def centers(drawn: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]


def test_equal_factors_are_equal_distances() -> None:
    drawn = draw([spot(1, 1, 1), spot(2, 4, 2), spot(3, 16, 4)], ROOFS)
    (x1, y1), (x2, y2), (x3, y3) = centers(drawn)
    assert math.isclose(x2 - x1, x3 - x2, abs_tol=0.2)
    assert math.isclose(y2 - y1, y3 - y2, abs_tol=0.2)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in centers(drawn))


def test_a_spot_on_a_roof_lies_on_its_line() -> None:
    drawn = draw([spot(1, 2, 20), spot(2, 50, 100)], ROOFS)  # 2 x 10 GB/s; the fp32 peak
    (x, y), (_, peak_y) = centers(drawn)
    line = re.search(r'class="roof" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)"', drawn)
    assert line is not None
    x1, x2, y1, y2 = map(float, line.groups())
    assert math.isclose(y1 + (x - x1) / (x2 - x1) * (y2 - y1), y, abs_tol=0.3)
    assert re.search(rf'class="roof f0" [^>]*y1="{peak_y:.1f}"', drawn)


def test_what_has_no_operations_is_left_out() -> None:
    assert centers(draw([spot(1, 0, 0)], ROOFS)) == []
    assert len(centers(draw([spot(1, 0, 0), spot(2, 3, 3)], ROOFS))) == 1


def test_the_page_loads_nothing_and_escapes_all() -> None:
    made = page(
        "<t1>",
        "<n1>",
        [spot(1, 2, 3, tip="<s1>")],
        ROOFS,
        (("<h0>",), [("<r1>",)]),
        ["<a>"],
        ["<w1>"],
    )
    assert "default-src 'none'" in made
    assert "<script" not in made
    for word in ("t1", "n1", "s1", "h0", "r1", "w1"):
        assert f"<{word}>" not in made
        assert f"&lt;{word}&gt;" in made
    assert "int8 peak 400 GFLOP/s" in made
    ET.fromstring(draw([spot(1, 2, 3)], ROOFS))
