"""The words and numbers of a report, in English and Chinese."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
_TIMES = ((1e3, 1e-3, "s"), (0.1, 1.0, "ms"), (1e-4, 1e3, "us"), (0.0, 1e6, "ns"))
_BYTES = ((1e9, 1e-9, "GB"), (1e6, 1e-6, "MB"), (1e3, 1e-3, "kB"), (0.0, 1.0, "B"))
_COUNTS = ((1e9, 1e-9, "G"), (1e6, 1e-6, "M"), (1e4, 1e-3, "k"), (0.0, 1.0, ""))
_JOULES = ((1.0, 1.0, "J"), (1e-3, 1e3, "mJ"), (0.0, 1e6, "uJ"))
_SCALES = {"ms": _TIMES, "B": _BYTES, "1": _COUNTS, "J": _JOULES}


@cache
def _words() -> dict[str, list[str]]:
    file = Path(__file__).with_name("report_words.json")
    words: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return words


def say(key: str, lang: Language = "en", **values: Any) -> str:
    """Return a phrase of the report in a language, filled with `values`."""
    return _words()[key][LANGUAGES.index(lang)].format(**values)


def metric_word(name: str, lang: Language = "en") -> str:
    """Return a metric's name for a reader; a metric of somebody else keeps its own."""
    return say(name, lang) if name in _words() else name.replace("_", " ")


def human(value: float | None, unit: str, near: float | None = None) -> str:
    """Write a figure for a reader: "2.31 ms", "1.09 MB", "88.86 %", "855 k".

    Args:
        value: The figure, in `unit`.
        unit: As in a measurement.
        near: The figure that chooses between ms and us, MB and kB; `value` itself by default.
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    factor, word = _scale(value if near is None else near, unit)
    return f"{_digits(value, factor, unit)} {word}".strip()


def human_interval(
    spread: tuple[float, float], unit: str, near: float, lang: Language = "en"
) -> str:
    """Write an interval in the unit that `human` chooses for `near`: "2.28 to 2.35"."""
    factor, _ = _scale(near, unit)
    low, high = (_digits(end, factor, unit) if math.isfinite(end) else "n/a" for end in spread)
    return say("interval", lang, low=low, high=high)


def human_seconds(seconds: float) -> str:
    """Write a duration: "4.2 s", "3 min 10 s", "2 h 05 min"."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def ratio_digits(ratio: float) -> str:
    """Write a ratio: "4.12", "12.3", "1.00"."""
    if not math.isfinite(ratio):
        return "n/a"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def _scale(value: float, unit: str) -> tuple[float, str]:
    for start, factor, word in _SCALES.get(unit, ()):
        if math.isfinite(value) and abs(value) >= start:
            return (1.0, "ms" if unit == "ms" else word) if value == 0 else (factor, word)
    return 1.0, {"1/s": "/s"}.get(unit, unit)


def _digits(value: float, factor: float, unit: str) -> str:
    """Write three digits; counts that are not scaled whole."""
    if unit == "%":
        return f"{value:.2f}"
    if value == 0:
        return "0"
    if unit in ("1", "B") and factor == 1 and value == int(value):
        return str(int(value))
    value *= factor
    whole = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{whole}f}" if abs(value) >= 1e-4 else f"{value:.2e}"
