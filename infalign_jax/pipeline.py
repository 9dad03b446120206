"""The stages, composed: tokenizer, data, SFT, reward, calibrate, foresight, align, evaluate, report.

Every finished stage is kept under a digest of what it depends on and reused by the next run; a
changed β repeats only what depends on β.
"""

import io
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infalign_jax import config as configs
from infalign_jax import report
from infalign_jax.experiment import Experiment
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.files import exclusive, write_bytes, write_text
from infalign_jax.stages import align, evaluate, language, reference, text
from infalign_jax.stages.run import Run, say

STAGES = ("data", "sft", "reward", "calibrate", "foresight", "align", "evaluate", "report")
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "sentencepiece")


def run(experiment: Experiment, out: Path, stage: str | None = None) -> dict[str, Any]:
    """Runs an experiment into `out`, up to `stage` (default: all); returns what results.json says.

    Raises ValueError for an unknown stage, and where another run uses `out`.

    >>> run(Experiment("quick"), Path("runs/quick"), "calibrat")
    Traceback (most recent call last):
    ValueError: expected a stage among data, sft, reward, calibrate, foresight, align, evaluate, \
report, got calibrat; name one of them
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(
            f"expected a stage among {', '.join(STAGES)}, got {stage}; name one of them"
        )
    until = STAGES.index(stage) if stage else len(STAGES) - 1
    with exclusive(out):
        results = _run(Run(experiment, out, meshes.make(experiment.mesh)), until)
    return results


def _run(run: Run, until: int) -> dict[str, Any]:
    experiment, began = run.experiment, time.monotonic()
    words = text.load(run)
    seconds, rates = {"data": time.monotonic() - began}, {}

    def note(stage: str, model: Any) -> None:
        seconds[stage] = model.info["seconds"]
        if "tokens_per_second" in model.info:
            rates[stage] = model.info["tokens_per_second"]

    if until < STAGES.index("sft"):
        return {"data": words.counts}
    sft = language.sft(run, words)
    note("sft", sft)
    if until < STAGES.index("reward"):
        return {}
    scorer = language.reward_model(run, words, sft, judge=False)
    judge = language.reward_model(run, words, sft, judge=True)
    note("reward", scorer)
    note("judge", judge)
    if until < STAGES.index("calibrate"):
        return {}
    _, prompts = text.prompts_of(words, experiment, "train", experiment.calibrate.prompts)
    stored = reference.calibrate(run, prompts, sft, scorer)
    note("calibrate", stored)
    if until < STAGES.index("foresight"):
        return {}
    start = language.anticipate(run, words, sft, stored)
    if experiment.foresight.steps:
        note("foresight", start)
    if until < STAGES.index("align"):
        return {}
    policies = []
    for policy in experiment.policies:
        policies.append(align.align(run, policy, start, sft, scorer, stored))
        note(f"align {policy.name}", policies[-1])
    if until < STAGES.index("evaluate"):
        return {}
    judges = evaluate.Judges(scorer, judge, sft)
    results = _evaluated(run, words, policies, judges, stored)
    results["seconds"] = seconds | results["seconds"]
    results["tokens_per_second"] = rates
    write_text(run.out / "results.json", json.dumps(results, indent=1))
    if until == STAGES.index("report"):
        say(f"report  {report.draw(run.out)}")
    return results


def _evaluated(
    run: Run, words: text.Text, policies: list[Any], judges: evaluate.Judges,
    stored: reference.Reference,
) -> dict[str, Any]:  # fmt: skip
    """Measures every policy; writes evaluation.npz and samples.json; returns the results."""
    experiment, options, began = run.experiment, run.experiment.evaluate, time.monotonic()
    prompts = text.prompts_of(words, experiment, "test", options.prompts)
    base = evaluate.samples(
        run, words, prompts, judges.sft, judges, options.reference_responses, 0, "reference"
    )
    errors = evaluate.calibration_error(run, base)
    arrays = {name: errors.pop(name) for name in ("quantiles_before", "quantiles_after")}
    table = np.sort(base.rewards["train"], axis=1)
    rows, taken = [], []
    for number, (policy, model) in enumerate(zip(experiment.policies, policies, strict=True)):
        own = evaluate.samples(
            run, words, prompts, model, judges, options.responses, 1, policy.name
        )
        taken.append(own)
        rows.append(
            evaluate.measure(run, model, policy.name, policy.transformation, own, base)
        )
        arrays[f"policy_quantiles/{number}"] = evaluate.quantiles(own, table).ravel()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(run.out / "evaluation.npz", buffer.getvalue())
    names = [policy.name for policy in experiment.policies]
    shown = evaluate.side_by_side(words, prompts[0][: options.show], base, table, names, taken)
    write_text(run.out / "samples.json", json.dumps(shown))
    return {
        "experiment": experiment.name, "seed": experiment.seed, "procedure": experiment.procedure,
        "device": _device(run), "versions": {name: metadata.version(name) for name in LIBRARIES},
        "configuration": configs.to_dict(experiment), "data": words.counts,
        "reward_model": _kept(judges.train.info), "judge": _kept(judges.judge.info),
        "calibration": errors,
        "reference": evaluate.reference_facts(judges.sft, base)
        | evaluate.sft_facts(run, words, judges.sft),
        "policies": rows, "seconds": {"evaluate": time.monotonic() - began},
    }  # fmt: skip


def _kept(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if name not in ("steps", "seconds")}


def _device(run: Run) -> str:
    devices = run.mesh.devices.ravel()
    sizes = ", ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items())
    return f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}; {sizes})"
