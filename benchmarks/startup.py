"""How long `import tersor` and `tersor --help` take in fresh interpreters, beside `python -c pass`.

    python benchmarks/startup.py [--rounds 30]

The three are started in turn, in an order drawn anew each round; a ratio is the median over rounds
of the ratio within one round, with a bootstrap interval. Writes benchmarks/results/startup.json.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import tersor

RESULT = Path(__file__).with_name("results") / "startup.json"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import tersor": [sys.executable, "-c", "import tersor"],
    "tersor --help": [str(Path(sys.executable).with_name("tersor")), "--help"],
}
LIMITS_S = {"import tersor": 0.3, "tersor --help": 0.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    samples = measured(arguments.rounds, random.Random(0))
    result = {
        "command": f"python benchmarks/startup.py --rounds {arguments.rounds}",
        "rounds": arguments.rounds,
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": platform.system(),
            "tersor": tersor.__version__,
        },
        "results": [summary(name, samples) for name in COMMANDS],
        "samples_s": {name: [round(s, 5) for s in values] for name, values in samples.items()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    late = 0
    for row in result["results"]:
        print(
            "{name:16} {median_s:.3f} s, {ratio:.1f} x python [{low:.1f}, {high:.1f}]".format(**row)
        )
        late += row["median_s"] > LIMITS_S.get(row["name"], float("inf"))
    return 1 if late else 0


def measured(rounds: int, rng: random.Random) -> dict[str, list[float]]:
    """Start each command once a round; the first round fills the page cache and is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for i in range(rounds + 1):
        for name in rng.sample(list(COMMANDS), len(COMMANDS)):
            start = time.perf_counter()
            subprocess.run(COMMANDS[name], check=True, stdout=subprocess.DEVNULL)
            if i:
                samples[name].append(time.perf_counter() - start)
    return samples


def summary(name: str, samples: dict[str, list[float]]) -> dict[str, float | str]:
    """Median seconds, and the ratio to the bare interpreter with its 95 % interval."""
    ratios = np.array(samples[name]) / np.array(samples["python -c pass"])
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {
        "name": name,
        "median_s": round(statistics.median(samples[name]), 4),
        "ratio": round(float(np.median(ratios)), 2),
        "low": round(float(low), 2),
        "high": round(float(high), 2),
        "limit_s": LIMITS_S.get(name, 0.0),
    }


if __name__ == "__main__":
    sys.exit(main())
