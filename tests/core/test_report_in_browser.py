"""The pages in headless Chromium, without a network: no complaint, nothing wider than the screen."""

from dataclasses import replace
from pathlib import Path

import pytest

from tersor.core.report import OperatorReport, OperatorsReport, Report
from tersor.core.report_page import to_html
from tersor.core.roofline_page import page
from tests.browser import PROGRAM, Browser
from tests.core.report_sample import report
from tests.core.test_roofline_page import ROOFS, spot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium (the Debian package chromium)"),
]


def full() -> Report:
    """A report with every part, and names as long as they get."""
    name = "encoder.layers.11.attention.self_attention.output_projection"
    operators = tuple(
        OperatorReport(
            name=f"{name}_{i}", kind="QLinearConv", part="convolutions", ms=i, layer=name
        )
        for i in range(1, 4)
    )
    stage = replace(report().stages[0], name=f"{'smooth_quant + ' * 6}static", facts={
        "mixed_precision": {"sensitivities": {name: {"4": 0.1, "8": 0.01}, "b": {"4": 0.2, "8": 0.0}}}
    })  # fmt: skip
    return report(
        operators=OperatorsReport(before=operators, after=operators[:2], how="a profiler"),
        stages=(stage, *report().stages[1:]),
        origin=f"huggingface:{'folder/' * 20}",
    )


@pytest.mark.parametrize(
    ("width", "lang", "dark"),
    [(1100, "en", False), (1100, "zh", True), (390, "en", True), (390, "zh", False)],
)
def test_the_report(width: int, lang: str, dark: bool, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(to_html(full()), encoding="utf-8")
    with Browser(tmp_path / "profile", width=width, dark=dark) as browser:
        browser.open(file, f"?lang={lang}")
        browser.value('document.querySelectorAll("details").forEach((e) => { e.open = true })')
        assert browser.wider() == []
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        words = {"en": "Where the time goes", "zh": "时间花在何处"}
        assert words[lang] in browser.value("document.body.innerText")
        assert words["zh" if lang == "en" else "en"] not in browser.value("document.body.innerText")
        paper = browser.value("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(15, 18, 22)" if dark else "rgb(255, 255, 255)")
        assert browser.complaints == []


def test_a_circle_tells_its_figures_and_the_language_changes(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(to_html(full()), encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        browser.open(file, "?lang=en")
        caption = 'document.querySelector("figcaption").innerText'
        assert browser.value(caption).startswith("Point at a circle")
        browser.value('document.querySelectorAll(".point")[5].focus()')
        assert browser.value(caption).startswith("4. static (kept): latency 0.606 ms")
        assert "steps: drop_layers {latency: 0.6}" in browser.value(caption)
        browser.value('document.getElementById("language").click()')
        assert browser.value(caption).startswith("将指针移到圆上")
        assert browser.value("document.documentElement.lang") == "zh-CN"
        browser.value('document.getElementById("theme").click()')
        assert browser.value("document.documentElement.dataset.theme") == "dark"
        assert browser.complaints == []


@pytest.mark.parametrize("width", [1100, 390])
def test_the_roofline(width: int, tmp_path: Path) -> None:
    file = tmp_path / "roofline.html"
    rows = [("a_very_long_name_of_an_operator_" * 3, "1")]
    made = page("x" * 60, "note", [spot(1, 2, 3)], ROOFS, (("operator", "ms"), rows), ["words"])
    file.write_text(made, encoding="utf-8")
    with Browser(tmp_path / "profile", width=width) as browser:
        browser.open(file)
        assert browser.wider() == []
        assert browser.complaints == []
