"""Result rows as a run has them, made up."""

import numpy as np

from testtime.streams.scenarios import Scenario

SCENARIO = Scenario.parse("continual,batch_size=8,domains=fog+snow").to_toml()


def make(methods=("source", "tent"), domains=("fog", "snow"), seeds=2, batches=3, **changes):
    """Rows with a number of its own in every place."""
    rows = []
    for m, method in enumerate(methods):
        for seed in range(seeds):
            for d, domain in enumerate(domains):
                rng = np.random.default_rng([m, seed, d])
                worst = 70 + 30 * np.random.default_rng([m, seed]).random()
                trace = [
                    {"batch": d * batches + i, "samples": 8, "error": 12.5 * int(rng.integers(8))}
                    for i in range(batches)
                ]
                rows.append({
                    "cell": f"{method}-{seed}", "method": method, "options": "{}", "model": "net",
                    "data": "set", "stream": "continual", "scenario": SCENARIO, "severity": 5,
                    "batch_size": 8, "seed": seed, "domain": domain, "position": d,
                    "samples": 8 * batches, "error": 10 + 60 * rng.random(), "nll": rng.random(),
                    "brier": rng.random(), "ece": rng.random(), "clean_error": 9 * rng.random(),
                    "worst_class": str(seed), "worst_class_error": worst,
                    "source_clean_error": 7.0, "seconds_per_batch": 0.01 * (1 + m),
                    "forwards_per_sample": 1.0 + m, "backwards_per_sample": 0.5 * m,
                    "peak_memory_mb": 9.0 + m, "paced_error": 80 * rng.random(), "paced_share": 1 / (1 + m), "weights_sha256": "a" * 64,
                    "samples_sha256": str(seed) * 64, "version": "0.1.0", "trace": trace,
                    "reliability": [{"count": 8, "confidence": 0.9, "accuracy": 0.75}],
                } | changes)  # fmt: skip
    return rows
