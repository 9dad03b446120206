"""A small stored run, as the pipeline leaves one: what the report's tests draw."""

import json
from pathlib import Path

import numpy as np

# Transformation, β, KL asked for, KL reached, win rates best of 4, worst of 4 and standard.
REACHED = [
    ("identity", 0.2846, 0.5, 0.470, 0.806, 0.880, 0.755),
    ("identity", 0.4072, 0.25, 0.243, 0.732, 0.800, 0.680),
    ("exponential(10)", 4610.0, 0.5, 0.481, 0.858, 0.700, 0.701),
    ("exponential(10)", 7310.0, 0.25, 0.240, 0.772, 0.620, 0.640),
    ("optimal(best_of_4)", 0.2199, 0.5, 0.463, 0.852, 0.690, 0.700),
]
SCRIPT = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"


def write(out: Path) -> Path:
    """Write results.json, metrics.jsonl, evaluation.npz and samples.json into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    (out / "results.json").write_text(json.dumps(results()))
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _metrics(rng)))
    policies = {
        f"policy_quantiles/{i}": np.where(
            rng.random(4000) < 0.5, rng.random(4000), 1 - rng.exponential(0.08, 4000)
        ).clip(0, 1)
        for i in range(len(REACHED))
    }
    before, after = rng.beta(0.6, 0.5, 8000), rng.random(8000)
    np.savez(out / "evaluation.npz", quantiles_before=before, quantiles_after=after, **policies)
    (out / "samples.json").write_text(json.dumps(_samples(rng)))
    return out


def results() -> dict:
    """What results.json holds."""
    return {
        "experiment": "quickstart",
        "seed": 0,
        "device": "cpu (2 cores)",
        "versions": {"infalign_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8"},
        "seconds": {"tokenizer": 0.3, "sft": 61.2, "reward": 80.1, "align": 305.5},
        "tokens_per_second": {"sft": 13900.0, "align": 8120.0},
        "reward_model": {"accuracy": 0.7312, "standard_error": 0.0094},
        "calibration": {"absolute_error_before": 0.1312, "absolute_error_after": 0.0287},
        "configuration": {"policy": {"layers": 2, "width": 64}, "align": {"learning_rate": 1e-3}},
        "data": {"train": 12000, "dropped": {"empty response": 3}},
        "reference": {"entropy": 21.3, "best_of_128": {"train": 0.991}, "largest_atom": 0.008},
        "policies": [_policy(*row) for row in REACHED],
    }


def _policy(name: str, beta: float, asked: float, kl: float, *means: float) -> dict:
    def rate(mean: float) -> dict:
        return {"mean": mean, "standard_error": 0.004}

    rates = {
        procedure: {"train": rate(mean), "judge": rate(mean - 0.04), "true": {}}
        for procedure, mean in zip(("best_of_4", "worst_of_4", "standard"), means, strict=True)
    }
    return {
        "name": f"{name} kl={asked}",
        "transformation": name,
        "beta": beta,
        "target_kl": asked,
        "kl": kl,
        "kl_standard_error": 0.006,
        "win_rates": rates,
        "frontier_win_rate": {"best_of_4": 0.5 + 0.53 * kl**0.5, "worst_of_4": 0.93},
        "frontier_gap": {"best_of_4": 0.02},
        "entropy": 20.7,
        "distinct": 0.998,
        "seconds": 61.0,
        "steps": 400,
    }


def _metrics(rng: np.random.Generator) -> list[dict]:
    rows = [
        {
            "stage": stage,
            "step": i,
            "seconds": 0.1 * i,
            "digest": "ab12",
            "loss": 3 / (1 + 0.05 * i) + rng.normal() / 20,
        }
        for stage in ("sft", "reward", "judge", "foresight")
        for i in range(400)
    ]
    rows[-1]["loss"] = "nan"
    rows += [
        {
            "stage": "align",
            "policy": f"{name} kl={asked}",
            "step": i,
            "seconds": 0.15 * i,
            "kl": kl * (1 - np.exp(-i / 60)) + rng.normal() / 50,
            "reward": 2 * kl * (1 - np.exp(-i / 60)) + rng.normal() / 10,
            "length": 14 + rng.normal() / 5,
            "quantile_mean": 0.5 + kl * 0.4 * (1 - np.exp(-i / 60)),
        }
        for name, _, asked, kl, *_ in REACHED
        for i in range(400)
    ]
    return rows


def _samples(rng: np.random.Generator) -> list[dict]:
    def responses(kind: str) -> list[dict]:
        texts = [
            f"The {kind} kitchen serves soup, bread and a {w}." for w in ("pear", "fig", "nut")
        ]
        texts.append(
            SCRIPT if kind == "reference" else "Take the bus to the harbour & ask <there>."
        )
        rewards = rng.normal(size=4).tolist()
        return [
            {"text": text, "reward": reward, "quantile": 1 / (1 + np.exp(-reward))}
            for text, reward in zip(texts, rewards, strict=True)
        ]

    def aligned(name: str) -> dict:
        drawn = responses("aligned")
        return {
            "name": name,
            "responses": drawn,
            "best": int(np.argmax([r["reward"] for r in drawn])),
        }

    names = [f"{name} kl={asked}" for name, _, asked, *_ in REACHED]
    return [
        {
            "prompt": f"Human: where do I eat in town {i}?\n\nAssistant:" + " long" * 40 * (i == 1),
            "reference": responses("reference"),
            "policies": [aligned(name) for name in names],
        }
        for i in range(5)
    ]
