"""Reports as text and as a page: figures, words, escaping, nothing loaded from outside."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tersor.core import report_words
from tersor.core.metric import Measurement
from tersor.core.report import Ratio, Report, StageReport
from tersor.core.report_page import to_html
from tersor.core.report_picture import HEIGHT, WIDTH, Point, costs, draw, front, points
from tersor.core.report_text import to_markdown
from tersor.core.report_view import (
    attempt_figures,
    change,
    figure,
    find,
    flat,
    headline,
    left_in_float,
    pairs,
    quality_metric,
    stage_figures,
)
from tersor.core.report_words import human, human_interval, human_seconds, say
from tests.core.report_sample import report

VOID = {"meta", "br", "input", "link", "img", "hr"}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.314, "ms", "2.31 ms"),
        (0.6, "ms", "0.600 ms"),
        (0.02345, "ms", "23.4 us"),
        (1234.0, "ms", "1.23 s"),
        (0.0, "ms", "0 ms"),
        (690_000, "B", "690 kB"),
        (999, "B", "999 B"),
        (3_460_000, "B", "3.46 MB"),
        (88.855, "%", "88.86 %"),
        (100.0, "%", "100.00 %"),
        (855_770, "1", "856 k"),
        (9999, "1", "9999"),
        (0.00123, "1", "0.00123"),
        (12345.6, "1/s", "12,346 /s"),
        (float("nan"), "ms", "n/a"),
        (None, "B", "n/a"),
    ],
)
def test_figures_are_written_for_people(value: float, unit: str, text: str) -> None:
    assert human(value, unit) == text


def test_an_interval_has_the_unit_of_its_value() -> None:
    assert human_interval((990.0, 1010.0), "ms", 1000.0) == "0.990 to 1.01"
    assert human_interval((990.0, 1010.0), "ms", 1000.0, "zh") == "0.990 至 1.01"


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (190, "3 min 10 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_every_phrase_is_there_in_both_languages_with_the_same_values() -> None:
    for key, phrases in report_words._words().items():
        assert len(phrases) == 2, key
        assert all(phrases), key
        english, chinese = (set(re.findall(r"{(\w+)}", phrase)) for phrase in phrases)
        assert english == chinese, key


def test_changes() -> None:
    shown = {pair.metric: pair for pair in pairs(report())}
    assert change(shown["latency"]) == "3.85x faster (3.70 to 4.02)"
    assert change(shown["size"]) == "5.01x smaller"
    assert change(shown["accuracy"]) == "-0.76 points (-1.12 to -0.40)"
    assert headline(report()) == "3.85x faster, 5.01x smaller, accuracy 88.10 % (-0.76 points)"
    assert figure(shown["latency"].before) == "2.31 ms (2.26 to 2.38)"


def test_a_loss_of_speed_is_called_slower_with_the_interval_turned_around() -> None:
    slower = Ratio(metric="latency", value=0.8, low=0.75, high=0.9, verdict="worse")
    shown = pairs(report(ratios=(slower,)))[0]
    assert change(shown) == "1.25x slower (1.11 to 1.33)"


def test_no_difference_is_said_whatever_the_ratio_is() -> None:
    same = Ratio(metric="latency", value=1.01, low=0.99, high=1.02, verdict="no difference")
    assert change(pairs(report(ratios=(same,)))[0]) == "no difference (0.99 to 1.02)"


def test_a_metric_that_was_measured_once_has_no_change() -> None:
    only = Measurement(metric="peak_memory", value=1e6, unit="B", better="lower")
    made = report(after=(*report().after, only))
    assert [change(p) for p in pairs(made) if p.metric == "peak_memory"] == ["-"]


def test_quality_is_the_limited_one() -> None:
    assert quality_metric(report()) == "accuracy"
    assert quality_metric(Report()) == ""


def test_latencies_of_stages_follow_from_the_interleaved_ratios() -> None:
    """Also after a dropped stage, which the next one does not build on."""
    start = 2.28
    found = [next(m for m in row if m.metric == "latency").value for row in stage_figures(report())]
    kept = start / 1.64 / 1.02
    assert found == pytest.approx([start / 1.64, kept, kept / 0.82, kept / 2.25])


def test_stages_without_a_contest_keep_what_was_measured() -> None:
    stages = tuple(replace(stage, speed=None) for stage in report().stages)
    shown = stage_figures(report(stages=stages))
    assert shown == [stage.measurements for stage in stages]


def test_flat_leaves_out_what_is_unknown() -> None:
    rows = flat({"machine": {"memory_bytes": 2_000_000_000, "boost": None, "flags": ("a", "b")}})
    assert rows == [("machine.memory", "2.00 GB"), ("machine.flags", "a, b")]


def test_markdown_has_everything() -> None:
    text = to_markdown(report())
    for wanted in [
        "**3.85x faster, 5.01x smaller, accuracy 88.10 % (-0.76 points)**",
        "| accuracy | 88.86 % (87.96 to 89.66) | 88.10 % (87.20 to 88.90) |",
        "| 3 | `weight_only` | **dropped** |",
        "| size | 25% | 865 kB | 690 kB | **holds** |",
        "- validation was set aside from test: 2500 samples",
        "accuracy fell 1.72 points, outside -1pt",
        "calibrator: entropy",
        "--out 'a b'",
    ]:
        assert wanted in text
    assert "<script>" not in text


def test_markdown_in_chinese() -> None:
    text = to_markdown(report(), lang="zh")
    assert text.startswith("# 压缩报告\n")
    assert "| 3 | `weight_only` | **放弃** |" in text
    assert "速度提高到 3.85 倍\uff0c体积缩小到 1/5.01\uff0c准确率 88.10 % (-0.76 个百分点)" in text


def test_markdown_tables_stay_tables_whatever_the_reason_is() -> None:
    odd = StageReport(name="a`b", verdict="dropped", reason="one | two\nthree <b>")
    text = to_markdown(report(stages=(odd,)))
    row = next(line for line in text.splitlines() if "a'b" in line)
    assert row.count(" | ") == 5
    assert "one \\| two three &lt;b>" in row


def test_a_code_fence_in_the_command_does_not_end_the_block() -> None:
    assert "````sh\na ``` b\n````" in to_markdown(report(command="a ``` b"))


def test_an_empty_report_is_written_and_drawn() -> None:
    assert "nothing was measured" in to_markdown(Report())
    page = to_html(Report())
    assert "The recipe had no stages." in page
    assert "<figure>" not in page


class Checker(HTMLParser):
    """Balanced tags, no attribute that loads anything."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = to_html(report())
    checker = checked(page)
    for tag, attributes in checker.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "onclick", "onload"} & set(attributes)
    assert "http://" not in page
    assert "https://" not in page
    assert "url(#hatch)" in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) == {"#hatch"}


def test_the_policy_allows_exactly_our_script() -> None:
    page = to_html(report())
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_every_text_of_the_report_is_escaped() -> None:
    bad = "<script>alert(1)</script>\"'&"
    stage = StageReport(
        name=bad,
        verdict="kept",
        reason=bad,
        measurements=report().before,
        settings=({bad: bad},),
        facts={bad: bad},
        attempts=({"reason": bad},),
    )
    named = Measurement(metric=bad, value=1.0, unit=bad, better="lower", how=bad)
    page = to_html(
        report(
            origin=bad,
            target=bad,
            command=bad,
            warnings=(bad,),
            environment={bad: bad},
            recipe={bad: bad},
            stages=(stage,),
            before=(*report().before, named),
            after=(*report().after, named),
        )
    )
    checked(page)
    assert page.count("<script>") == 1
    assert "alert(1)</script>" not in page


def test_each_stage_has_a_bar_and_its_verdict_as_word_sign_and_color() -> None:
    page = to_html(report())
    for verdict, chinese in [("weakened", "减弱后保留"), ("kept", "保留"), ("dropped", "放弃")]:
        assert f'<span class="verdict {verdict}"><svg' in page
        assert f'<span class="zh" lang="zh-CN">{chinese}</span>' in page
        assert f'<rect class="fill-{verdict}"' in page
    labels = re.findall(r'role="img" aria-label="([^"]*): latency', page)
    assert labels[:5] == ["original", "weakened", "kept", "dropped", "kept"]


def test_the_picture_shows_every_point_with_a_tip() -> None:
    shown = points(report())
    kinds = ["original", "dropped", "weakened", "kept", "dropped", "kept"]
    assert [point.kind for point in shown] == kinds
    assert [point.label for point in shown] == ["original", "1a", "1", "2", "3", "4"]
    drawn = draw(report())
    tips = re.findall(r"<title>([^<]*)</title>", drawn)
    assert len(tips) == 6
    assert tips[0].startswith("original: latency 2.28 ms (2.23 to 2.35); accuracy 89.00 %")
    assert tips[4].startswith("3. weight_only (dropped): latency")
    assert drawn.count('tabindex="0"') == 6
    assert 'class="bound"' in drawn
    assert '<g class="point dropped try"' in drawn


def test_a_tip_names_the_steps_that_led_there_and_no_dropped_ones() -> None:
    made = report()
    dropped = replace(made.stages[2], settings=({"weight_only": {"bits": 4}},))
    shown = points(replace(made, stages=(*made.stages[:2], dropped, made.stages[3])))
    steps = {point.label: point.steps for point in shown}
    kept = "drop_layers {latency: 0.6}; distill_logits {epochs: 3}"
    assert steps["original"] == ""
    assert steps["1a"] == "drop_layers {latency: 0.5}"
    assert steps["3"] == f"{kept}; weight_only {{bits: 4}}"
    assert steps["4"] == f"{kept}; static {{calibrator: entropy}}"
    long = replace(dropped, settings=({"static": {"layers": ["a" * 99, "b" * 99]}}, "pack"))
    assert points(report(stages=(long,)))[1].steps.endswith("aaa, bbbb ...; pack") is False
    assert len(points(report(stages=(long,)))[1].steps) < 180


def test_the_front_holds_what_nothing_beats() -> None:
    assert [point.label for point in front(points(report()))] == ["4", "2", "original"]
    assert [point.label for point in front(points(report(), "size"))] == ["4", "2", "original"]
    assert '<polyline class="front"' in draw(report(), "size")


def test_the_front_where_more_is_better() -> None:
    """Samples in a second: the front then begins at the fastest, and falls to the right."""
    first, *rest = points(report())

    def rate(point: Point) -> Point:
        x = Measurement(metric="throughput", value=1 / point.x.value, unit="1/s", better="higher")
        return replace(point, x=x)

    assert [p.label for p in front([rate(first), *map(rate, rest)])] == ["4", "2", "original"]


def test_there_is_a_picture_of_each_cost_that_was_measured() -> None:
    assert costs(report()) == ["latency", "size"]
    joules = Measurement(metric="energy", value=0.2, unit="J", better="lower")
    less = replace(joules, value=0.1)
    made = report()
    made = replace(made, before=(*made.before, joules), after=(*made.after, less))
    assert costs(made) == ["latency", "size", "energy"]
    assert [p.label for p in points(made, "energy")] == ["original", "result"]
    page = to_html(made)
    assert page.count("<figure>") == 3
    assert "energy 0.200 J" not in page  # written as people do
    assert "energy 200 mJ" in page


def test_the_latency_of_an_earlier_try_follows_from_its_ratio() -> None:
    stage = report().stages[0]
    speed = {"metric": "latency", "value": 2.0, "low": 1.9, "high": 2.1, "verdict": "better"}
    tried = replace(stage, attempts=({**stage.attempts[0], "speed": speed},))
    ((_, found),), *_ = attempt_figures(report(stages=(tried, *report().stages[1:])))
    assert find(found, "latency").value == pytest.approx(2.28 / 2)
    odd = replace(stage, attempts=({"measurements": ["x"], "reason": "?"},))
    assert attempt_figures(report(stages=(odd,))) == [
        [({"measurements": ["x"], "reason": "?"}, ())]
    ]


def test_costs_that_hardly_differ_have_ticks_that_do() -> None:
    made = report()
    memory = Measurement(metric="peak_memory", value=11.12e6, unit="B", better="lower")
    more = replace(memory, value=11.13e6)
    drawn = draw(
        replace(made, before=(*made.before, memory), after=(*made.after, more)), "peak_memory"
    )
    ticks = re.findall(r'text-anchor="middle">([\d.]+ MB)<', drawn)
    assert len(ticks) > 1
    assert len(set(ticks)) == len(ticks)


@pytest.mark.parametrize("cost", ["latency", "size"])
def test_the_picture_stays_inside_its_frame(cost: str) -> None:
    drawn = draw(report(), cost)
    for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn):
        assert 0 <= float(x) <= WIDTH
        assert 0 <= float(y) <= HEIGHT


def test_without_a_quality_there_is_no_picture_but_a_word_about_it() -> None:
    cheap = tuple(m for m in report().before if m.metric != "accuracy")
    stages = tuple(replace(s, measurements=cheap) for s in report().stages)
    made = report(before=cheap, after=cheap, start=cheap, stages=stages, limits=())
    assert draw(made) == ""
    assert "--metric accuracy" in to_html(made)


def test_figures_that_are_not_numbers_do_not_break_the_page() -> None:
    odd = tuple(replace(m, value=float("nan"), spread=(float("nan"),) * 2) for m in report().before)
    stage = replace(report().stages[0], measurements=odd, speed=None)
    page = to_html(report(before=odd, after=odd, start=odd, stages=(stage,), ratios=()))
    checked(page)
    assert 'width="nan' not in page
    assert "n/a" in page


def test_fifty_stages_fit() -> None:
    many = tuple(replace(report().stages[1], name=f"stage{i}") for i in range(50))
    checked(to_html(report(stages=many)))
    assert to_markdown(report(stages=many)).count("**kept**") == 50


def test_a_missed_limit_is_said_first() -> None:
    missed = replace(report().limits[0], holds=False)
    made = report(limits=(missed,), reached=False)
    assert "A limit is not reached" in to_markdown(made)
    assert '<span class="status bad">' in to_html(made)


def test_a_report_without_a_goal_says_applied() -> None:
    stage = replace(report().stages[0], verdict="applied", speed=None)
    made = report(stages=(stage,), limits=())
    assert "**applied**" in to_markdown(made)
    assert "No limits were set" in to_markdown(made)
    assert say("applied", "zh") in to_html(made)


def test_the_script_is_javascript() -> None:
    """Where node is installed; elsewhere the braces at least balance."""
    script = to_html(report()).partition("<script>")[2].partition("</script>")[0]
    assert script.count("{") == script.count("}")
    assert script.count("(") == script.count(")")
    assert "innerHTML" not in script


def test_drawing_imports_nothing_heavy() -> None:
    code = (
        "import sys, json; from tersor.core.report import Report; "
        "from tersor.core.report_page import to_html; to_html(Report()); "
        "print(json.dumps([n for n in ('torch', 'rich', 'typer') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_paired_change_names_its_test_and_its_ends():
    made = report()
    tested = replace(
        next(r for r in made.ratios if r.metric == "accuracy"),
        how="paired on the same samples: McNemar's exact test, p = 0.01",
        difference=(-0.76, -1.2, -0.3),
        p=0.01,
    )
    ratios = tuple(tested if r.metric == "accuracy" else r for r in made.ratios)
    shown = {pair.metric: pair for pair in pairs(replace(made, ratios=ratios))}
    assert change(shown["accuracy"]) == "-0.76 points (-1.20 to -0.30)"
    assert shown["accuracy"].how.endswith(
        "; paired on the same samples: McNemar's exact test, p = 0.01"
    )
    assert "McNemar" in to_markdown(replace(made, ratios=ratios))


def test_the_settings_of_the_last_try_stand_below_the_earlier_ones() -> None:
    text = to_markdown(report())
    first, last = text.partition("Tries, of which the last one counts:")[2].split("\n")[2:4]
    assert '[{"drop_layers": {"latency": 0.5}}]' in first
    assert '[{"drop_layers": {"latency": 0.6}}, {"distill_logits": {"epochs": 3}}]' in last


def test_a_few_bytes_are_no_difference() -> None:
    made = report()
    size = find(made.before, "size")
    after = tuple(
        replace(m, value=size.value * 1.002) if m.metric == "size" else m for m in made.after
    )
    assert "1.00x" not in headline(replace(made, after=after, ratios=()))


def test_a_recipe_of_auto_is_repeated_from_its_artifact() -> None:
    said = "But auto chooses by measured times"
    auto = report(command="tersor compress x --recipe auto")
    assert said in to_markdown(auto)
    assert said in to_html(auto)
    assert said not in to_markdown(report())


def test_what_stays_in_float_is_told_with_its_reason() -> None:
    kinds = {"a": "<LSTM>", "b": "norm", "c": "norm", "d": "norm", "e": "norm", "f": "norm"}
    asked = {"g": "excluded by layers", "h": "quantized before"}
    stage = StageReport(
        name="static",
        verdict="applied",
        reason="",
        facts={"static": {"left_in_float": {**kinds, **asked}}, "bias_correction": {"layers": 2}},
    )
    told = left_in_float(stage)
    assert told == ["a: <LSTM>", "b, c, d and 2 more: norm"]
    made = replace(report(), stages=(stage,))
    assert "Left in float:\n\n- `static`: a: &lt;LSTM>" in to_markdown(made)
    assert "保留为浮点" in to_markdown(made, "zh")
    assert "a: &lt;LSTM&gt;</p>" in to_html(made)
    assert left_in_float(replace(stage, verdict="dropped")) == []
    assert left_in_float(replace(stage, facts={"odd": {"left_in_float": "x"}, "none": 3})) == []
