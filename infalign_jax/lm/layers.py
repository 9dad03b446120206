"""The layers of the transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Tokens come as [B, K, Q]: Q tokens of K responses to each of B prompts (K = 1 for the prompts
themselves). What reads the same input is computed in one product: queries, keys and values of a
key-value head, which stand side by side as R + 2 heads, and the MLP's two halves. Reductions are in
`config.wide`.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from infalign_jax.batches import Array
from infalign_jax.lm.attention import KeyValues, attend

PRODUCT = "product"  # what cheap rematerialisation keeps


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; `vocab_size` comes from the tokenizer.

    >>> TransformerConfig(width=64, heads=4).head_size
    16
    """

    vocab_size: int = 512
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 192
    rope_base: float = 10_000.0
    compute: Literal["float32", "bfloat16", "float64"] = "float32"  # parameters stay float32
    attention: Literal["plain", "cudnn", "splash"] = "plain"  # in passes over whole sequences
    rematerialise: Literal["nothing", "cheap", "everything"] = "nothing"  # in backward passes
    unroll: int = 1  # layers compiled in one piece: on CPU a scan's body does without threads
    logits_at_once: int = 2**24  # of a device, when the vocabulary is summed over

    def __post_init__(self) -> None:
        least = min(self.vocab_size, self.width, self.layers, self.kv_heads, self.mlp_width)
        if min(least, self.heads, self.unroll, self.logits_at_once) < 1:
            raise ValueError(f"model: expected sizes of at least 1, got {self}; raise them")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"model: expected a width that gives every head an even size, got width "
                f"{self.width} and {self.heads} heads; use a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model: expected heads to be a multiple of kv_heads, got {self.heads} and "
                f"{self.kv_heads}; choose kv_heads among the divisors of heads"
            )
        if self.compute == "float64" and jnp.result_type(float) != self.dtype:
            raise ValueError(
                "model: expected float32 or bfloat16 compute, got float64; JAX computes in it "
                "only with JAX_ENABLE_X64=1 in the environment"
            )
        self._check_attention()

    def _check_attention(self) -> None:
        d = self.head_size
        if self.attention == "cudnn" and (self.compute != "bfloat16" or d % 8 or d > 128):
            raise ValueError(
                "model: expected bfloat16 compute and a head size that is a multiple of 8 and at "
                f"most 128 for cudnn attention, got {self.compute} and {d}; use attention=plain"
            )
        if self.attention == "splash" and self.compute == "float64":
            raise ValueError(
                "model: expected float32 or bfloat16 compute for splash attention, got float64; "
                "use attention=plain"
            )

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute)

    @property
    def wide(self) -> jnp.dtype:
        """What reductions and logits are computed in: at least float32."""
        return jnp.dtype("float64" if self.compute == "float64" else "float32")


class Weights(NamedTuple):
    """One layer's parameters as they are multiplied, in the compute type."""

    attention_norm: Array  # [D], in `config.wide`
    qkv: Array  # [D, G, R + 2, d]
    out: Array  # [H·d, D]
    mlp_norm: Array  # [D], in `config.wide`
    gate_up: Array  # [D, 2, M]
    down: Array  # [M, D]


def weights(config: TransformerConfig, params: Any) -> Weights:
    """Lays one layer's parameters side by side.

    >>> config = TransformerConfig(width=8, heads=4, kv_heads=2, mlp_width=3)
    >>> shapes = {"query": (8, 8), "key": (8, 4), "value": (8, 4), "out": (8, 8)}
    >>> shapes |= {"gate": (8, 3), "up": (8, 3), "down": (3, 8)}
    >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    >>> params |= {f"{name}_norm": {"scale": jnp.ones(8)} for name in ("attention", "mlp")}
    >>> weights(config, params).qkv.shape
    (8, 2, 4, 2)
    """
    c = config
    shape = (c.width, c.kv_heads, -1, c.head_size)
    qkv = [params[name].astype(c.dtype).reshape(shape) for name in ("query", "key", "value")]
    gate_up = [params[name].astype(c.dtype) for name in ("gate", "up")]
    return Weights(
        attention_norm=params["attention_norm"]["scale"].astype(c.wide),
        qkv=jnp.concatenate(qkv, axis=2),
        out=params["out"].astype(c.dtype),
        mlp_norm=params["mlp_norm"]["scale"].astype(c.wide),
        gate_up=jnp.stack(gate_up, axis=1),
        down=params["down"].astype(c.dtype),
    )


class Stream(NamedTuple):
    """Where the tokens of one forward pass stand, and what each may attend to."""

    turns: Array  # [2, B, 1 or K, Q, d / 2]: cosine and sine of their positions' angles
    own_mask: Array  # bool[B or 1, 1 or K, Q, keys of the same stream]
    prefix_mask: Array | None  # bool[B, P], where there is a prefix


@jax.custom_vjp
def project(x: Array, weight: Array) -> Array:
    """x[..., D] @ weight[D, ...], with the gradient of the weight as xᵀg or (gᵀx)ᵀ.

    XLA on CPU transposes the first factor and computes all that made it again, column by column, to
    do so: the first is the narrower of x and g.

    >>> x, weight = jnp.ones((3, 2)), jnp.eye(2)
    >>> jax.grad(lambda weight: project(x, weight).sum())(weight).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    return jnp.tensordot(x, weight, 1)


def _project(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return project(x, weight), (x, weight)


def _project_back(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = kept
    rows = tuple(range(x.ndim - 1))
    outputs = tuple(range(x.ndim - 1, g.ndim)), tuple(range(1, weight.ndim))
    to_x = jnp.tensordot(g, weight, outputs)
    if x.shape[-1] <= weight.size // len(weight):
        return to_x, jnp.tensordot(x, g, (rows, rows))
    return to_x, jnp.moveaxis(jnp.tensordot(g, x, (rows, rows)), -1, 0)


project.defvjp(_project, _project_back)


def turns(config: TransformerConfig, positions: Array) -> Array:
    """Cosine and sine [2, ..., d / 2] of the angles that positions[...] are turned by.

    >>> round(float(turns(TransformerConfig(), jnp.array([1]))[1, 0, 0]), 4)  # sin 1
    0.8415
    """
    half = config.head_size // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=config.wide) / half)
    angle = positions[..., None].astype(config.wide) * frequency[(None,) * positions.ndim]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)]).astype(config.dtype)


def rotate(x: Array, turned: Array) -> Array:
    """Rotary embedding of x[..., heads, d] by `turns` [2, ..., d / 2] (arXiv 2104.09864).

    >>> from math import cos, sin
    >>> turned = jnp.array([[[cos(1)]], [[sin(1)]]])
    >>> x = jnp.array([[[1.0, 0.0]]])
    >>> bool(jnp.allclose(rotate(x, turned), jnp.array([[[cos(1), sin(1)]]])))
    True
    """
    cos, sin = (part[..., None, :] for part in turned)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def rms_norm(x: Array, scale: Array) -> Array:
    """Root-mean-square normalisation of x[..., D] (arXiv 1910.07467), in the type of `scale`.

    >>> normal = rms_norm(jnp.array([1.0, 7.0]), jnp.array([5.0, 10.0]))
    >>> bool(jnp.allclose(normal, jnp.array([1.0, 14.0])))
    True
    """
    wide = x.astype(scale.dtype)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale[(None,) * (x.ndim - 1)]).astype(x.dtype)


def queries_keys_values(
    config: TransformerConfig, w: Weights, x: Array, turned: Array
) -> tuple[Array, KeyValues]:
    """Queries [B, G, K, R, Q, d], keys and values [B, G, K, Q, d] of x[B, K, Q, D].

    >>> config = TransformerConfig(width=8, heads=4, kv_heads=2, mlp_width=3)
    >>> w = Weights(jnp.ones(8), jnp.ones((8, 2, 4, 2)), jnp.ones((8, 8)), jnp.ones(8),
    ...     jnp.ones((8, 2, 3)), jnp.ones((3, 8)))
    >>> turned = turns(config, jnp.zeros((1, 1, 5)))
    >>> q, own = queries_keys_values(config, w, jnp.ones((1, 3, 5, 8)), turned)
    >>> q.shape, own.keys.shape
    ((1, 2, 3, 2, 5, 2), (1, 2, 3, 5, 2))
    """
    repeats = config.heads // config.kv_heads
    heads = _product(rms_norm(x, w.attention_norm), w.qkv)  # [B, K, Q, G, R + 2, d]
    turning, values = jax.lax.split(heads, (repeats + 1, 1), axis=4)
    q, keys = jax.lax.split(rotate(turning, turned[:, :, :, :, None]), (repeats, 1), axis=4)
    own = (jnp.einsum("bkqgd->bgkqd", part[..., 0, :]) for part in (keys, values))
    return jnp.einsum("bkqgrd->bgkrqd", q), KeyValues(*own)


def finish(config: TransformerConfig, w: Weights, x: Array, mixed: Array) -> Array:
    """The rest of a layer: x[B, K, Q, D] with what was attended to [B, G, K, R, Q, d], and MLP.

    >>> config = TransformerConfig(width=8, heads=4, kv_heads=2, mlp_width=3)
    >>> x, mixed = jnp.ones((1, 3, 5, 8)), jnp.ones((1, 2, 3, 2, 5, 2))
    >>> w = Weights(jnp.ones(8), jnp.ones((8, 2, 4, 2)), jnp.ones((8, 8)), jnp.ones(8),
    ...     jnp.ones((8, 2, 3)), jnp.ones((3, 8)))
    >>> finish(config, w, x, mixed).shape
    (1, 3, 5, 8)
    """
    mixed = jnp.einsum("bgkrqd->bkqgrd", mixed)
    x = x + _product(mixed.reshape(*x.shape[:-1], -1), w.out)
    return x + _down(_product(rms_norm(x, w.mlp_norm), w.gate_up), w.down)


def _product(x: Array, weight: Array) -> Array:
    return checkpoint_name(project(x, weight), PRODUCT)


@jax.checkpoint
def _down(gate_up: Array, down: Array) -> Array:
    gate, up = jax.lax.split(gate_up, (1, 1), axis=gate_up.ndim - 2)
    return project((jax.nn.silu(gate) * up)[..., 0, :], down)


def layer(
    config: TransformerConfig, w: Weights, x: Array, prefix: KeyValues | None, stream: Stream
) -> tuple[Array, KeyValues]:
    """One layer on x[B, K, Q, D]: its output, and the stream's keys and values.

    >>> config = TransformerConfig(width=8, heads=4, kv_heads=2, mlp_width=3)
    >>> seen = jnp.tril(jnp.ones((1, 1, 5, 5), bool))
    >>> stream = Stream(turns(config, jnp.zeros((1, 1, 5))), seen, None)
    >>> w = Weights(jnp.ones(8), jnp.ones((8, 2, 4, 2)), jnp.ones((8, 8)), jnp.ones(8),
    ...     jnp.ones((8, 2, 3)), jnp.ones((3, 8)))
    >>> out, own = layer(config, w, jnp.ones((1, 3, 5, 8)), None, stream)
    >>> out.shape, own.values.shape
    ((1, 3, 5, 8), (1, 2, 3, 5, 2))
    """
    q, own = queries_keys_values(config, w, x, stream.turns)
    operands = q, own, stream.own_mask, prefix, stream.prefix_mask
    match config.attention:
        case "plain":
            mixed = attend(*operands, config.wide)
        case "cudnn":
            from infalign_jax.lm import kernels  # here: Pallas is slow to import

            mixed = kernels.cudnn(*operands)
        case "splash":
            from infalign_jax.lm import kernels

            mixed = kernels.splash(*operands)
    return finish(config, w, x, mixed), own
