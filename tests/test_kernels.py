"""The kernels of libraries against the plain attention: values, gradients, padding, shards."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import toy
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from jax.sharding import AxisType

from infalign_jax import programs
from infalign_jax.batches import Array
from infalign_jax.commands import bench
from infalign_jax.lm import attention, kernels, transformer
from infalign_jax.lm.attention import KeyValues
from infalign_jax.runtime import mesh as meshes

WIDE = jnp.dtype("float32")
B, G, R, d = 2, 2, 2, 8
Operands = tuple[Array, KeyValues, Array, KeyValues | None, Array | None]

KERNELS: dict[str, Callable[..., Array]] = {
    "cudnn": partial(kernels.cudnn, implementation="xla"),
    "splash": partial(kernels.splash, interpret=True),
}


def operands(K: int, T: int, P: int) -> tuple[Operands, Array]:
    """Responses that end early, or with P = 0 prompts that begin late; which tokens are real."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), WIDE)

    own = KeyValues(normal(B, G, K, T, d), normal(B, G, K, T, d))
    lengths = np.array([[1], [T - 1]])[..., None] if P else np.array([[1], [T]])[..., None]
    places = np.arange(T) if P else np.arange(T)[::-1]
    real = np.broadcast_to(places < lengths, (B, K, T))
    mask = np.tril(np.ones((T, T), bool)) & real[:, :, None] | np.eye(T, dtype=bool)
    q = normal(B, G, K, R, T, d)
    if not P:
        return (q, own, jnp.asarray(mask), None, None), jnp.asarray(real)
    prefix = KeyValues(normal(B, G, P, d), normal(B, G, P, d))
    before = jnp.asarray(np.arange(P) >= np.array([[0], [P - 1]]))
    return (q, own, jnp.asarray(mask), prefix, before), jnp.asarray(real)


def outcome(attend: Any, inputs: Operands, real: Array) -> Any:
    """Attention at the real tokens, and what their gradients are; padding's are only finite."""
    q, own, own_mask, prefix, prefix_mask = inputs
    seen = real[:, None, :, None, :, None]

    def total(q: Array, own: KeyValues, prefix: KeyValues | None) -> tuple[Array, Array]:
        mixed = attend(q, own, own_mask, prefix, prefix_mask)
        assert mixed.shape == q.shape
        return jnp.where(seen, jnp.sin(mixed), 0.0).sum(), mixed

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, mixed), gradients = run(q, own, prefix)
    assert bool(jnp.isfinite(mixed).all())
    return jnp.where(seen, mixed, 0.0), gradients


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("K", "T", "P"), [(3, 5, 7), (1, 7, 0)])
def test_a_kernel_is_the_plain_attention(kernel: str, K: int, T: int, P: int) -> None:
    inputs, real = operands(K, T, P)
    found = outcome(KERNELS[kernel], inputs, real)
    plain = outcome(lambda *own: attention.attend(*own, WIDE), inputs, real)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, plain)


def test_responses_that_straddle_blocks_are_attended_to() -> None:
    """Blocks of 128 queries and keys: the second response lies in the second and the third."""
    inputs, real = operands(K=2, T=150, P=140)
    found = KERNELS["splash"](*inputs)
    plain = attention.attend(*inputs, WIDE)
    seen = real[:, None, :, None, :, None]
    np.testing.assert_allclose(
        jnp.where(seen, found, 0.0), jnp.where(seen, plain, 0.0), rtol=1e-5, atol=1e-6
    )


def test_other_responses_are_not_even_read() -> None:
    """What is read and hidden would spread: 0 · NaN is NaN."""
    (q, own, own_mask, prefix, before), _ = operands(K=3, T=128, P=128)
    with jax.debug_nans(False):
        spoilt = own._replace(values=own.values.at[:, :, 1].set(jnp.nan))
        mixed = KERNELS["splash"](q, spoilt, own_mask, prefix, before)
    assert jnp.isfinite(mixed).all(axis=(0, 1, 3, 4, 5)).tolist() == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_scores_alike(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, kernel, KERNELS[kernel])
    x, y = toy.prompts(), toy.responses()
    found = []
    for kind in ("plain", kernel):
        config = toy.config(width=32, compute="bfloat16", attention=kind)
        score = jax.jit(partial(transformer.token_log_probs, config))
        with jax.numpy_dtype_promotion("standard"):  # for jax.nn's attention by XLA
            found.append(score(toy.params(config), x, y))
    np.testing.assert_allclose(*found, rtol=0.05, atol=0.05)
    assert not np.array_equal(*found)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on NVIDIA's GPUs alone")
@pytest.mark.parametrize(("K", "T", "P"), [(3, 5, 7), (1, 7, 0), (2, 64, 32)])
def test_cudnn_itself_is_the_plain_attention(K: int, T: int, P: int) -> None:
    """In bfloat16, whose rounding of operands the plain attention is given too."""
    (q, own, own_mask, prefix, before), real = operands(K, T, P)
    q, own, prefix = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (q, own, prefix))
    with jax.numpy_dtype_promotion("standard"):
        found = outcome(kernels.cudnn, (q, own, own_mask, prefix, before), real)
        q, own, prefix = jax.tree.map(lambda x: x.astype(WIDE), (q, own, prefix))
        rounded = (q, own, own_mask, prefix, before)
        plain = outcome(lambda *own: attention.attend(*own, WIDE), rounded, real)

    def check(a: Array, b: Array) -> None:
        difference = np.linalg.norm(np.asarray(a, np.float32) - b)
        assert difference <= 1e-2 * np.linalg.norm(b)

    jax.tree.map(check, found, plain)


def test_cudnn_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX checks the shapes when it lowers: here for odd lengths, without a GPU."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91_000)
    config = toy.config(width=32, compute="bfloat16", attention="cudnn")
    params, x, y = nn.unbox(programs.boxed_params(config)), toy.prompts(), toy.responses()

    def total(params: Any) -> Array:
        return transformer.log_probs(config, params, x, y).sum()

    program = jax.jit(jax.grad(total)).trace(params).lower(lowering_platforms=("cuda",))
    assert program.as_text().count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 2  # both streams


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, test_kernels as own
from infalign_jax.lm import attention
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import shards
mesh = meshes.make(meshes.MeshConfig(data=1, fsdp=2, tensor=2))
inputs, real = own.operands(1, 3, 2)
there = jax.device_put(inputs, meshes.batch_sharding(mesh))
plain = own.outcome(lambda *own_: attention.attend(*own_, own.WIDE), inputs, real)
check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
for kernel in own.KERNELS.values():
    jax.tree.map(check, own.outcome(shards.within(mesh, kernel), there, real), plain)
print(jax.device_count())
"""


@pytest.mark.slow
def test_shards_attend_on_their_own() -> None:
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")])
    flags = "--xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=env,
        check=True,
        capture_output=True,
        timeout=processes.PATIENCE,
    )
    assert done.stdout.decode().strip() == "4"


@pytest.mark.parametrize(("batch", "heads"), [(4, 4), (4, 3), (3, 4)])
def test_what_a_mesh_does_not_divide_is_computed_whole(
    batch: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recorded(q: Array, *_: Any, implementation: str) -> Array:
        seen.append(q.shape[:2])
        return q

    monkeypatch.setattr(kernels, "_cudnn", recorded)
    kinds = (AxisType.Auto,) * len(meshes.AXES)
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 2), meshes.AXES, axis_types=kinds)
    shapes = jax.ShapeDtypeStruct((batch, heads, 1, 1, 2, 8), WIDE)
    own = KeyValues(*[jax.ShapeDtypeStruct((batch, heads, 1, 2, 8), WIDE)] * 2)
    mask = jax.ShapeDtypeStruct((1, 1, 2, 2), bool)

    def traced(q: Array, own: KeyValues, mask: Array) -> Array:
        with jax.sharding.use_abstract_mesh(mesh):
            return kernels.cudnn(q, own, mask, None, None)

    jax.eval_shape(traced, shapes, own, mask)
    assert seen == [(batch // 2 if batch == 4 else batch, heads // 2 if heads == 4 else heads)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "cudnn"}, "got float32 and 4; use attention=plain"),
        ({"attention": "cudnn", "compute": "bfloat16"}, "multiple of 8 .* got bfloat16 and 4"),
        ({"attention": "cudnn", "compute": "bfloat16", "width": 544}, "at most 128 .* and 136"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        toy.config(**changes)


@pytest.mark.usefixtures("x64")
def test_splash_attention_has_no_double_precision() -> None:
    with pytest.raises(ValueError, match="float32 or bfloat16 compute for splash"):
        toy.config(attention="splash", compute="float64")


@pytest.mark.parametrize(
    ("platform", "maker", "compute", "chosen"),
    [
        ("cpu", "cpu", None, "plain"),
        ("gpu", "cuda 9.0", None, "cudnn"),
        ("gpu", "cuda 9.0", "float32", "plain"),
        ("gpu", "cuda 7.5", None, "plain"),
        ("gpu", "rocm 9.0", None, "plain"),
        ("tpu", "tpu", None, "splash"),
        ("tpu", "tpu", "float32", "splash"),
    ],
)
def test_the_bench_takes_the_device_s_kernel(
    platform: str, maker: str, compute: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [a_device(platform, maker, 80)])
    assert bench.fitted("125m", compute).attention == chosen


def a_device(platform: str, maker: str, memory: int) -> SimpleNamespace:
    """With so many GiB."""
    return SimpleNamespace(
        platform=platform,
        client=SimpleNamespace(platform_version=maker),
        compute_capability=maker[-3:],
        memory_stats=lambda: {"bytes_limit": memory * 2**30},
    )


@pytest.mark.parametrize(
    ("platform", "memory", "kept", "unroll"),
    [
        ("gpu", 80, "nothing", 12),
        ("gpu", 16, "cheap", 1),
        ("gpu", 8, "everything", 1),
        ("tpu", 80, "nothing", 1),
    ],
)
def test_the_bench_keeps_what_memory_has_room_for(
    platform: str, memory: int, kept: str, unroll: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preset of 125m takes 18.6 GiB of a GPU's with all kept, 14.7 of a TPU's with "cheap"."""
    monkeypatch.setattr(jax, "devices", lambda: [a_device(platform, "cuda 9.0", memory)])
    model = bench.fitted("125m")
    assert (model.rematerialise, model.unroll) == (kept, unroll)
    monkeypatch.setattr(jax, "devices", lambda: [a_device(platform, "cuda 9.0", memory)] * 16)
    assert bench.fitted("125m").rematerialise == "nothing"
