"""Attention by a library's fused kernel, where whole sequences pass through an accelerator.

Both functions mean what `attention.attend` means, and keep no score either (cuDNN is given the mask
as a bias, of a number for each query and key); what they give for padding is finite and otherwise
free. A kernel works on the arrays of one device: within
`runtime.mesh.within` each shard of the batch, and of the heads, calls it on its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from infalign_jax.batches import Array
from infalign_jax.lm.attention import KeyValues
from infalign_jax.runtime import shards

LANES, LARGEST = 128, 512  # keys of a block: the fewest that splash attention takes, and the most


def cudnn(
    q: Array, own: KeyValues, own_mask: Array, prefix: KeyValues | None, prefix_mask: Array | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:  # fmt: skip
    """Attention [B, G, K, R, Q, d] by cuDNN: every response beside a copy of its prompt's keys.

    cuDNN takes bfloat16 and heads of a multiple of 8 numbers up to 128 (`TransformerConfig` checks
    both), and with a mask only even lengths, to which queries and keys are filled up.

    >>> q, own = jnp.ones((1, 1, 1, 1, 2, 2)), jnp.array([[1.0, 3.0], [5.0, 7.0]])[None, None, None]
    >>> mask = jnp.array([[True, False], [True, True]])[None, None]
    >>> mixed = cudnn(q, KeyValues(0 * own, own), mask, None, None, "xla")
    >>> mixed[0, 0, 0, 0].tolist()
    [[1.0, 3.0], [3.0, 5.0]]
    """
    whole = partial(_cudnn, implementation=implementation)
    return _on_shards(whole, q, own, own_mask, prefix, prefix_mask)


def splash(
    q: Array, own: KeyValues, own_mask: Array, prefix: KeyValues | None, prefix_mask: Array | None,
    interpret: bool = False,
) -> Array:  # fmt: skip
    """Attention [B, G, K, R, Q, d] by JAX's splash attention on TPU: one call for each prompt.

    A prompt's K·T queries meet its own P keys, held once, and K·T keys of responses, of which only
    the blocks on the diagonal are computed. `own_mask` must be causal, with the same keys hidden
    from all later queries: its last row says which. `interpret` runs it on any device, slowly.

    >>> q, own = jnp.ones((1, 1, 1, 1, 2, 2)), jnp.array([[1.0, 3.0], [5.0, 7.0]])[None, None, None]
    >>> mask = jnp.array([[True, False], [True, True]])[None, None]
    >>> mixed = splash(q, KeyValues(0 * own, own), mask, None, None, interpret=True)
    >>> mixed[0, 0, 0, 0].tolist()
    [[1.0, 3.0], [3.0, 5.0]]
    """
    whole = partial(_splash, interpret=interpret)
    return _on_shards(whole, q, own, own_mask, prefix, prefix_mask)


def _on_shards(kernel: Callable[..., Array], q: Array, own: KeyValues, *others: Any) -> Array:
    """The kernel on what each device holds of the batch, and of the heads where they divide."""
    own_mask, prefix, prefix_mask = others
    own_mask = jnp.broadcast_to(own_mask, (len(q), *own_mask.shape[1:]))
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    rows = shards.rows(len(q))
    both = PartitionSpec(*rows, None if q.shape[1] % tensor else "tensor")
    divided = shards.by_shards(kernel, (both, both, rows, both, rows), both)
    return divided(q, own, own_mask, prefix, prefix_mask)


def _cudnn(
    q: Array, own: KeyValues, own_mask: Array, prefix: KeyValues | None, prefix_mask: Array | None,
    implementation: Literal["cudnn", "xla"],
) -> Array:  # fmt: skip
    b, g, k, r, length, d = q.shape
    mask = jnp.broadcast_to(own_mask, (b, k, *own_mask.shape[2:]))
    if prefix is not None and prefix_mask is not None:
        before = prefix.keys.shape[2]
        copied = (jnp.broadcast_to(x[:, :, None], (b, g, k, before, d)) for x in prefix)
        own = KeyValues(*map(partial(jnp.concatenate, axis=3), zip(copied, own, strict=True)))
        seen = jnp.broadcast_to(prefix_mask[:, None, None], (b, k, length, before))
        mask = jnp.concatenate([seen, mask], axis=-1)
    places = jnp.einsum("bgkrqd->bkqgrd", q).reshape(b * k, length, g * r, d)
    keys, values = (jnp.einsum("bgktd->bktgd", x).reshape(b * k, -1, g, d) for x in own)
    mask = mask.reshape(b * k, 1, length, -1)
    if odd := mask.shape[-1] % 2:
        keys, values = (_filled(x, 1, odd) for x in (keys, values))
        mask = _filled(mask, 3, odd)
    if odd := length % 2:
        places, mask = _filled(places, 1, odd), _filled(mask, 2, odd, True)
    mixed = jax.nn.dot_product_attention(
        places, keys, values, mask=mask, implementation=implementation
    )
    return jnp.einsum("bkqgrd->bgkrqd", mixed[:, :length].reshape(b, k, length, g, r, d))


def _filled(x: Array, axis: int, count: int, value: bool | int = 0) -> Array:
    """x with `count` more of a value at the end of an axis."""
    widths = [(0, count if axis == i else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


@dataclass(frozen=True)
class _Sharing(masks.Mask):
    """Queries of responses, one after the other, to a prompt's keys and then to their own.

    Rows beyond the last response are responses that see the prompt and themselves.
    """

    rows: int
    before: int
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.before + self.rows

    def __getitem__(self, slices: tuple[slice, slice]) -> np.ndarray:
        query, key = (np.arange(part.start, part.stop) for part in slices)
        query, key = query[:, None], key[None] - self.before
        same = query // self.length == key // self.length
        return (key < 0) | (same & (key <= query))


def _splash(
    q: Array, own: KeyValues, own_mask: Array, prefix: KeyValues | None, prefix_mask: Array | None,
    interpret: bool,
) -> Array:  # fmt: skip
    b, g, k, r, length, d = q.shape
    real = jnp.broadcast_to(own_mask[:, :, -1], (b, k, length)).reshape(b, -1)
    places = jnp.einsum("bgkrqd->bgrkqd", q * jnp.asarray(d**-0.5, q.dtype))
    places = places.reshape(b, g * r, -1, d)
    keys, values = (x.reshape(b, g, -1, d) for x in own)
    block, of_keys = _block(length), _block(length)
    spare = -places.shape[2] % block
    places, keys, values = (_filled(x, 2, spare) for x in (places, keys, values))
    real = theirs = _filled(real, 1, spare, True)
    if prefix is not None and prefix_mask is not None:
        of_keys = min(block, _block(prefix.keys.shape[2]))
        spare = -prefix.keys.shape[2] % of_keys
        keys, values = (
            jnp.concatenate([_filled(before, 2, spare), after], axis=2)
            for before, after in zip(prefix, (keys, values), strict=True)
        )
        theirs = jnp.concatenate([_filled(prefix_mask, 1, spare, False), real], axis=1)
    rows = places.shape[2]
    mask = _Sharing(rows, keys.shape[2] - rows, length)
    kernel = pallas.make_splash_mha(
        masks.MultiHeadMask([mask] * (g * r)),
        block_sizes=pallas.BlockSizes(*(block, of_keys, of_keys) * 2, block, of_keys),
        head_shards=1, q_seq_shards=1, interpret=interpret,
    )  # fmt: skip
    ids = pallas.SegmentIds(real.astype(jnp.int32), theirs.astype(jnp.int32))
    mixed = jax.vmap(kernel)(places, keys, values, ids)[:, :, : k * length]
    return jnp.einsum("bgrkqd->bgkrqd", mixed.reshape(b, g, r, k, length, d))


def _block(length: int) -> int:
    """The largest power of 2 within the length, where a block may be so small or large."""
    return min(max(1 << (length.bit_length() - 1), LANES), LARGEST)
