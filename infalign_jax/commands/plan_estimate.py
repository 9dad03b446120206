"""The memory of a phase on a device by arithmetic, where it is not compiled or not compiled yet."""

from math import prod

from infalign_jax import sampling
from infalign_jax.commands import plan_phases
from infalign_jax.commands.plan_phases import (
    DRAWS,
    FORESIGHT,
    PREFILL,
    REWARD,
    SAMPLER,
    SFT,
    TRUNK,
    UPDATE,
)
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.runtime.mesh import MeshConfig

LEARNS = (SFT, TRUNK, REWARD, FORESIGHT, UPDATE)
DRAWN = (DRAWS, SAMPLER)


def estimate(experiment: Experiment, sizes: MeshConfig, name: str) -> float:
    """Bytes that a phase takes: those of an update times what was seen above the least.

    >>> estimate(Experiment("quick"), MeshConfig(1, replica=1), UPDATE) > 0
    True
    """
    kind = plan_phases.model_of(experiment, name).rematerialise
    taken = arithmetic.TAKEN[kind] if name in LEARNS else 1.0
    return taken * least(experiment, sizes, name)


def least(experiment: Experiment, sizes: MeshConfig, name: str) -> float:
    """Bytes that a phase takes at least: parameters, their optimiser, caches and activations.

    >>> quick, one = Experiment("quick"), MeshConfig(1, replica=1)
    >>> least(quick, one, UPDATE) < estimate(quick, one, UPDATE)
    True
    """
    model, shards = plan_phases.model_of(experiment, name), sizes.fsdp
    shape = own(plan_phases.shapes(experiment)[name], sizes)
    if name in LEARNS:
        needed = arithmetic.update_memory(model, shape, shards)
    elif name in DRAWN:
        lanes = prod(sampling.side_by_side(experiment.sampling, shape.prompts, shape.responses))
        needed = arithmetic.sampling_memory(model, shape, shards, lanes)
    else:
        seen = shape._replace(responses=0) if name == PREFILL else shape
        needed = arithmetic.scoring_memory(model, seen, shards)
    return needed / sizes.tensor


def own(shape: Shape, sizes: MeshConfig) -> Shape:
    """What one device has of a batch.

    >>> own(Shape(8, 3, 4, 5), MeshConfig(2, 2, 1, 1)).prompts
    2
    """
    return shape._replace(prompts=-(-shape.prompts // sizes.parts))
