"""How long a phase takes at least at a chip's published peaks, and what an experiment comes to."""

from collections.abc import Mapping
from math import ceil
from typing import Any, NamedTuple

from infalign_jax.commands.plan_phases import Phase
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.phases import (
    DRAWS,
    FORESIGHT,
    LOG_PROBS,
    REWARD,
    SAMPLER,
    SCORES,
    SFT,
    TRUNK,
    UPDATE,
)
from infalign_jax.runtime.accounts import Account
from infalign_jax.runtime.chips import Chip
from infalign_jax.runtime.mesh import BETWEEN


class Work(NamedTuple):
    """One stage of an experiment: so many calls of some phases."""

    stage: str
    steps: int
    phases: dict[str, float]  # of each phase, how much of one call a step is


def flops(account: Account, phase: Phase) -> float:
    """FLOPs of a device in one call: products, and kernels by formula.

    >>> from infalign_jax.lm.arithmetic import Cost, Shape
    >>> flops(Account(8.0, 0.0, (), (), ()), Phase(lambda: None, Shape(1, 2, 3, 4), Cost))
    8.0
    """
    total = account.flops
    for kernel in account.kernels:
        alone = kernel.keys[-2] == kernel.queries[-2]  # the prompts, which have none before them
        length = phase.shape.prompt if alone else phase.shape.response
        total += kernel.calls * arithmetic.splash(kernel.name, kernel.queries, kernel.keys, length)
    return total


def needs(account: Account, phase: Phase, chip: Chip) -> dict[str, float]:
    """Seconds that a call takes at each peak alone; it takes no less than the largest.

    Of several slices with what comes from the others; where that rate is not known, it is not told.

    >>> from infalign_jax.lm.arithmetic import Cost, Shape
    >>> chip, phase = Chip(4.0, 1, 2.0, 1.0), Phase(lambda: None, Shape(1, 2, 3, 4), Cost)
    >>> needs(Account(8.0, 6.0, (), (), ()), phase, chip)
    {'compute': 2.0, 'memory': 3.0, 'network': 0.0}
    """
    between = sum(each.bytes for each in account.collectives if BETWEEN in each.axes)
    received = sum(each.bytes for each in account.collectives) - between
    least = {
        "compute": flops(account, phase) / chip.flops,
        "memory": account.bytes / chip.memory_rate,
        "network": received / chip.network_rate,
    }
    if between and chip.between_rate:
        least["slices"] = between / chip.between_rate
    return least


def step(experiment: Experiment) -> dict[str, float]:
    """The phases of one RL step, each called once.

    >>> list(step(Experiment("quick")))
    ['sampler', 'log-probabilities', 'rewards', 'RL update']
    """
    fresh = [SAMPLER, LOG_PROBS, SCORES] if experiment.align.solver == "policy_gradient" else []
    return dict.fromkeys([*fresh, UPDATE], 1.0)


def works(experiment: Experiment, phases: Mapping[str, Phase]) -> list[Work]:
    """The stages of an experiment, each in calls of the phases.

    A stage whose batches are of another size counts a phase's call by its tokens.

    >>> from infalign_jax.lm.arithmetic import Cost, Shape
    >>> one = Phase(lambda: None, Shape(16, 12, 16, 16), Cost)
    >>> for work in works(Experiment("quick"), dict.fromkeys([DRAWS, SCORES, UPDATE], one)):
    ...     print(work.stage, work.steps)
    sft and judge_sft 600
    reward and judge 600
    calibrate 16
    foresight 800
    align 400
    evaluate 4
    """
    e, t = experiment, experiment.sampling.length
    score, draws = phases[SCORES].shape.tokens, phases[DRAWS].shape.tokens
    drawn = e.calibrate.chunk * e.calibrate.responses * t
    policies = len(e.policies) * e.evaluate.responses + e.evaluate.reference_responses
    held_out = e.evaluate.chunk * policies * t  # tokens of one step of the evaluation
    found = [Work("sft and judge_sft", 2 * e.sft.steps, {SFT: 1.0})]
    if e.reward_model is not None:
        found = [
            Work("sft", e.sft.steps, {SFT: 1.0}),
            Work("reward_sft and judge_sft", 2 * e.sft.steps, {TRUNK: 1.0}),
        ]
    found += [
        Work("reward and judge", 2 * e.reward.steps, {REWARD: 1.0}),
        Work(
            "calibrate", ceil(e.calibrate.prompts / e.calibrate.chunk),
            {DRAWS: 1.0, SCORES: drawn / score},
        ),
    ]  # fmt: skip
    if e.foresight.steps:
        found.append(Work("foresight", e.foresight.steps, {FORESIGHT: 1.0}))
    found.append(Work("align", len(e.policies) * e.align.steps, step(e)))
    scored = {LOG_PROBS: held_out / score, SCORES: 2 * held_out / score}
    rounds = ceil(e.evaluate.prompts / e.evaluate.chunk)
    return [*found, Work("evaluate", rounds, {DRAWS: held_out / draws, **scored})]


def whole(
    experiment: Experiment, phases: Mapping[str, Phase], seconds: Mapping[str, float],
    chip: Chip, chips: int,
) -> dict[str, Any]:  # fmt: skip
    """One RL step and the experiment at these least seconds of each phase.

    Tokens are response tokens; utilisation is the model's FLOPs over what the chips could do.

    >>> from infalign_jax.lm.arithmetic import Cost, Shape
    >>> names = [SFT, REWARD, DRAWS, FORESIGHT, SAMPLER, LOG_PROBS, SCORES, UPDATE]
    >>> one = Phase(lambda: None, Shape(16, 12, 16, 16), lambda shape, shards: Cost(1.0, 1.0))
    >>> phases = dict.fromkeys(names, one)
    >>> found = whole(Experiment("quick"), phases, dict.fromkeys(names, 0.5), Chip(2, 1, 1, 1), 4)
    >>> found["step"]["seconds"], found["step"]["tokens_per_second_per_chip"]
    (2.0, 512.0)
    """
    once = step(experiment)
    least = sum(seconds[name] for name in once)
    model = sum(phases[name].flops for name in once)
    stages = [
        work._asdict()
        | {"seconds": work.steps * sum(n * seconds[name] for name, n in work.phases.items())}
        for work in works(experiment, phases)
    ]
    total = sum(stage["seconds"] for stage in stages)
    return {
        "step": {
            "seconds": least,
            "tokens_per_second_per_chip": phases[UPDATE].shape.tokens / least / chips,
            "model_flops": model,
            "model_flop_utilisation": model / (least * chips * chip.flops),
        },
        "experiment": {
            "stages": stages, "seconds": total, "chip_hours": chips * total / 3600,
        },
    }  # fmt: skip
