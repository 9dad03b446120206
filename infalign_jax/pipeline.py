"""The stages, composed: from preference pairs to aligned policies, measured and reported.

Every finished stage is kept under a digest of what it depends on and reused by the next run; a
changed β repeats only what depends on β.
"""

import difflib
import io
import json
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from infalign_jax import config as configs
from infalign_jax import phases, programs, report
from infalign_jax.experiment import Experiment
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.runtime import agreement, goodput, hosts, measure, mesh_sizes
from infalign_jax.runtime.devices import cores_as_devices
from infalign_jax.runtime.files import exclusive, write_bytes, write_text
from infalign_jax.runtime.mesh import MeshConfig
from infalign_jax.stages import align, evaluate, facts, language, reference, text
from infalign_jax.stages.language import Model
from infalign_jax.stages.run import Run, say

STAGES = (
    "tokenizer", "data", "sft", "reward", "calibrate", "foresight", "align", "evaluate", "report",
)  # fmt: skip
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "sentencepiece")


class _Costs(NamedTuple):
    """What each phase cost, as results.json says."""

    seconds: dict[str, float]
    rates: dict[str, float]
    goodput: dict[str, Any]

    def note(self, phase: str, info: dict[str, Any]) -> None:
        self.seconds[phase] = info["seconds"]
        if "tokens_per_second" in info:
            self.rates[phase] = info["tokens_per_second"]
        if "lost" in info:
            self.goodput[phase] = goodput.shares(info["seconds"], info["lost"])


def run(
    experiment: Experiment, out: Path, stage: str | None = None, profile: int = 0
) -> dict[str, Any]:
    """Runs an experiment into `out`, up to `stage` (default: all); returns what results.json says.

    Of every training stage `profile` steps are traced, after the one that compiles, into
    `out`/profile. Raises ValueError for an unknown stage, an experiment that its data or devices do
    not allow, and where another run uses `out`.

    >>> run(Experiment("quick"), Path("runs/quick"), "calibrat")
    Traceback (most recent call last):
    ValueError: expected a stage among tokenizer, data, sft, reward, calibrate, foresight, align, \
evaluate, report, got calibrat; did you mean calibrate?
    """
    if stage is not None and stage not in STAGES:
        close = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"did you mean {close[0]}?" if close else "name one of them"
        raise ValueError(f"expected a stage among {', '.join(STAGES)}, got {stage}; {hint}")
    if profile < 0:
        raise ValueError(f"--profile: expected 0 steps or more, got {profile}; 10 will do")
    cores_as_devices()  # before hosts are asked, which looks for devices
    agreement.check([configs.to_dict(experiment), stage])
    until = STAGES.index(stage) if stage else len(STAGES) - 1
    mesh = mesh_sizes.fitted(experiment.mesh, experiment.models, experiment.batch_sizes)
    _check_memory(experiment, mesh, until)
    if until >= STAGES.index("align"):
        for policy in experiment.policies:  # a KL out of reach is to be heard of now, not then
            align.target(policy)
    with ExitStack() as stack:
        hosts.shared(lambda: bool(stack.enter_context(exclusive(out))))
        hosts.check_shared(out)
        return _run(Run(experiment, out, mesh, profile), until)


def _check_memory(experiment: Experiment, mesh: Mesh, until: int) -> None:
    """Before any work: what each stage holds at once fits, as far as can be known."""
    e, sizes = experiment, MeshConfig(**mesh.shape)
    skipped = phases.FRESH if e.align.solver == "regression" else ()
    needed = [
        (phases.stage_of(name), phases.batch_field(name), phases.least(e, sizes, name))
        for name in phases.of(e)
        if name not in skipped
    ]
    for field in ("responses", "reference_responses"):
        count = getattr(e.evaluate, field)
        drawn = Shape(evaluate.at_once(e, mesh, count), e.prompt_length, count, e.sampling.length)
        taken = programs.memory_to_draw(e.model, e.sampling, drawn, sizes)
        needed.append(("evaluate", f"evaluate.{field}", taken))
    advice = "lower it, the prompts or responses at once, sampling.length or the model's sizes"
    for stage, field, most in needed:
        if STAGES.index(stage) <= until:
            measure.check_memory(field, most, mesh, advice)


def _run(run: Run, until: int) -> dict[str, Any]:
    experiment, began = run.experiment, time.monotonic()
    words = text.load(run)
    costs = _Costs({"data": time.monotonic() - began}, {}, {})
    if until < STAGES.index("sft"):
        return {"data": words.counts}
    text.check_rows(words, experiment)
    prompts = text.prompts_of(words, experiment, "train", experiment.calibrate.prompts)[1]
    sft = language.sft(run, words)
    costs.note("sft", sft.info)
    if until < STAGES.index("reward"):
        return {}
    scorer, judge = _scorers(run, words, sft, costs)
    if until < STAGES.index("calibrate"):
        return {}
    stored = reference.calibrate(run, prompts, sft, scorer)
    costs.note("calibrate", stored.info)
    if until < STAGES.index("foresight"):
        return {}
    start = language.anticipate(run, sft, stored)
    if experiment.foresight.steps:
        costs.note("foresight", start.info)
    if until < STAGES.index("align"):
        return {}
    policies = []
    for policy in experiment.policies:
        policies.append(align.align(run, policy, start, sft, scorer, stored))
        costs.note(f"align {policy.name}", policies[-1].info)
    if until < STAGES.index("evaluate"):
        return {}
    results = _evaluated(run, words, policies, evaluate.Judges(scorer, judge, sft), costs)
    if until == STAGES.index("report"):
        hosts.shared(lambda: say(f"report  {report.draw(run.out)}"))
    return results


def _scorers(run: Run, words: text.Text, sft: Model, costs: _Costs) -> tuple[Model, Model]:
    """The training reward and the judge."""
    start = language.reward_trunk(run, words, sft)
    if start is not sft:
        costs.note("reward_sft", start.info)
    scorer = language.reward_model(run, words, start, judge=False)
    costs.note("reward", scorer.info)
    trunk = language.sft(run, words, "judge_sft")
    costs.note("judge_sft", trunk.info)
    judge = language.reward_model(run, words, trunk, judge=True)
    costs.note("judge", judge.info)
    return scorer, judge


def _evaluated(
    run: Run, words: text.Text, policies: list[Model], judges: evaluate.Judges, costs: _Costs
) -> dict[str, Any]:
    """Measures every policy; writes evaluation.npz, samples.json and results.json."""
    experiment, options, began = run.experiment, run.experiment.evaluate, time.monotonic()
    compiled = goodput.compilation_seconds()
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
        rows.append(evaluate.measure(run, model, policy.name, policy.transformation, own, base))
        arrays[f"policy_quantiles/{number}"] = facts.quantiles(own, table).ravel()
    for row, gains in zip(rows, facts.above_identity(rows), strict=True):
        row["above_identity"] = gains
    names = [policy.name for policy in experiment.policies]
    shown = facts.side_by_side(words, prompts[0][: options.show], base, table, names, taken)
    known = facts.reference_facts(base) | facts.sft_facts(run, words, judges.sft)
    lost = {"compilation": goodput.compilation_seconds() - compiled}
    costs.note("evaluate", {"seconds": time.monotonic() - began, "lost": lost})
    measured = {"calibration": errors, "reference": known, "policies": rows}
    results = _about(run, words, judges, costs) | measured
    hosts.shared(lambda: _write(run.out, arrays, shown, results))
    return results


def _write(out: Path, arrays: dict[str, Any], shown: Any, results: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(out / "evaluation.npz", buffer.getvalue())
    write_text(out / "samples.json", json.dumps(shown))
    write_text(out / "results.json", json.dumps(results, indent=1, allow_nan=False))


def _about(run: Run, words: text.Text, judges: evaluate.Judges, costs: _Costs) -> dict[str, Any]:
    """What results.json says of a run beside what the evaluation measured."""
    experiment = run.experiment
    return {
        "experiment": experiment.name, "seed": experiment.seed, "procedure": experiment.procedure,
        "device": _device(run), "versions": {name: metadata.version(name) for name in LIBRARIES},
        "configuration": configs.to_dict(experiment), "data": words.counts,
        "reward_model": _kept(judges.train.info), "judge": _kept(judges.judge.info),
        "seconds": costs.seconds, "tokens_per_second": costs.rates,
        "goodput": costs.goodput,
    }  # fmt: skip


def _kept(info: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in info.items()
        if name not in ("steps", "seconds", "lost", "tokens_per_second")
    }


def _device(run: Run) -> str:
    devices = run.mesh.devices.ravel()
    sizes = ", ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items())
    return f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}; {sizes})"
