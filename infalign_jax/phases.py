"""The phases of an experiment by name: whose model each runs, on what batch, in how much memory.

What they are compiled from is in `commands/plan_phases.py`.
"""

from dataclasses import replace

from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.programs import memory_to_draw, memory_to_learn, own
from infalign_jax.runtime.mesh import MeshConfig

SFT, TRUNK, REWARD = "SFT step", "SFT step of a reward", "reward step"
DRAWS, FORESIGHT, PREFILL = "reference sampler", "foresight step", "prefill"
SAMPLER, LOG_PROBS, SCORES, UPDATE = "sampler", "log-probabilities", "rewards", "RL update"
OF_SCORER = (TRUNK, REWARD, SCORES)
LEARNS = (SFT, TRUNK, REWARD, FORESIGHT, UPDATE)
DRAWN = (DRAWS, SAMPLER)
FRESH = (PREFILL, SAMPLER, LOG_PROBS, SCORES)  # not of a regression, which learns from stored ones
_BATCHES = {
    SFT: "sft.batch_size", TRUNK: "sft.batch_size", REWARD: "reward.batch_size",
    DRAWS: "calibrate.chunk", FORESIGHT: "foresight.batch_size",
}  # fmt: skip


def of(experiment: Experiment) -> list[str]:
    """The phases of a run, in the order in which it comes to them; a regression skips FRESH.

    >>> of(Experiment("quick"))[:4]
    ['SFT step', 'reward step', 'reference sampler', 'foresight step']
    """
    trunk = [TRUNK] if experiment.reward_model else []  # so that the reward has one of its own
    ahead = [FORESIGHT] if experiment.foresight.steps else []
    return [SFT, *trunk, REWARD, DRAWS, *ahead, *FRESH, UPDATE]


def stage_of(name: str) -> str:
    """The stage of a run that comes to a phase: that of its batch, but for a reward's own trunk.

    >>> stage_of(TRUNK), stage_of(UPDATE)
    ('reward', 'align')
    """
    return "reward" if name == TRUNK else batch_field(name).partition(".")[0]


def batch_field(name: str) -> str:
    """The field of an experiment that says how large a phase's batch is.

    >>> batch_field(DRAWS)
    'calibrate.chunk'
    """
    return _BATCHES.get(name, "align.batch_size")


def model_of(experiment: Experiment, name: str) -> TransformerConfig:
    """The model that a phase runs.

    >>> model_of(Experiment("quick"), SCORES).width
    64
    """
    return experiment.scorer if name in OF_SCORER else experiment.model


def shapes(experiment: Experiment) -> dict[str, Shape]:
    """The batch of every phase, on all devices together.

    >>> shapes(Experiment("quick"))["SFT step"]
    Shape(prompts=128, prompt=12, responses=1, response=16)
    """
    e, length, longest = experiment, experiment.sampling.length, experiment.prompt_length
    found = {
        SFT: Shape(e.sft.batch_size, longest, 1, length),
        TRUNK: Shape(e.sft.batch_size, longest, 1, length),
        REWARD: Shape(e.reward.batch_size, longest, 2, length),
        DRAWS: Shape(e.calibrate.chunk, longest, e.calibrate.responses, length),
        FORESIGHT: Shape(e.foresight.batch_size, longest, e.foresight.responses, length),
    }
    each = Shape(e.align.batch_size, longest, e.align.responses, length)
    return found | dict.fromkeys([*FRESH, UPDATE], each)


def least(experiment: Experiment, sizes: MeshConfig, name: str) -> float:
    """Bytes of a device that a phase takes at least: parameters, optimiser, caches, activations.

    >>> quick, one = Experiment("quick"), MeshConfig(1, replica=1)
    >>> least(quick, one, PREFILL) < least(quick, one, UPDATE)
    True
    """
    model, shape = model_of(experiment, name), shapes(experiment)[name]
    if name in (REWARD, SCORES):
        model = replace(model, logits_at_once=1)  # they have none
    if name in DRAWN:
        return memory_to_draw(model, experiment.sampling, shape, sizes)
    if name in LEARNS:
        read = 4 * arithmetic.parameters(model) if name == FORESIGHT else 0  # of π_ref, besides
        return memory_to_learn(model, shape, sizes) + read / (sizes.fsdp * sizes.tensor)
    seen = shape._replace(responses=0) if name == PREFILL else shape
    return arithmetic.scoring_memory(model, own(seen, sizes), sizes.fsdp) / sizes.tensor


def estimate(experiment: Experiment, sizes: MeshConfig, name: str) -> float:
    """Bytes of a device that a phase takes: those of an update times what was seen above the least.

    >>> quick, one = Experiment("quick"), MeshConfig(1, replica=1)
    >>> estimate(quick, one, UPDATE) > least(quick, one, UPDATE)
    True
    """
    kind = model_of(experiment, name).rematerialise
    taken = arithmetic.TAKEN[kind] if name in LEARNS else 1.0
    return taken * least(experiment, sizes, name)
