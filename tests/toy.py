"""A transformer small enough to test, with prompts and responses of unequal length."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax.batches import Prompts, Responses
from infalign_jax.lm import transformer
from infalign_jax.lm.transformer import TransformerConfig

SIZES: dict[str, Any] = {
    "vocab_size": 12, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24,
}  # fmt: skip


def config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**SIZES | changes)


def params(model: TransformerConfig, seed: int = 0) -> Any:
    """Every leaf drawn at random, the norms' scales too, and larger than at initialisation."""
    boxed = jax.eval_shape(lambda: transformer.initial_params(model, jax.random.key(seed)))
    rng = np.random.default_rng(seed)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.4 * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(boxed))


def prompts(lengths: tuple[int, ...] = (6, 1, 4), seed: int = 1) -> Prompts:
    """One prompt of each length, numbered 10, 11, …, in P = 6 places."""
    rng = np.random.default_rng(seed)
    mask = np.arange(6) >= 6 - np.array(lengths)[:, None]
    tokens = np.where(mask, rng.integers(3, 12, mask.shape), 0)
    index = jnp.arange(10, 10 + len(lengths), dtype=jnp.int32)
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), index)


def responses(batch: int = 3, count: int = 2, seed: int = 2) -> Responses:
    """Responses of 1 to 5 tokens in T = 5 places."""
    rng = np.random.default_rng(seed)
    mask = np.arange(5) < rng.integers(1, 6, (batch, count, 1))
    tokens = np.where(mask, rng.integers(2, 12, mask.shape), 0)
    return Responses(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))


def take(rows: Any, index: list[int]) -> Any:
    return jax.tree.map(lambda leaf: leaf[jnp.array(index)], rows)
