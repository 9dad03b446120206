"""A phase by arithmetic alone, where there is no compiler for the devices: GPUs that are not there.

Memory as `phases.py` has it; FLOPs and bytes as `lm/arithmetic.py`; over the network what
cannot be spared, in the compute type: a pass gathers the parameters that `fsdp` divides once, a
backward pass once more, and adds up the gradients; over `tensor` every layer adds up the results of
two products, a token each.
"""

from math import prod

from infalign_jax import phases, programs
from infalign_jax.commands.plan_compile import Compiled
from infalign_jax.commands.plan_phases import Phase
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.phases import FORESIGHT, LEARNS, PREFILL
from infalign_jax.runtime.accounts import Account
from infalign_jax.runtime.collectives import Collective, summed
from infalign_jax.runtime.mesh import BATCH, MeshConfig


def counted(experiment: Experiment, sizes: MeshConfig, name: str, phase: Phase) -> Compiled:
    """What a device needs for a phase, at least; memory as it was seen to be.

    >>> from infalign_jax.lm.arithmetic import Cost, Shape
    >>> phase = Phase(lambda: None, Shape(8, 12, 2, 14), lambda own, _: Cost(*own[:2]))
    >>> counted(Experiment("quick"), MeshConfig(2, 2, 1, 1), "prefill", phase).account[:2]
    (2.0, 12.0)
    """
    shards, own = sizes.fsdp, programs.own(phase.shape, sizes)
    moved = phase.cost(own, shards).bytes / sizes.tensor
    rows = own.prompts * own.prompt + (name != PREFILL) * own.tokens
    model = phases.model_of(experiment, name)
    found = network(model, sizes, rows, name in LEARNS)
    if name == FORESIGHT:  # which π_ref reads too
        found = summed([*found, *network(model, sizes, rows, learns=False)])
    account = Account(phase.flops / sizes.size, moved, found, (), ())
    return Compiled(int(phases.estimate(experiment, sizes, name)), None, account)


def network(
    model: TransformerConfig, sizes: MeshConfig, rows: int, learns: bool
) -> tuple[Collective, ...]:
    """What a device receives for a pass over so many tokens of its own, and to learn from it.

    >>> model = TransformerConfig(width=8, layers=3, heads=1, kv_heads=1, mlp_width=8)
    >>> for each in network(model, MeshConfig(1, 1, 2, 1), rows=5, learns=False):
    ...     print(*each)
    all-reduce ('tensor',) 6.0 960.0
    """
    item, f, t = model.dtype.itemsize, sizes.fsdp, sizes.tensor
    copies = prod(getattr(sizes, axis) for axis in BATCH if axis != "fsdp")
    whole = item * arithmetic.parameters(model) / t
    layers, passes = float(model.layers), 1 + learns
    between = tuple(axis for axis in BATCH if axis != "fsdp" and getattr(sizes, axis) > 1)
    found = [
        Collective("all-gather", ("fsdp",), layers * passes, passes * whole * (f - 1) / f),
        Collective(
            "all-reduce", ("tensor",), 2 * layers * passes,
            2 * layers * passes * rows * model.width * item * 2 * (t - 1) / t,
        ),
    ]  # fmt: skip
    if learns:
        found += [
            Collective("reduce-scatter", ("fsdp",), layers, whole * (f - 1) / f),
            Collective("all-reduce", between, layers, 2 * whole / f * (copies - 1) / copies),
        ]
    return tuple(each for each in found if each.bytes)
