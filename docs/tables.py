"""Write the measured tables of the README from the reports in benchmarks/results.

    python docs/tables.py [--check]

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is one that `rendered`
knows. No figure in it is typed by hand. `--check` changes nothing and exits with 1 where a page is
not up to date.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "README.zh-CN.md",
    "docs/how-to/choose-a-runtime.md",
    "docs/how-to/distill.md",
    "docs/how-to/decompose.md",
    "docs/how-to/fuse.md",
    "docs/how-to/advise.md",
    "docs/how-to/measure-under-load.md",
    "docs/how-to/profile.md",
    "docs/how-to/prune.md",
    "docs/how-to/share-weights.md",
    "docs/measuring.md",
    "docs/results.md",
    "docs/why-int8-pays.md",
    "docs/sparse-execution.md",
)
Plain = Mapping[str, Any]


def main() -> int:
    """Write the tables, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for name in PAGES:
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = rendered(old, chinese="zh" in name)
        if new != old and check:
            print(f"{name} is not up to date; run: python docs/tables.py", file=sys.stderr)
            stale = 1
        elif new != old:
            page.write_text(new, encoding="utf-8")
    place, drawn = ROOT / "docs" / "sparse-break-even.svg", break_even_picture()
    if drawn and (not place.exists() or place.read_text(encoding="utf-8") != drawn):
        if check:
            print(f"{place.name} is not up to date; run: python docs/tables.py", file=sys.stderr)
            stale = 1
        else:
            place.write_text(drawn, encoding="utf-8")
    return stale


def rendered(text: str, *, chinese: bool) -> str:
    """Return a page with what stands between its markers written anew."""
    writers: dict[str, Callable[[bool], str]] = {
        "results": results,
        "compared": compared,
        "peers": peers,
        "repair": repair,
        "mixed": mixed,
        "agreement": agreement,
        "explain": explained,
        "sparse": sparse,
        "break_even": break_even,
        "candidates": candidates,
        "aa": self_check,
        "startup": startup,
        "loadgen": loadgen,
        "batch_sweep": lambda _: swept(),
        "roofs": lambda _: roofs(),
        "sums": lambda _: sums(),
        "pruned": pruned,
        "ways": pruning_ways,
        "oneshot": one_shot,
        "structured": structured,
        "coverage": coverage,
        "deep_compression": deep_compression,
        "clustered_int8": clustered_int8,
        "distilled": distilled,
        "decomposed": decomposed,
        "fused": fused,
        "fusion_steps": fusion_steps,
        "everywhere_resnet20": lambda _: everywhere("resnet20"),
        "everywhere_resnet20_int8": lambda _: everywhere("resnet20-int8"),
        "everywhere_minilm": lambda _: everywhere("minilm"),
        "gpu": lambda _: on_gpu(),
        "advice": lambda _: advised(),
    }
    for marker, write in writers.items():
        begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = head + begin + write(chinese) + end + rest.partition(end)[2]
    return text


def results(chinese: bool) -> str:
    """One row a stored run: before -> after, on the final split."""
    runs = [
        (file, raw)
        for file in sorted(RESULTS.glob("*.json"))
        if isinstance(raw := json.loads(file.read_text(encoding="utf-8")), dict)
        and {"before", "after", "stages", "ratios"} <= set(raw)
    ]
    if not runs:
        return ""
    head = (
        ["network", "target", "size", "speed, 95 % interval", "accuracy", "stages kept"]
        if not chinese
        else ["网络", "目标", "体积", "速度, 95 % 置信区间", "准确率", "保留的阶段"]
    )
    rows = [row(file, raw) for file, raw in runs]
    source = ", ".join(f"`{file.relative_to(ROOT).as_posix()}`" for file, _ in runs)
    note = f"Rendered from {source}." if not chinese else f"由 {source} 生成。"
    return table(head, rows) + f"\n{note}\n"


def compared(chinese: bool) -> str:
    """One row a stored comparison of an artifact with its original."""
    raw = stored("resnet56-compared")
    if raw is None:
        return ""
    head = (
        ["network", "runtime", "batch", "before", "after", "speed, 95 % interval"]
        if not chinese
        else ["网络", "运行时", "批大小", "之前", "之后", "速度, 95 % 置信区间"]
    )
    rows = []
    for item in raw["comparisons"]:
        c = item["comparison"]
        times = [f"{c[side]:.2f} ms" for side in ("a_ms", "b_ms")]
        ratio = f"{c['speedup']:.2f}x [{c['low']:.2f}, {c['high']:.2f}]"
        rows.append([item["network"], item["runtime"], str(item["batch"]), *times, ratio])
    return table(head, rows)


def repair(chinese: bool) -> str:
    """One row a way of rounding to 4 bits."""
    raw = stored("repair")
    if raw is None:
        return ""
    head = (
        ["network", "rounding", "quality", "seconds"]
        if not chinese
        else ["网络", "取整方式", "质量", "秒"]
    )
    rows = []
    for item in raw["results"]:
        digits = 2 if item["unit"] == "%" else 3
        shown = f"{item['value']:.{digits}f} {item['unit']}"
        seconds = f"{item['seconds']:.0f}" if item["seconds"] else ""
        rows.append([item["network"], item["way"], shown, seconds])
    return table(head, rows)


def mixed(chinese: bool) -> str:
    """One row a file: uniform bits, and bits chosen layer by layer."""
    del chinese  # on an English page only
    raw = stored("mixed_precision")
    if raw is None:
        return ""
    head = ["network", "bits", "file", "accuracy", "minus float, 95 %", "divergence from float"]
    head += ["a mixed file is as small and as accurate"]
    rows = []
    for item in raw["results"]:
        shown = {"float": "32", "uniform": f"{32 * item['weights']:g}"}
        low, high = item["minus_float"][1:]
        dominated = item.get("dominated_in")
        rows.append(
            [
                item["network"],
                shown.get(item["kind"], f"mixed, {32 * item['weights']:.1f} on average"),
                f"{item['size_bytes'] / 1e3:.0f} kB",
                f"{item['accuracy']:.2f} %",
                f"{item['minus_float'][0]:+.2f} [{low:+.2f}, {high:+.2f}]",
                f"{item['divergence']:.5f}",
                "" if dominated is None else "yes" if dominated["accuracy"] else "**no**",
            ]
        )
    return table(head, rows)


def pruned(chinese: bool) -> str:
    """One row a network with few weights left: accuracy beside the original's."""
    del chinese
    head = ["network", "weights left", "error, whole split", "original", "not above the original's"]
    head += ["error, other half", "original"]
    rows = []
    for network, items in pruning_rows("target", "network").items():
        first = items[0]["original"]
        errors = {part: [100 - i["accuracy"][part] for i in items] for part in first}
        mean = sum(errors["whole"]) / len(items)
        rows.append(
            [
                network,
                f"{100 * items[0]['weights_left']:.1f} %",
                spread(errors["whole"], "%"),
                f"{100 - first['whole']:.2f} %",
                "yes" if mean <= 100 - first["whole"] + 1e-9 else "**no**",
                spread(errors["other"], "%"),
                f"{100 - first['other']:.2f} %",
            ]
        )
    return table(head, rows) if rows else ""


def pruning_ways(chinese: bool) -> str:
    """One row a way of pruning: accuracy, and the difference to one shot."""
    del chinese
    found = pruning_rows("effect", "way")
    if not found:
        return ""
    plain = {i["seed"]: i["accuracy"]["other"] for i in found["one shot, then finetune"]}
    rows = []
    for way, items in found.items():
        differences = [i["accuracy"]["other"] - plain[i["seed"]] for i in items]
        shown = "" if way.startswith("one shot") else spread(differences, "points", sign="+")
        rows.append([way, spread([i["accuracy"]["other"] for i in items], "%"), shown])
    return table(["way", "accuracy", "difference to one shot"], rows)


def pruning_rows(part: str, key: str) -> dict[str, list[Any]]:
    """Group the rows of a part of the stored report."""
    found: dict[str, list[Any]] = {}
    for item in (stored("unstructured") or {"results": []})["results"]:
        if item["part"] == part:
            found.setdefault(item[key], []).append(item)
    return dict(sorted(found.items(), key=lambda pair: (not pair[0].startswith("one"), pair[0])))


def one_shot(chinese: bool) -> str:
    """One row a method and amount of zeros: perplexity over the calibration subsets."""
    del chinese
    raw = stored("oneshot")
    if raw is None:
        return ""
    found: dict[tuple[str, str], list[float]] = {}
    for item in raw["results"]:
        found.setdefault((item["zeros"], item["way"]), []).append(item["value"])
    rows = []
    for (zeros, way), values in found.items():
        low, high = min(values), max(values)
        several = f" [{low:.3f}, {high:.3f}]" if len(values) > 1 else ""
        rows.append([zeros, way, f"{sum(values) / len(values):.3f}{several}", str(len(values))])
    head = ["zeros", "method", "perplexity, mean [lowest, highest]", "calibration subsets"]
    return table(head, rows) + f"\n`{raw['command']}`\n"


def structured(chinese: bool) -> str:
    """One row a way of making resnet56 smaller: accuracy after one epoch, and time."""
    del chinese
    raw = stored("pruning_peers")
    if raw is None:
        return ""
    chosen, rows = raw["chosen_on_validation"], []
    for name, own in sorted(raw["methods"].items(), key=lambda pair: pair[0] != "original"):
        minus = raw["chosen_minus"].get(name)
        cells = [f"**{name}**" if name == chosen else name]
        cells.append(f"{sum(own['times_fewer_macs']) / len(own['seeds']):.2f}")
        cells.append(spread(own["fp32"]["test_by_seed"], "%"))
        cells.append("" if minus is None else interval(minus))
        for form in ("fp32", "int8"):
            races = (raw["latency"].get(f"{form} batch 8") or {}).get(
                "times_faster_than_original", {}
            )
            cells.append(times_faster(races.get(name)))
        cells.append(spread(own["int8"]["test_by_seed"], "%"))
        rows.append([*cells, str(len(own["seeds"]))])
    head = ["method", "times fewer MACs", "fp32 accuracy, one epoch", f"{chosen} minus it"]
    head += ["speed, fp32", "speed, int8", "int8 accuracy", "seeds"]
    return table(head, rows) + steered(raw["by_latency"])


def steered(found: Plain) -> str:
    """Write how the network that was steered by latency compares, in int8."""
    if "network" not in found:
        return ""
    races = ", ".join(f"{batch} {times_faster(r)}" for batch, r in found["times_faster"].items())
    return (
        f"\nSteered by measured latency, {found['network']} is faster than {found['against']} "
        f"after int8: {races}; its accuracy minus the other's is "
        f"{interval(found['accuracy'])} points "
        f"(seeds {', '.join(map(str, found['accuracy']['seeds']))}).\n"
    )


def interval(found: Plain) -> str:
    """Write a difference in points with its interval."""
    return f"{found['points']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def times_faster(race: Plain | None) -> str:
    """Write a speed with its interval."""
    return "" if race is None else f"{race['speedup']:.2f}x [{race['low']:.2f}, {race['high']:.2f}]"


def coverage(chinese: bool) -> str:
    """What both pruners reach on the list of networks."""
    del chinese
    raw = stored("pruning_coverage")
    if raw is None:
        return ""
    summary = raw["summary"]
    words = {
        "something went": "pruned, and runs",
        "halved": "at least 45 % of all channels gone",
        "exact": "exact",
        "exports": "exported, same outputs",
        "halved, exact and exports": "all three",
        "faster": "faster on ONNX Runtime",
        "all": "all of it",
    }
    rows = [
        [f"{words[key]}, of {summary['networks']}", *(str(summary[c][key]) for c in _PRUNERS)]
        for key in words
    ]
    return table(["networks", *_PRUNERS], rows)


def decomposed(chinese: bool) -> str:
    """One row a network and decomposition: what it became, on the half that no decision saw."""
    del chinese
    raw = stored("decomposition")
    if raw is None:
        return ""
    head = ["network", "stage", "verdict", "layers decomposed", "left, measured not faster"]
    head += ["MACs", "parameters", "accuracy", "mIoU", "speed by the clock, 95 %", "by CPU time"]
    rows = []
    for item in raw["results"]:
        facts = next((f for f in item["facts"].values() if "layers" in f), None)
        slow = [why for why in (facts or {"dropped": {}})["dropped"].values() if "faster" in why]
        before, after = item["before"], item["after"]
        value, low, high = item["ratios"]["latency"]
        quality = ("quality", "accuracy")
        miou, accuracy = (
            f"{before[m]:.2f} -> {after[m]:.2f} %" if m in before else "" for m in quality
        )
        shares = [f"{100 * after[m] / before[m]:.0f} %" for m in ("macs", "parameters")]
        counts = ["", ""] if facts is None else [str(len(facts["layers"])), str(len(slow))]
        # an interval this wide is of the machine's other work, not of the networks
        speed = f"{value:.2f}x [{low:.2f}, {high:.2f}]" if high < 1.1 * low else "unstable"
        asked = ", ".join(f"{k}: {v}" for k, v in next(iter(item["settings"][0].values())).items())
        stage = [item["network"], f"{item['stage']} ({asked})", item["verdict"]]
        cpu = times_faster(item.get("cpu_time"))
        rows.append([*stage, *counts, *shares, accuracy, miou, speed, cpu])
    return table(head, rows) + f"\n`{raw['command']}`\n"


_PRUNERS = ("tersor", "torch-pruning")


def deep_compression(chinese: bool) -> str:
    """One row a network and amount of weights left: times smaller, error, other containers."""
    del chinese
    raw = stored("deep_compression")
    if raw is None:
        return ""
    found: dict[tuple[str, str], list[Plain]] = {}
    for item in raw["results"]:
        found.setdefault((item["network"], item["way"]), []).append(item)
    rows = []
    for (network, way), items in found.items():
        before = items[0]["before_bytes"]
        errors = [i["error_after"]["whole"] for i in items]

        def times(sizes: list[int], before: int = before) -> str:
            return spread([before / size for size in sizes], "x").replace(" x", "x")

        rows.append(
            [
                network,
                {"table": "8 % left", "beyond": "6 % left"}[way] + _longer(items[0]),
                f"{before / 1e3:.0f} kB",
                spread([i["after_bytes"] / 1e3 for i in items], "kB"),
                times([i["after_bytes"] for i in items]),
                times([i["same_file"]["zip"] for i in items]),
                times([i["same_file"]["xz"] for i in items]),
                spread(errors, "%"),
                f"{items[0]['error_before']['whole']:.2f} %",
                str(len(items)),
            ]
        )
    head = ["network", "weights", "fp32", "packed", "smaller", "the same in a zip", "in xz"]
    return table([*head, "error", "original's", "seeds"], rows) + f"\n`{raw['command']}`\n"


def _longer(item: Plain) -> str:
    """Say so where pruning took other epochs than the recipe's."""
    epochs = item.get("gradual", {}).get("epochs", 6)
    return "" if epochs == 6 else f", {epochs} epochs"


def clustered_int8(chinese: bool) -> str:
    """One row a way to int8: file sizes, and what accuracy it costs."""
    del chinese
    raw = stored("clustered_int8")
    if raw is None:
        return ""
    alone = next(r["file_bytes"] for r in raw["results"] if r["way"] == "int8")
    rows = []
    for r in raw["results"]:
        sizes = [f"{r[key] / 1e3:.0f} kB" for key in ("file_bytes", "zip_bytes", "packed_bytes")]
        points = [
            "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**r[f"points_to_{other}"])
            if f"points_to_{other}" in r
            else ""
            for other in ("float", "int8")
        ]
        share = f"{r['packed_bytes'] / alone:.3f}"
        rows.append([r["way"], *sizes, share, f"{r['accuracy']:.2f} %", *points])
    head = ["way", "file", "zip", "packed", "packed, of the int8 file", "accuracy"]
    head += ["points to float", "points to int8"]
    return table(head, rows) + f"\n`{raw['command']}`\n"


def distilled(chinese: bool) -> str:
    """What a teacher brought, one row a student; and what the trainer's own parts do."""
    del chinese
    raw = stored("distillation")
    if raw is None:
        return ""
    found: dict[str, list[Any]] = {}
    for item in raw["results"]:
        found.setdefault(item["part"], []).append(item)
    rows = []
    for start, settings in raw["settings"].items():
        for way, given in settings.items():
            items = [i for i in found.get("teacher", []) if (i["start"], i["way"]) == (start, way)]
            items = [i for i in items if i["settings"] == given]
            if items:
                rows.append(
                    [
                        f"resnet20, {start} weights, one epoch, {way}",
                        spread([i["accuracy"] for i in items], "%"),
                        f"{items[0]['original']:.2f} %",
                        f"{items[0]['teacher']:.2f} %",
                        "",
                    ]
                )
    for item in found.get("half", []):
        smaller = f"{item['times_fewer_macs']:.2f}x fewer multiply-accumulates"
        given = f"{item['teacher']:.2f} %"
        rows.append(
            ["resnet56, half the channels", f"{item['accuracy']:.2f} %", given, given, smaller]
        )
    for item in found.get("sentiment", []):
        given = f"{item['teacher']:.2f} %"
        faster = ", ".join(f"{times_faster(r)} at {b}" for b, r in item["times_faster"].items())
        share = f"{item['accuracy']:.2f} % ({100 * item['share_of_teacher']:.1f} % of it)"
        rows.append(["sentiment, half the blocks", share, given, given, f"{faster}, one thread"])
    head = ["student", "accuracy", "before", "teacher", "cheaper than the teacher"]
    text = table(head, rows) if rows else ""
    for start, pooled in raw["distilled_minus_labels"].items():
        if pooled is None:
            continue
        seeds = ", ".join(map(str, pooled["seeds"]))
        shown = "above zero" if pooled["low"] > 0 else "not shown to be above zero"
        text += (
            f"\nFrom the {start} weights, distilled minus labels, on {pooled['images']}: "
            f"{interval(pooled)} points, seeds {seeds}: {shown}.\n"
        )
    for item in found.get("precision", []):
        accuracy = interval(item["bf16_minus_fp32"])
        text += (
            f"\nresnet8 trains {times_faster(item['times_faster'])} faster in bfloat16 than in "
            f"float32 on this processor; bfloat16 minus float32: {accuracy} points.\n"
        )
    for item in found.get("resume", []):
        word = "the same" if item["identical"] else "**other**"
        text += (
            f"\nA training that was killed after step {item['killed_after']} and resumed came to "
            f"{word} weights as one that was not (sha256 `{item['sha256']['resumed'][:12]}`).\n"
        )
    return text + f"\n`{raw['command']}`\n"


def spread(values: list[float], unit: str, sign: str = "") -> str:
    """Write the mean of some seeds, with the lowest and the highest."""
    mean = sum(values) / len(values)
    return f"{mean:{sign}.2f} {unit} [{min(values):{sign}.2f}, {max(values):{sign}.2f}]"


def agreement(chinese: bool) -> str:
    """One row a network on a runtime: does it compute what was trained?"""
    del chinese
    raw = stored("agreement")
    if raw is None:
        return ""
    head = ["network", "runtime", "outputs within one step", "same class, 95 %"]
    head += ["accuracy in memory", "on the runtime"]
    rows = []
    for item in raw["results"]:
        low, high = item["same_class_spread"]
        rows.append(
            [
                item["network"],
                item["runtime"],
                f"{item['within_one_step']:.3f} %",
                f"{item['same_class']:.2f} % [{low:.2f}, {high:.2f}]",
                f"{item['accuracy_in_memory']:.2f} %",
                f"{item['accuracy_on_runtime']:.2f} %",
            ]
        )
    return table(head, rows)


def explained(chinese: bool) -> str:
    """One row a network on a runtime at a batch size: the kinds of operators that take most."""
    del chinese
    raw = stored("explain_int8")
    if raw is None:
        return ""
    head = ["network", "runtime", "batch", "faster, 95 %", "layers: share of float, gain, reuse"]
    head += ["outside the layers: share of float, of int8"]
    rows = []
    for item in raw["results"]:
        e = item["explanation"]
        c, parts = e["comparison"], e["parts"]
        old, new = (sum(p[side] for p in parts) for side in ("float_ms", "int8_ms"))
        layers = [p for p in parts if p["macs"]]
        said = []
        for p in layers:
            if p["float_ms"] < 0.03 * old:
                continue
            gain = (
                "in float" if p["why_float"] else f"{p['float_ms'] / max(p['int8_ms'], 1e-4):.1f}x"
            )
            share = f"{100 * p['float_ms'] / old:.0f} %"
            said.append(f"{p['name']} {share}, {gain}, {p['reuse']:.0f} products a weight read")
        outside = [
            100 * (1 - sum(p[side] for p in layers) / whole)
            for side, whole in (("float_ms", old), ("int8_ms", new))
        ]
        rows.append(
            [
                item["network"],
                e["target"]["runtime"],
                str(e["batch"]),
                f"{c['speedup']:.2f}x [{c['low']:.2f}, {c['high']:.2f}]",
                "; ".join(said),
                f"{outside[0]:.0f} %, {outside[1]:.0f} %",
            ]
        )
    return table(head, rows)


def fused(chinese: bool) -> str:
    """One row a network and kind of fusion: found, and how many each runtime makes one of."""
    del chinese
    raw = stored("fusion")
    if raw is None:
        return ""
    counts: dict[tuple[str, str], dict[str, Plain]] = {}
    for item in raw["results"]:
        for row in item["fusions"]["rows"]:
            counts.setdefault((item["network"], row["kind"]), {})[item["runtime"]] = row
    head = ["network", "operators that could be one", "found", "ONNX Runtime", "OpenVINO"]
    rows = []
    for (network, kind), own in counts.items():
        told = []
        for runtime in ("onnxruntime", "openvino"):
            row = own.get(runtime)
            parts = ("by_export", "export"), ("by_runtime", "fused"), ("partly", "partly")
            said = [] if row is None else [f"{row[k]} {w}" for k, w in parts if row[k]]
            left = [f"{row['left']} left"] if row is not None and row["left"] else []
            told.append(", ".join(said + left))
        rows.append([network, kind, str(next(iter(own.values()))["found"]), *told])
    return table(head, rows)


def fusion_steps(chinese: bool) -> str:
    """One row a network, runtime and fusion step that fits it."""
    del chinese
    raw = stored("fusion")
    if raw is None:
        return ""
    head = ["network", "runtime", "step", "faster, 95 %", "operators executed", "verdict"]
    rows = []
    for item in raw["results"]:
        for step in item["fusions"]["steps"]:
            c = step["comparison"]
            if c is None:
                continue
            before, after = step["operators"]
            rows.append(
                [
                    item["network"],
                    item["runtime"],
                    f"`{step['technique']}`",
                    f"{c['speedup']:.2f}x [{c['low']:.2f}, {c['high']:.2f}]",
                    f"{before}, the same" if step["same"] else f"{before} -> {after}",
                    "adds nothing" if step["same"] else c["verdict"],
                ]
            )
    return table(head, rows)


def sparse(chinese: bool) -> str:
    """One row a network with zeros on a runtime, against ONNX Runtime's dense fp32."""
    del chinese
    raw = stored("sparse")
    if raw is None:
        return ""
    head = ["network", "zeros", "runtime", "ONNX Runtime, dense", "ours"]
    head += ["times as fast, 95 %", "layers executed sparse", "verdict"]
    from tersor.core.report_words import human

    rows = []
    for network in ("mlp", "gpt"):
        for r in raw.get(network, {}).get("rows", ()):
            c = r["comparison"]
            won = [n for n, f in r["layers"].items() if f.get("executed") == "sparse"]
            count = len(won) + len(r["dense"]) if r["layers"] else None
            rows.append(
                [
                    network,
                    r["zeros"],
                    r["runtime"],
                    human(c["a_ms"], "ms"),
                    human(c["b_ms"], "ms"),
                    f"{c['speedup']:.2f}x [{c['low']:.2f}, {c['high']:.2f}]",
                    "none" if count is None else f"{len(won)} of {count}",
                    f"{r['verdict']}: {r['reason']}",
                ]
            )
    return table(head, rows) + busy(raw["mlp"]["warnings"])


def break_even(chinese: bool) -> str:
    """One row a layer: from which share of zeros it is faster sparse, by batch."""
    del chinese
    raw = stored("sparse")
    if raw is None or "break_even" not in raw:
        return ""
    from tersor.core.sparsity_page import even_words

    profiles = raw["break_even"]["rows"]
    head = ["layer", *(f"faster from, batch {p['batch']}" for p in profiles)]
    head += [f"at 90 %, batch {p['batch']}" for p in profiles]
    rows = []
    for layers in zip(*(p["layers"] for p in profiles), strict=True):
        cells = [even_words(curve(layer)) for layer in layers]
        for layer in layers:
            (race,) = [r for r in layer["races"] if r["zeros"] == 90]
            best = min(race["against"].items(), key=lambda item: item[1]["dense_ms"])
            cells.append(
                "{times:.2f}x [{low:.2f}, {high:.2f}]".format(**best[1]) + f" of {best[0]}"
            )
        rows.append([layers[0]["name"], *cells])
    return table(head, rows) + busy(raw["break_even"]["warnings"])


def candidates(chinese: bool) -> str:
    """One row a way to execute a layer, by its zeros."""
    del chinese
    raw = stored("sparse")
    if raw is None or "candidates" not in raw:
        return ""
    rows = raw["candidates"]["rows"]
    zeros = sorted({r["zeros"] for r in rows})
    head = ["way", *(f"{z} % zeros" for z in zeros)]
    cells: dict[str, list[str]] = {}
    for r in sorted(rows, key=lambda r: r["zeros"]):
        ratio = "{times:.2f}x [{low:.2f}, {high:.2f}]".format(**r)
        cells.setdefault(r["way"], []).append(f"{r['ms']:.3f} ms, {ratio}")
    made = [[way, *shown] for way, shown in cells.items()]
    return table(head, made) + busy(raw["candidates"]["warnings"])


def break_even_picture() -> str:
    """Draw the stored profile at batch 8."""
    raw = stored("sparse")
    if raw is None or "break_even" not in raw:
        return ""
    from tersor.core.sparsity_page import picture

    (profile,) = [p for p in raw["break_even"]["rows"] if p["batch"] == 8]
    return picture([curve(layer) for layer in profile["layers"]])


def curve(layer: Plain) -> Any:
    """Return one line of the picture."""
    from tersor.core.sparsity_page import Curve

    best = [min(r["against"].values(), key=lambda s: s["dense_ms"]) for r in layer["races"]]
    return Curve(
        label=layer["name"],
        zeros=tuple(r["zeros"] for r in layer["races"]),
        times=tuple(s["times"] for s in best),
        low=tuple(s["low"] for s in best),
        high=tuple(s["high"] for s in best),
        break_even=layer["break_even"],
    )


def busy(warnings: list[str]) -> str:
    """Say what made the machine doubtful for timing."""
    return "".join(f"\nWhile measuring, {warning}.\n" for warning in warnings)


def row(file: Path, raw: Plain) -> list[str]:
    """Render the cells of one run."""
    before = {m["metric"]: m for m in raw["before"]}
    after = {m["metric"]: m for m in raw["after"]}
    ratios = {r["metric"]: r for r in raw["ratios"]}
    conditions = before.get("latency", {}).get("conditions", {})
    batch, threads = conditions.get("batch", "?"), conditions.get("threads", "?")
    kept = [s["name"] for s in raw["stages"] if s["verdict"] in ("kept", "weakened", "applied")]
    dropped = [f"~~{s['name']}~~" for s in raw["stages"] if s["verdict"] == "dropped"]
    return [
        file.stem.partition("-")[0],
        f"{raw['target']}, batch {batch}, threads {threads or 'all'}",
        change(before, after, "size", lambda v: f"{v / 1e3:.0f} kB"),
        speed(ratios.get("latency")),
        change(before, after, "accuracy", lambda v: f"{v:.2f} %"),
        ", ".join([*kept, *dropped]),
    ]


def change(before: Plain, after: Plain, metric: str, show: Callable[[float], str]) -> str:
    """Render "before -> after" of a metric, or nothing where it was not measured."""
    if metric not in before or metric not in after:
        return ""
    return f"{show(before[metric]['value'])} → {show(after[metric]['value'])}"


def speed(ratio: Plain | None) -> str:
    """Render a ratio with its interval."""
    return (
        "" if ratio is None else f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    )


def stored(name: str) -> Any:
    """Read a result by its name; None where it was not measured yet."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def peers(chinese: bool) -> str:
    """Our int8 beside that of others: quality, speed against fp32, size, and what it costs."""
    del chinese  # on an English page only
    raw = stored("quantization_peers")
    if raw is None or "verdicts" not in raw:  # a report from before costs were measured
        return ""
    head = ["network", "runtime", "int8 by", "accuracy, 95 %", "batch 1", "batch 8", "size"]
    head += ["seconds", "peak memory"]
    rows = []
    for r in raw["results"]:
        name = "(fp32)" if r["contestant"] == "fp32" else r["contestant"]
        cells = [r["network"], r["runtime"], name]
        if "fails" in r:
            rows.append([*cells, f"fails: {r['fails']}", "", "", "", "", ""])
            continue
        low, high = r["accuracy_spread"]
        unit = " mIoU" if r["metric"] == "mean IoU" else ""
        cells.append(f"{r['accuracy']:.2f} %{unit} [{low:.2f}, {high:.2f}]")
        cells += [raced(r["latency"][b], name == "(fp32)") for b in ("batch 1", "batch 8")]
        cells.append(f"{r['size_bytes'] / 1e3:.0f} kB")
        cost = r["quantize"]
        memory = f"{cost['peak_bytes_with_export'] / 1e6:.0f} MB"
        rows.append([*cells, f"{cost['seconds_with_export']:.1f}", memory])
    packages = ", ".join(raw["peers"])
    return (
        table(head, rows)
        + "\n"
        + judged(raw["verdicts"])
        + f"\nPeers: {packages}. `{raw['command']}`\n"
    )


def raced(found: Plain, is_fp32: bool) -> str:
    """Render milliseconds of fp32, and of the others how many times faster they are."""
    if is_fp32:
        return f"{found['ms']:.2f} ms"
    return "{speedup:.2f}x [{low:.2f}, {high:.2f}]".format(**found["times_faster_than_fp32"])


def judged(verdicts: list[Plain]) -> str:
    """One row a file of ours on a runtime: how it stands to its peers."""
    head = ["network", "runtime", "ours", "accuracy minus the best peer's, 95 %", "not worse"]
    head += ["better than every peer", "latency as the best peer's or better"]
    head += ["time ratio, all peers", "same runtime"]
    rows = []
    for v in verdicts:
        best = min((p["accuracy"] for p in v["peers"].values()), key=lambda a: a["points"])
        rows.append(
            [
                v["network"],
                v["runtime"],
                v["contestant"],
                "{points:+.2f} [{low:+.2f}, {high:+.2f}]".format(**best),
                *(
                    "yes" if v[key] else "**no**"
                    for key in ("not_worse", "better_than_every_peer", "latency_within_noise")
                ),
                f"{v['time_ratio']:.2f}",
                f"{v['same_runtime_time_ratio']:.2f}",
            ]
        )
    return table(head, rows)


def everywhere(network: str) -> str:
    """One row a runtime: what it made of a network."""
    from tersor.core.report_words import human

    raw = stored("all_runtimes")
    found = [r for r in raw["results"] if r["network"] == network] if raw else []
    if not found:
        return ""
    (made,) = found
    head = ["runtime", "size", "agrees", "accuracy", "p50", "p90", "speed", "memory"]
    for column, name in (("accuracy", "accuracy"), ("memory", "peak_memory")):
        if not any(name in row["measurements"] for row in made["rows"]):
            head.remove(column)
    rows, others = [], []
    for row in made["rows"]:
        if row["status"] != "ran":
            others.append(f"`{row['runtime']}` ({row['status']}): {row['reason']}".rstrip("."))
            continue
        got = row["measurements"]
        speed = row["speed"]
        cells = {
            "runtime": f"`{row['runtime']}`",
            "size": human(got["size"]["value"], "B"),
            "agrees": f"{got['fidelity']['value']:.2f} %",
            "accuracy": f"{got['accuracy']['value']:.2f} %" if "accuracy" in got else "",
            "p50": f"{got['latency']['value']:.3g} ms",
            "p90": f"{got['latency_p90']['value']:.3g} ms" if "latency_p90" in got else "",
            "speed": f"{speed[0]:.2f}x [{speed[1]:.2f}, {speed[2]:.2f}]",
            "memory": human(got["peak_memory"]["value"], "B") if "peak_memory" in got else "",
        }
        rows.append([cells[column] for column in head])
    told = "".join(f"\nNot run: {text}.\n" for text in others)
    warned = made["warnings"][0].partition(";")[0] if made["warnings"] else ""
    busy = f" {warned.capitalize()}." if warned else ""
    return (
        table(head, rows)
        + f"\nBatch {made['batch']}, {made['threads']} thread, split {made['split']}. Speed is "
        f"that of the first row, interleaved, with a 95 % interval.{busy}\n" + told
    )


def advised() -> str:
    """One row a workload: the recipe found, beside the one made by hand."""
    found, made = stored("advice"), stored("handmade")
    if found is None or made is None:
        return ""
    by_hand = {row["workload"]: row for row in made["results"]}
    head = ["network", "found", "speed", "quality", "by hand", "speed", "quality", "predicted"]
    rows, inside, count = [], 0, 0
    for row in found["results"]:
        hand = by_hand[row["workload"]]
        told = []
        for stage in row["stages"]:
            if stage["predicted"] and stage["speed"]:
                low, high = stage["predicted"]
                value = stage["speed"]["value"]
                holds = low <= value <= high
                inside, count = inside + holds, count + 1
                mark = "" if holds else " (outside)"
                told.append(f"{low:.2f} to {high:.2f}, came {value:.2f}{mark}")
        rows.append(
            [
                row["workload"],
                *_reached(row),
                *_reached(hand),
                "; ".join(told),
            ]
        )
    return table(head, rows) + f"\n{inside} of {count} stages came out inside the range.\n"


def _reached(row: dict[str, Any]) -> list[str]:
    stages = [s["name"] for s in row["stages"] if s["verdict"] in ("kept", "weakened")]
    speed, quality = row["speed"], row["quality"]["metric"]
    before, after = (row[side][quality] for side in ("before", "after"))
    unit = " %" if after["unit"] == "%" else ""
    held = "" if row["reached"] else ", limit not reached"
    return [
        ", ".join(stages),
        f"{speed['value']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}]",
        f"{before['value']:.2f}{unit} → {after['value']:.2f}{unit}{held}",
    ]


def on_gpu() -> str:
    """One row a way to run a network on a GPU."""
    raw = stored("gpu")
    if raw is None:
        return ""
    head = ["network", "batch", "target", "options", "size", "error", "time", "speed"]
    rows, others = [], {}
    for row in raw["results"]:
        options = ", ".join(
            name if value is True else f"{name} {value}" for name, value in row["options"].items()
        )
        if row["reason"]:
            others[f"{row['runtime']} {options}"] = row["reason"].rstrip(".")
            continue
        rows.append(
            [
                row["network"],
                str(row["batch"]),
                f"`{row['runtime']}:cuda`",
                options,
                f"{row['bytes'] / 1e6:.1f} MB",
                f"{row['error']:.1g}",
                f"{row['ms']:.2f} ms",
                f"{row['speedup']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]",
            ]
        )
    about, packages = raw["environment"]["gpu"], raw["environment"]["packages"]
    told = "".join(f"\nNot run: {name}: {reason}.\n" for name, reason in others.items())
    return table(head, rows) + (
        f"\n{about['name']}, CUDA {about['cuda']}, PyTorch {packages['torch']}, ONNX Runtime "
        f"{packages['onnxruntime']}. Error is relative to PyTorch in fp32 on the CPU; speed, that "
        "of the first row of its network and batch, interleaved, with a 95 % interval.\n" + told
    )


def self_check(chinese: bool) -> str:
    """How often the method is wrong: a network against itself, and against itself slowed down."""
    del chinese
    raw = stored("aa")
    if raw is None:
        return ""
    head = [
        "contest",
        "repetitions",
        "faster",
        "no difference",
        "slower",
        "largest error of the ratio",
    ]
    names = {"same": "against itself", "slowed": "against itself, 5 % slower by design"}
    rows = []
    for key, c in raw["checks"].items():
        none = c["repetitions"] - c["faster"] - c["slower"]
        counts = [str(n) for n in (c["repetitions"], c["faster"], none, c["slower"])]
        rows.append([names.get(key, key), *counts, f"{100 * c['worst_error']:.1f} %"])
    load = raw["load_average"]
    return table(head, rows) + (
        f"\n{raw['model']} on {raw['target']}, minimum effect 3 %; without it, "
        f"{raw['false_alarms_without_minimum_effect']} of the first row would be called different. "
        f"The machine was busy: load average {load['before']} before, {load['after']} after.\n"
    )


def swept() -> str:
    """One row a batch size and network; the knee in bold."""
    raw = stored("batch_sweep")
    if raw is None:
        return ""
    head = ["network", "batch", "ms/batch", "ms/sample", "samples/s", "batches/s"]
    rows = []
    for found in raw["results"]:
        picked = found["sweep"]["knee"]
        for cell in found["sweep"]["cells"]:
            if cell["status"] != "ran":
                continue
            row = [
                found["network"],
                str(cell["batch"]),
                f"{cell['batch_ms']:.3g} [{cell['low_ms']:.3g}, {cell['high_ms']:.3g}]",
                f"{cell['sample_ms']:.3g}",
                f"{cell['samples_per_s']:.4g}",
                f"{cell['batches_per_s']:.4g}",
            ]
            knee = picked is not None and cell["batch"] == picked["batch"]
            rows.append([f"**{text}**" for text in row] if knee else row)
    load = max(found["environment"]["machine"]["load_1min"] for found in raw["results"])
    return (
        table(head, rows)
        + "\nONNX Runtime, one instance on one thread. Bold: the knee. Rendered from "
        f"`benchmarks/results/batch_sweep.json`; load average at most {load:.1f}.\n"
    )


def roofs() -> str:
    """One row a roof: what `profile` measures, beside other probes."""
    raw = stored("roofs")
    if raw is None:
        return ""
    rows = []
    for row in raw["roofs"]:
        ours = row["best"]["tersor"]
        others = {name: value for name, value in row["best"].items() if name != "tersor"}
        name, best = max(others.items(), key=lambda item: item[1])
        rows.append(
            [
                row["roof"],
                f"{ours:.1f} {row['unit']}",
                f"{best:.1f} {row['unit']} ({name})",
                f"{ours / best:.2f}",
            ]
        )
    load = raw["environment"]["machine"]["load_1min"]
    return (
        table(["roof", "profile", "fastest other probe", "ratio"], rows)
        + f"\nOne thread; `python benchmarks/roofs.py`, load average {load:.1f}.\n"
    )


def sums() -> str:
    """One row a network and runtime: operators' times beside the latency."""
    raw = stored("roofs")
    if raw is None or not raw["sums"]:
        return ""
    rows = [
        [
            row["network"],
            row["runtime"],
            str(row["operators"]),
            f"{row['latency_ms']:.3f} ms",
            f"{row['operators_ms']:.3f} ms",
            f"{between:.3f} ms" if (between := row["between_ms"]) else "",
            f"{row['ratio']:.2f}",
            f"{free:.3f} ms" if (free := row["free_shapes_ms"]) else "",
        ]
        for row in raw["sums"]
    ]
    head = [
        "network",
        "runtime",
        "operators",
        "latency",
        "their sum",
        "between them",
        "ratio",
        "fixed saves",
    ]
    return table(head, rows)


def loadgen(chinese: bool) -> str:
    """One row a figure: tersor's over that of MLPerf's load generator."""
    del chinese  # on an English page only
    raw = stored("loadgen")
    if raw is None:
        return ""
    words = {
        "single p50": "single, median latency",
        "single p90": "single, 90th percentile of latency",
        "offline": "offline, samples per second",
    }
    rows = [
        [
            words[name],
            f"{item['median']:.3f}",
            f"{item['low']:.3f} to {item['high']:.3f}",
            str(item["pairs"]),
        ]
        for name, item in raw["ratios"].items()
    ]
    load = raw["environment"]["machine"]["load_1min"]
    made = table(["figure", "tersor / load generator", "95 % interval", "pairs"], rows)
    return f"{made}\nRendered from `benchmarks/results/loadgen.json`; load average {load:.1f}.\n"


def startup(chinese: bool) -> str:
    """Render what a fresh interpreter takes, beside a bare one."""
    raw = stored("startup")
    if raw is None:
        return ""
    head = ["command", "median", "ratio to `python -c pass`"]
    if chinese:
        head = ["命令", "中位数", "与 `python -c pass` 之比"]
    rows = [
        [
            f"`{r['name']}`",
            f"{r['median_s']:.3f} s",
            f"{r['ratio']:.1f} [{r['low']:.1f}, {r['high']:.1f}]",
        ]
        for r in raw["results"]
    ]
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
