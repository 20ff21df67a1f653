"""A report with one of everything: kept, weakened and dropped stages, limits, warnings, odd text."""

from tersor.core.metric import Measurement
from tersor.core.report import LimitReport, Ratio, Report, StageReport


def measured(latency: float, accuracy: float, size: int, split: str) -> tuple[Measurement, ...]:
    conditions = {"batch": 1, "threads": 1}
    how = f"median of 200 runs after 20, batch 1, 1 thread ({split})"
    return (
        Measurement(
            metric="latency",
            value=latency,
            unit="ms",
            better="lower",
            spread=(latency * 0.98, latency * 1.03),
            conditions=conditions,
            count=200,
            how=how,
        ),
        Measurement(
            metric="size", value=size, unit="B", better="lower", how="all files the runtime needs"
        ),
        Measurement(
            metric="accuracy",
            value=accuracy,
            unit="%",
            better="higher",
            spread=(accuracy - 0.9, accuracy + 0.8),
            count=5000,
            how=f"top-1 on {split}, Wilson interval",
        ),
    )


def ratio(value: float, verdict: str) -> Ratio:
    low, high = value * 0.97, value * 1.03
    return Ratio(
        metric="latency", value=value, low=low, high=high, verdict=verdict, how="interleaved"
    )


def report(**changes: object) -> Report:
    stages = (
        StageReport(
            name="drop_layers + distill_logits",
            speed=ratio(1.64, "better"),
            verdict="weakened",
            reason="latency 0.61 of the stage before (0.58 to 0.64), faster; accuracy fell 0.42 points, inside -1pt; tried once weaker",
            measurements=measured(1.38, 88.4, 2_650_000, "validation"),
            seconds=412.0,
            settings=({"drop_layers": {"latency": 0.6}}, {"distill_logits": {"epochs": 3}}),
            facts={"drop_layers": {"dropped": ["layer1.4", "layer2.6"]}},
            attempts=(
                {
                    "settings": [{"drop_layers": {"latency": 0.5}}],
                    "measurements": measured(1.1, 87.1, 2_100_000, "validation"),
                    "reason": "accuracy fell 1.72 points, outside -1pt",
                },
            ),
        ),
        StageReport(
            name="fuse_batch_norm",
            speed=ratio(1.02, "no difference"),
            verdict="kept",
            reason="outputs unchanged: preparation",
            measurements=measured(1.36, 88.4, 2_610_000, "validation"),
            seconds=6.1,
        ),
        StageReport(
            name="weight_only",
            speed=ratio(0.82, "worse"),
            verdict="dropped",
            reason="latency 1.21 of the stage before (1.18 to 1.25), slower; it bought nothing that the goal asks for",
            measurements=measured(1.65, 88.3, 900_000, "validation"),
            seconds=8.8,
        ),
        StageReport(
            name="static",
            speed=ratio(2.25, "better"),
            verdict="kept",
            reason="latency 0.45 of the stage before (0.43 to 0.47), faster; accuracy fell 0.10 points",
            measurements=measured(0.61, 88.3, 690_000, "validation"),
            seconds=20.4,
            settings=({"static": {"calibrator": "entropy"}},),
        ),
    )
    values: dict[str, object] = {
        "origin": "module:nets/<b>cifar</b>.py:resnet56",
        "target": "onnxruntime:cpu",
        "recipe": {
            "steps": ["fuse_batch_norm", {"static": {"calibrator": "entropy"}}],
            "target": "onnxruntime:cpu",
            "goal": {"best": "latency", "limits": {"accuracy": "-1pt", "size": "25%"}},
        },
        "before": measured(2.31, 88.86, 3_460_000, "test"),
        "after": measured(0.6, 88.1, 690_000, "test"),
        "start": measured(2.28, 89.0, 3_460_000, "validation"),
        "stages": stages,
        "ratios": (
            Ratio(
                metric="latency",
                value=3.85,
                low=3.7,
                high=4.02,
                verdict="better",
                how="30 interleaved blocks",
            ),
            Ratio(
                metric="accuracy",
                value=88.1 / 88.86,
                low=87.74 / 88.86,
                high=88.46 / 88.86,
                verdict="worse",
                how="paired on the same samples",
            ),
        ),
        "limits": (
            LimitReport(
                metric="accuracy",
                text="-1pt",
                bound=87.86,
                value=88.1,
                unit="%",
                holds=True,
                interval=(87.74, 88.46),
            ),
            LimitReport(
                metric="size", text="25%", bound=865_000, value=690_000, unit="B", holds=True
            ),
        ),
        "warnings": (
            "validation was set aside from test: 2500 samples",
            "the machine was busy: load average 1.4 on 2 cores",
        ),
        "environment": {
            "machine": {"cpu": "some CPU", "cores": 2, "flags": ["avx2", "avx512_vnni"]},
            "tersor": "0.1.0",
            "seed": 0,
            "note": "<script>alert(1)</script>",
        },
        "seconds": 512.3,
        "command": "tersor compress nets/cifar.py:resnet56 --data nets/cifar.py:data --recipe cnn-int8-cpu --out 'a b'",
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]
