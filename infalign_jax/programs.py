"""The jitted, sharded programs that stages, benchmarks and loops of one's own are made of.

Each is built once for a mesh, a model and a law, and compiles once for every shape it meets. The
update is `training.make_update`.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, PartitionSpec

from infalign_jax import reward, sampling
from infalign_jax.batches import Array, Prompts, Responses, Rollouts
from infalign_jax.drawing import SamplingConfig
from infalign_jax.lm import arithmetic, transformer
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.transformer import Params, TransformerConfig
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import shards

Sample = Callable[[Params, Prompts, Array], Rollouts]
Score = Callable[[Params, Prompts, Responses], Array]


@lru_cache(maxsize=16)
def boxed_params(config: TransformerConfig) -> Params:
    """The language model's parameters as shapes with logical axes.

    >>> boxed_params(TransformerConfig(vocab_size=300))["embedding"].value.shape
    (300, 64)
    """
    return jax.eval_shape(partial(transformer.initial_params, config), jax.random.key(0))


def initial_params(mesh: Mesh, config: TransformerConfig, key: Array) -> Params:
    """The language model's parameters, drawn and laid over the mesh.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> config = TransformerConfig(8, 4, 1, 1, 1, 4)
    >>> initial_params(mesh, config, jax.random.key(0))["embedding"].shape
    (8, 4)
    """
    layout = meshes.shardings(mesh, boxed_params(config))

    def drawn(key: Array) -> Params:
        return nn.unbox(transformer.initial_params(config, key))

    return jax.jit(drawn, out_shardings=layout)(key)


def memory_to_learn(model: TransformerConfig, shape: Shape, sizes: meshes.MeshConfig) -> float:
    """Bytes of a device that an update takes at least.

    >>> shape, two = Shape(4, 3, 4, 5), meshes.MeshConfig(2, replica=1)
    >>> memory_to_learn(TransformerConfig(), shape, two)
    2443264.0
    """
    return arithmetic.update_memory(model, own(shape, sizes), sizes.fsdp) / sizes.tensor


def memory_to_draw(
    model: TransformerConfig, law: SamplingConfig, shape: Shape, sizes: meshes.MeshConfig
) -> float:
    """Bytes of a device that drawing by a law takes at least.

    >>> shape, two = Shape(4, 3, 4, 5), meshes.MeshConfig(2, replica=1)
    >>> memory_to_draw(TransformerConfig(), SamplingConfig(5), shape, two)
    1073408.0
    """
    part = own(shape, sizes)
    lanes = prod(sampling.side_by_side(law, part.prompts, part.responses))
    return arithmetic.sampling_memory(model, part, sizes.fsdp, lanes) / sizes.tensor


def own(shape: Shape, sizes: meshes.MeshConfig) -> Shape:
    """What one device has of a batch.

    >>> own(Shape(8, 3, 4, 5), meshes.MeshConfig(2, 2, 1, 1)).prompts
    2
    """
    return shape._replace(prompts=-(-shape.prompts // sizes.parts))


@lru_cache(maxsize=16)
def make_sample(
    mesh: Mesh, config: TransformerConfig, law: SamplingConfig, responses: int
) -> Sample:
    """The sampler: (params, prompts, key) -> rollouts [B, K = `responses`].

    Every shard of the batch decodes its own rows, with the parameters gathered over `fsdp` before
    the first token. Without tensor parallelism nothing is communicated between tokens. With it,
    shards stay in step, as a collective that XLA makes of a `tensor` axis may wait for all devices:
    after every token they tell one another whether any goes on.

    >>> import flax.linen as nn, numpy as np
    >>> mesh, config = meshes.make(meshes.MeshConfig(), jax.devices()[:1]), TransformerConfig()
    >>> prompts = Prompts(*(np.ones((2, 3), kind) for kind in (np.int32, bool)), np.arange(2))
    >>> sample, params = make_sample(mesh, config, SamplingConfig(), 4), boxed_params(config)
    >>> rollouts = jax.eval_shape(sample, nn.unbox(params), prompts, jax.random.key(0))
    >>> rollouts.responses.tokens.shape  # B, K, T
    (2, 4, 16)
    """
    batch, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    alone = mesh.shape["tensor"] == 1

    def own(params: Params, prompts: Prompts, key: Array) -> Rollouts:
        others = {} if alone else {"any_shard": shards.anywhere}
        return sampling.sample(config, law, params, prompts, key, responses, **others)

    def sample(params: Params, prompts: Prompts, key: Array) -> Rollouts:
        operands = PartitionSpec(), batch.spec, PartitionSpec()
        axes = meshes.AXES if alone else meshes.BATCH
        return shards.by_shards(own, operands, batch.spec, axes)(params, prompts, key)

    layout = meshes.shardings(mesh, boxed_params(config))
    return jax.jit(
        shards.within(mesh, sample), in_shardings=(layout, batch, whole), out_shardings=batch
    )


@lru_cache(maxsize=16)
def make_rewards(mesh: Mesh, config: TransformerConfig, running: bool = False) -> Score:
    """The scorer: (reward parameters, prompts, responses) -> rewards [B, K].

    With `running` it gives what has been earned after every token, [B, K, T].

    >>> import flax.linen as nn, numpy as np
    >>> mesh, config = meshes.make(meshes.MeshConfig(), jax.devices()[:1]), TransformerConfig()
    >>> prompts = Prompts(*(np.ones((2, 3), kind) for kind in (np.int32, bool)), np.arange(2))
    >>> responses = Responses(*(np.ones((2, 4, 5), kind) for kind in (np.int32, bool)))
    >>> params = nn.unbox(reward.with_head(config, boxed_params(config)))
    >>> jax.eval_shape(make_rewards(mesh, config), params, prompts, responses).shape
    (2, 4)
    """
    layout = meshes.shardings(mesh, reward.with_head(config, boxed_params(config)))
    score = reward.running_rewards if running else reward.rewards
    return _batched(mesh, "score", partial(score, config), layout)


@lru_cache(maxsize=16)
def make_log_probs(mesh: Mesh, config: TransformerConfig) -> Score:
    """(params, prompts, responses) -> log π(y | x) [B, K].

    >>> import flax.linen as nn, numpy as np
    >>> mesh, config = meshes.make(meshes.MeshConfig(), jax.devices()[:1]), TransformerConfig()
    >>> prompts = Prompts(*(np.ones((2, 3), kind) for kind in (np.int32, bool)), np.arange(2))
    >>> responses = Responses(*(np.ones((2, 4, 5), kind) for kind in (np.int32, bool)))
    >>> params = nn.unbox(boxed_params(config))
    >>> jax.eval_shape(make_log_probs(mesh, config), params, prompts, responses).shape
    (2, 4)
    """
    layout = meshes.shardings(mesh, boxed_params(config))
    return _batched(mesh, "log_probs", partial(transformer.log_probs, config), layout)


def _batched(mesh: Mesh, name: str, function: Score, layout: Any) -> Score:
    batch = meshes.batch_sharding(mesh)

    def named(params: Params, prompts: Prompts, responses: Responses) -> Array:
        with jax.named_scope(name):
            return function(params, prompts, responses)

    named.__name__ = name
    return jax.jit(
        shards.within(mesh, named), in_shardings=(layout, batch, batch), out_shardings=batch
    )
