"""What layers lose with settings: read from facts, drawn as a table of shades, pasted as a recipe."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from tersor.core.recipe import Recipe
from tersor.core.report import Report, StageReport
from tersor.core.report_page import to_html
from tersor.core.report_sensitivity import Sensitivity, sensitivities
from tersor.core.report_text import to_markdown
from tests.core.report_sample import report
from tests.core.test_report import checked

LOSSES: dict[str, Any] = {
    "conv1": {"8": 1e-5, "4": 1e-1},
    "conv2": {"8": 0.0, "4": 1e-3},
    "fc<b>": {"8": 1e-3},
}
RECIPE = {"mixed_precision": {"assign": ["conv1=8", "conv2=4", "fc<b>=8"]}}


def stage(
    losses: Any = None, recipe: Any = None, technique: str = "mixed_precision"
) -> StageReport:
    facts = {"sensitivities": LOSSES if losses is None else losses}
    if recipe is not None:
        facts["recipe"] = recipe
    return replace(report().stages[1], facts={technique: facts, "other": {"layers": 3}})


def found(losses: Any = None, recipe: Any = None) -> Sensitivity:
    (only,) = sensitivities(stage(losses, recipe))
    return only


def cells(page: str, layer: str) -> list[tuple[str, str]]:
    """Return attributes and text of a layer's cells."""
    row = re.search(f'<tr><th scope="row">{re.escape(layer)}</th>(.*?)</tr>', page)
    assert row is not None
    return re.findall("<td([^>]*)>([^<]*)</td>", row[1])


def drawn(losses: Any = None, recipe: Any = None) -> str:
    page = to_html(report(stages=(stage(losses, recipe),)))
    checked(page)
    return page


def test_the_shade_is_the_loss_on_a_logarithmic_scale() -> None:
    each = found()
    assert each.heat(1e-5) == 0.0
    assert each.heat(1e-1) == 1.0
    assert each.heat(1e-3) == pytest.approx(0.5)
    assert each.heat(0.0) == 0.0
    assert found({"a": {"8": 2.0}}).heat(2.0) == 1.0


def test_the_table_shows_losses_shades_and_the_choice() -> None:
    page = drawn(recipe=RECIPE)
    assert cells(page, "conv1") == [
        (' class="chosen" style="--heat:0%"', "1.00e-05"),
        (' style="--heat:90%"', "0.100"),
        (' class="taken"', "8"),
    ]
    assert cells(page, "conv2")[1] == (' class="chosen" style="--heat:45%"', "0.00100")
    assert cells(page, "fc&lt;b&gt;")[1:] == [("", "-"), (' class="taken"', "8")]
    assert "各层的敏感度" in page
    assert "Sensitivity of each layer (mixed_precision)" in page


def test_without_a_choice_nothing_is_framed() -> None:
    page = drawn()
    assert 'class="chosen"' not in page
    assert "framed" not in page
    assert 'class="paste"' not in page
    assert len(cells(page, "conv1")) == 2


def test_a_choice_by_pattern_and_between_the_columns() -> None:
    losses = {"a.x": {"0.25": 1.0, "0.5": 2.0}, "a.y": {"0.5": 1.0}, "b[0]": {"0.5": 1.0}}
    rules = ["a.x=0.3", "a.*=0.50", "b[0]=0"]
    each = found(losses, {"channels": {"ratios": rules, "multiple": 8}})
    assert each.chosen == {"a.x": "0.3", "a.y": "0.50", "b[0]": "0"}
    assert each.marked("a.x") == ("0.25", False)
    assert each.marked("a.y") == ("0.5", True)  # 0.50 is 0.5
    cell, other, taken = cells(drawn(losses, each.recipe), "a.x")
    assert cell == (' class="chosen near" style="--heat:0%"', "1")
    assert other == (' style="--heat:90%"', "2")
    assert taken == (' class="taken"', "0.3")


def test_settings_that_are_words_are_equal_or_not() -> None:
    each = found({"a": {"l1": 1.0}, "b": {"l1": 1.0}}, {"x": {"by": ["a=l1", "b=l2"]}})
    assert (each.marked("a"), each.marked("b")) == (("l1", True), None)


def test_settings_keep_the_order_of_the_layer_that_has_most() -> None:
    each = found({"a": {"0.5": 1.0}, "b": {"0.25": 1.0, "0.5": 1.0}, "c": {"0.75": 1.0}})
    assert each.settings == ["0.25", "0.5", "0.75"]


def test_the_fragment_is_a_step_of_a_recipe() -> None:
    each = found(recipe={"mixed_precision": {"assign": [f"layer{i}.conv=8" for i in range(60)]}})
    parsed = Recipe.parse({"steps": yaml.safe_load(each.fragment), "target": "onnxruntime:cpu"})
    assert len(parsed.stages[0][0].assign) == 60
    assert max(map(len, each.fragment.splitlines())) <= 100
    for lang, words in [("en", "to be copied as a whole"), ("zh", "整体复制")]:
        text = to_markdown(report(stages=(stage(recipe=each.recipe),)), lang=lang)  # type: ignore[arg-type]
        assert f"```yaml\n{each.fragment}\n```" in text
        assert words in text
    assert "- mixed_precision:" in drawn(recipe=each.recipe).partition('class="paste"')[2]


@pytest.mark.parametrize(
    "losses", [{}, [], "text", {"a": {}}, {"a": 1.0}, {"a": {"8": "low"}}, {"a": None}]
)
def test_facts_of_another_shape_draw_nothing(losses: Any) -> None:
    assert sensitivities(stage(losses)) == []
    assert 'class="heat"' not in drawn(losses)


def test_losses_that_are_not_finite_have_no_shade() -> None:
    page = drawn({"a": {"8": math.nan, "4": math.inf, "2": -1.0}, "b": {"8": 1.0}})
    assert [text for _, text in cells(page, "a")] == ["-", "-", "-1"]
    assert "nan" not in page.partition('class="heat"')[2].partition("</table>")[0]


def test_sixty_layers_are_sixty_rows() -> None:
    losses = {f"layer{i}": {"0.25": 0.1 * (i + 1), "0.5": 1.0 * (i + 1)} for i in range(60)}
    table = drawn(losses).partition('class="heat"')[2].partition("</table>")[0]
    assert table.count('<th scope="row">') == 60


def test_a_report_without_such_facts_stays_as_it_was() -> None:
    assert 'class="heat"' not in to_html(report())
    assert sensitivities(StageReport(name="x", verdict="kept", reason="")) == []
    assert "- mixed_precision" not in to_markdown(Report())
