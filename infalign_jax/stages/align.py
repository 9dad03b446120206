"""The stage `align`: for each Φ and β, the KL-regularised RL of `learner.py`."""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import frontier, learner, notation, programs, rollout, training
from infalign_jax.batches import Prompts, Rollouts
from infalign_jax.data import minibatches
from infalign_jax.experiment import Experiment, PolicyConfig
from infalign_jax.lm import arithmetic, transformer
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.runtime import digests
from infalign_jax.runtime import mesh as meshes
from infalign_jax.stages.language import Model
from infalign_jax.stages.reference import Reference, pick
from infalign_jax.stages.run import Params, Prepare, Run, abstract, fit, put, stored
from infalign_jax.transformations import Transformation


class Target(NamedTuple):
    """What a policy is trained for: Φ, its β, and log Z at that β.

    >>> Target._fields
    ('transformation', 'beta', 'log_partition', 'kl')
    """

    transformation: Transformation
    beta: float
    log_partition: float
    kl: float  # of the optimum, in nats


@lru_cache(maxsize=64)
def target(policy: PolicyConfig) -> Target:
    """Φ with its β: the one given, or the one whose optimum has the KL asked for.

    Raises ValueError for a KL out of reach.

    >>> round(target(PolicyConfig("log", kl=0.6362943611)).beta, 3)
    0.333
    """
    name, beta = policy.transformation, policy.beta
    if beta is None:
        assert policy.kl is not None  # PolicyConfig sees to it
        beta = float(notation.beta_for_kl(name, policy.kl))
    phi = notation.transformation(name, beta)
    kl, _ = frontier.curve(phi, notation.procedure("standard"), beta)
    if policy.kl is not None and not abs(float(kl) / policy.kl - 1) < 0.01:
        raise ValueError(
            f"policies: expected a KL that {name} can be computed at, got kl={policy.kl:g} (the "
            f"nearest is {float(kl):.3g}); set another"
        )
    return Target(phi, beta, float(frontier.log_partition(phi, beta)), float(kl))


def align(
    run: Run, policy: PolicyConfig, start: Model, sft: Model, scorer: Model, reference: Reference
) -> Model:
    """One aligned policy. Its info has `beta` and `target_kl` beside what `fit` measures.

    >>> align.__name__
    'align'
    """
    options, experiment = run.experiment.align, run.experiment
    digest = digests.digest("align", start.digest, reference.digest, options, policy)
    layout = meshes.shardings(run.mesh, run.boxed)
    goal = target(policy)
    transform = training.optimiser(options.optimiser, options.steps)

    def make() -> tuple[Params, dict[str, Any]]:
        state = training.initial_state(run.mesh, run.boxed, start.params, transform)
        update = training.make_update(loss_of(run, goal), transform, run.mesh, run.boxed)
        rows = np.arange(len(reference.rewards))
        batches = minibatches(rows, options.batch_size, experiment.seed * 10 + 4)
        if options.solver == "regression":
            prepare = stored_rows(run, goal, reference)
        else:
            prepare = fresh_rows(run, goal, sft, scorer, reference)
        tokens = options.batch_size * options.responses * experiment.sampling.length
        params, info = fit(
            run, "align", digest, state, update, batches, options.steps, tokens,
            prepare, policy.name, step_flops(experiment),
        )  # fmt: skip
        return params, info | {"beta": goal.beta, "target_kl": goal.kl}

    params, info = stored(run, "align", digest, abstract(run.boxed, layout), make)
    return Model(params, digest, info)


def step_flops(experiment: Experiment) -> float:
    """The model's FLOPs in one RL step, by arithmetic; responses count at full length.

    >>> step_flops(Experiment("quick")) > 0
    True
    """
    options, model = experiment.align, experiment.model
    shape = Shape(
        options.batch_size, experiment.prompt_length, options.responses, experiment.sampling.length
    )
    parts = [arithmetic.update(model, shape)]
    if options.solver == "policy_gradient":
        parts += [arithmetic.prefill(model, shape), arithmetic.decode(model, shape)]
        parts += [arithmetic.forward(model, shape, logits=logits) for logits in (False, True)]
    return sum(part.flops for part in parts)


def loss_of(run: Run, goal: Target) -> training.Loss:
    """The learner's loss for this target, by the solver and baseline of the configuration.

    >>> from pathlib import Path
    >>> from infalign_jax.experiment import AlignConfig, Experiment
    >>> run = Run(Experiment("quick", align=AlignConfig(solver="regression")), Path("runs"), None)
    >>> loss_of(run, Target(lambda u: u, 0.1, 0.0, 0.5)).__qualname__
    'regression.<locals>.loss'
    """
    options = run.experiment.align
    log_probs = partial(transformer.log_probs, run.experiment.model)
    if options.solver == "regression":
        return learner.regression(log_probs, goal.beta, goal.log_partition)
    return learner.policy_gradient(log_probs, goal.beta, goal.log_partition, options.baseline)


def fresh_rows(run: Run, goal: Target, sft: Model, scorer: Model, reference: Reference) -> Prepare:
    """On-policy batches: prompts -> rollouts -> rewards -> quantiles -> Φ.

    >>> fresh_rows.__name__
    'fresh_rows'
    """
    model, law = run.experiment.model, run.experiment.sampling
    parts = rollout.Parts(
        programs.make_sample(run.mesh, model, law, run.experiment.align.responses),
        partial(programs.make_rewards(run.mesh, run.experiment.scorer), scorer.params),
        partial(programs.make_log_probs(run.mesh, model), sft.params),
        rollout.make_rank(run.mesh, goal.transformation),
    )
    whole = meshes.replicated(run.mesh)
    key_of = jax.jit(lambda step: jax.random.fold_in(run.key(6), step), out_shardings=whole)

    def prepare(params: Params, rows: np.ndarray, step: int) -> learner.Batch:
        prompts: Prompts = put(run, jax.tree.map(lambda leaf: leaf[rows], reference.prompts))
        table = put(run, reference.sorted_rewards[rows])
        key = key_of(meshes.put_whole(np.uint32(step), run.mesh))
        return rollout.batch(parts, params, prompts, table, key)

    return prepare


def stored_rows(run: Run, goal: Target, reference: Reference) -> Prepare:
    """Offline batches: some of the stored reference responses, with their own ranks.

    >>> from pathlib import Path
    >>> from infalign_jax.batches import Responses
    >>> from infalign_jax.experiment import AlignConfig, Experiment
    >>> mesh, few = meshes.make(meshes.MeshConfig(), jax.devices()[:1]), AlignConfig(responses=2)
    >>> run = Run(Experiment("quick", align=few), Path("runs"), mesh)
    >>> prompts = Prompts(np.ones((5, 3)), np.ones((5, 3)), np.arange(5))
    >>> ranks = (np.arange(40, dtype=np.float32).reshape(5, 8) + 0.5) / 40
    >>> tokens = Responses(np.ones((5, 8, 4)), np.ones((5, 8, 4), bool))
    >>> reference = Reference(prompts, tokens, ranks, ranks, ranks[..., None], ranks, ranks, "", {})
    >>> goal = Target(lambda u: 2 * u, 0.1, 0.0, 0.5)
    >>> batch = stored_rows(run, goal, reference)(None, np.array([1, 4]), 0)
    >>> batch.rewards.shape, bool((batch.rewards == 2 * batch.quantiles).all())
    ((2, 2), True)
    """
    count = run.experiment.align.responses
    rewards = np.asarray(jax.jit(goal.transformation)(jnp.asarray(reference.quantiles)))

    def prepare(params: Params, rows: np.ndarray, step: int) -> learner.Batch:
        prompts, at = pick(reference, rows, count, [run.experiment.seed, 5, step])
        responses = jax.tree.map(lambda leaf: leaf[at], reference.responses)
        log_ref = reference.log_probs[at]
        rollouts = Rollouts(prompts, responses, log_ref)
        return put(
            run,
            learner.Batch(
                rollouts, rewards[at], log_ref, reference.quantiles[at], reference.rewards[at]
            ),
        )

    return prepare
