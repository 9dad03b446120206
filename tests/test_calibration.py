"""Quantiles against counting by hand, and the best map that does not look at the prompt."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from infalign_jax import calibration

# More than this many reference rewards are searched, not counted through.
SEARCHED = 300


def mid_ranks(rewards, reference):
    """û by counting, a row at a time."""
    below = (reference[..., None, :] < rewards[..., :, None]).sum(-1)
    equal = (reference[..., None, :] == rewards[..., :, None]).sum(-1)
    return (below + equal / 2 + 0.5) / (reference.shape[-1] + 1)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("k_ref", [1, 2, 7, 128, SEARCHED])
def test_quantiles_agree_with_counting_ties_included(leading, k_ref, precision):
    generator = np.random.default_rng(k_ref)
    rewards = generator.integers(-3, 4, (*leading, 5)).astype(precision)
    reference = np.sort(generator.integers(-3, 4, (*leading, k_ref)).astype(precision), axis=-1)
    quantiles = jax.jit(calibration.calibrate)(jnp.asarray(rewards), jnp.asarray(reference))
    assert quantiles.dtype == precision
    np.testing.assert_allclose(quantiles, mid_ranks(rewards, reference), rtol=1e-6)
    assert jnp.all((quantiles > 0) & (quantiles < 1))


@pytest.mark.parametrize("k_ref", [129, 255, 256, 257])
def test_no_reward_is_missed_about_powers_of_two(k_ref):
    reference = np.arange(k_ref, dtype=np.float32)[None]
    rewards = np.arange(-1, 2 * k_ref + 1, dtype=np.float32)[None] / 2  # each one, and between
    quantiles = calibration.calibrate(rewards, reference)
    np.testing.assert_allclose(quantiles, mid_ranks(rewards, reference), rtol=1e-6)


def test_a_member_of_the_reference_set_is_left_out(precision):
    reference = np.sort(np.random.default_rng(0).integers(0, 6, (2, 9)), axis=1).astype(precision)
    quantiles = calibration.calibrate(
        jnp.asarray(reference), jnp.asarray(reference), leave_one_out=True
    )
    for row, k in itertools.product(range(2), range(9)):
        expected = mid_ranks(reference[row, k : k + 1], np.delete(reference[row], k))
        np.testing.assert_allclose(quantiles[row, k], expected[0], rtol=1e-6)


def test_each_prompt_has_a_scale_of_its_own():
    generator = np.random.default_rng(1)
    reference = np.sort(generator.normal(size=(1, 64)), axis=1)
    rewards = generator.normal(size=(1, 8))
    stretched = [np.concatenate([x, np.exp(3 * x) - 50]) for x in (rewards, reference)]
    quantiles = calibration.calibrate(*(jnp.asarray(x, jnp.float32) for x in stretched))
    np.testing.assert_array_equal(quantiles[0], quantiles[1])


def test_bfloat16_rewards_give_float32_quantiles():
    reference = jnp.arange(1000.0, dtype=jnp.bfloat16)[None]
    quantiles = calibration.calibrate(reference[:, :3], reference)
    assert quantiles.dtype == jnp.float32


def test_other_prompts_are_refused():
    with pytest.raises(ValueError, match=r"leading dimensions \(3,\).*got \(2,\)"):
        calibration.calibrate(jnp.zeros((3, 4)), jnp.zeros((2, 8)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_refused_by_its_place(wrong):
    rewards = np.zeros((3, 4), np.float32)
    rewards[2, 1] = wrong
    where = f"got {np.float32(wrong)} at prompt 2, sample 1: find out why"
    with pytest.raises(ValueError, match=f"finite reference rewards, {where}"):
        calibration.sorted_reference(rewards)
    with pytest.raises(ValueError, match=f"finite rewards, {where}"):
        calibration.calibrate(rewards, np.zeros((3, 8), np.float32))
    with pytest.raises(ValueError, match="finite reference rewards, got"):
        calibration.calibrate(np.zeros((3, 8), np.float32), rewards)


@pytest.mark.parametrize("k_ref", [3, SEARCHED])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_under_jit_what_is_not_finite_gives_nan_and_nothing_else_does(wrong, k_ref):
    rewards = np.array([[1.0, wrong, 2.0], [1.0, 1.5, 2.0], [1.0, 1.5, 2.0]], np.float32)
    reference = np.tile(np.linspace(0, 3, k_ref, dtype=np.float32), (3, 1))
    reference[1, 0 if wrong < 0 else -1] = wrong  # where sorting puts it
    with jax.debug_nans(False):
        found = jax.jit(calibration.calibrate)(rewards, reference)
        assert np.isnan(found).tolist() == [[False, True, False], [True] * 3, [False] * 3]
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        calibration.calibrate(jnp.asarray(rewards), jnp.asarray(reference))


def test_reference_rewards_out_of_order_are_refused():
    reference = np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]])
    with pytest.raises(ValueError, match="ascending order, got a fall after prompt 1, sample 1"):
        calibration.calibrate(np.zeros((2, 1)), reference)


@pytest.mark.parametrize("shape", [(2, 0), (0,)])
def test_no_reference_at_all_is_refused(shape):
    with pytest.raises(ValueError, match="K_ref at least 1, got"):
        calibration.sorted_reference(np.zeros(shape))
    with pytest.raises(ValueError, match="K_ref at least 1, got"):
        jax.jit(calibration.calibrate)(jnp.zeros((*shape[:-1], 3)), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("given", "kept"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2],
)
def test_reference_rewards_are_sorted_a_prompt_at_a_time(given, kept):
    rewards = np.random.default_rng(4).normal(size=(2, 5, 9)).astype(jnp.dtype(given))
    before = rewards.copy()
    ordered = calibration.sorted_reference(rewards)
    assert ordered.dtype == kept
    np.testing.assert_array_equal(ordered, np.sort(before.astype(kept), axis=2))
    np.testing.assert_array_equal(rewards, before)


def test_sorted_rewards_begin_where_jax_takes_them_without_a_copy():
    for size in range(1, 30):
        ordered = calibration.sorted_reference(np.zeros((3, size), np.float32))
        assert jax.device_put(ordered).unsafe_buffer_pointer() == ordered.ctypes.data


def test_double_rewards_where_jax_is_single():
    reference = calibration.sorted_reference([[1.0, 2.0, 3.0]])
    assert reference.dtype == np.float64
    quantiles = calibration.calibrate(np.array([[0.0, 2.5]]), reference)
    assert quantiles.dtype == jnp.float32
    np.testing.assert_allclose(quantiles, [[1 / 8, 5 / 8]])


def test_what_an_estimator_of_the_quantile_does_to_a_sharp_transformation(x64):
    """The mean of e^{10û} over u, against that of e^{10u}: û from 8 reference rewards.

    A new response is equally likely to lie in each of the 9 gaps. Counted among itself and the
    others it has rank m + 1 of 9 where its tie with itself wins, m of 9 where it loses.
    """
    gaps, reference = np.arange(9) + 0.5, np.arange(1.0, 9)
    mid = np.asarray(calibration.calibrate(gaps, reference))
    m, mean = np.arange(9), (np.exp(10) - 1) / 10
    shares = {"mid-rank": mid, "m/K": m / 8, "itself wins": (m + 1) / 9, "itself loses": m / 9}
    bias = {name: float(np.mean(np.exp(10 * u)) / mean - 1) for name, u in shares.items()}
    expected = {"mid-rank": -0.0496, "m/K": 0.5573, "itself wins": 0.6564, "itself loses": -0.4547}
    assert bias == pytest.approx(expected, abs=5e-5)


PROGRAMS = """
import sys
import jax, jax.numpy as jnp
from infalign_jax.calibration import calibrate
from infalign_jax.runtime import mesh as meshes

def mixing(rewards, reference):
    return calibrate(rewards, reference) - jnp.mean(rewards, axis=0, keepdims=True)

mesh = meshes.make(meshes.MeshConfig(data=2, fsdp=4))
rows = meshes.batch_sharding(mesh)
for k_ref in (8, int(sys.argv[1])):
    shapes = [jax.ShapeDtypeStruct((16, k), jnp.float32) for k in (5, k_ref)]
    for function in (calibrate, mixing):
        program = jax.jit(function, in_shardings=rows, out_shardings=rows).lower(*shapes)
        print("PROGRAM", function.__name__, program.compile().as_text())
"""
TALK = re.compile(r"\b(all|collective|reduce-scatter|ragged|send|recv)[\w-]*(?=\()")


def test_no_device_asks_another_where_prompts_are_divided():
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    flags = "--xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-c", PROGRAMS, str(SEARCHED)]
    out = subprocess.run(
        command, env=env, check=True, capture_output=True, text=True, timeout=processes.PATIENCE
    )
    programs = [text.split(maxsplit=1) for text in out.stdout.split("PROGRAM ")[1:]]
    assert [name for name, _ in programs] == ["calibrate", "mixing"] * 2
    for name, text in programs:
        assert "f32[2,5]" in text  # two prompts of 16 on each of 8 devices
        assert bool(TALK.search(text)) == (name == "mixing"), name


def test_the_global_map_is_the_best_monotone_one_on_small_problems():
    levels = np.arange(6) / 5
    for seed in range(20):
        generator = np.random.default_rng(seed)
        rewards = generator.integers(0, 4, 6).astype(float)
        quantiles = generator.choice(levels, 6)
        found = calibration.absolute_error(
            calibration.global_map(rewards, quantiles)(rewards), quantiles
        )
        knots, which = np.unique(rewards, return_inverse=True)
        # Some best fit takes only values that occur: try every increasing sequence of them.
        best = min(
            np.mean(np.abs(np.array(fit)[which] - quantiles))
            for fit in itertools.combinations_with_replacement(levels, knots.size)
        )
        assert abs(found - best) < 1e-3


def test_the_global_map_rises_and_holds_beyond_what_it_saw():
    generator = np.random.default_rng(2)
    rewards = generator.normal(size=(40, 50))
    quantiles = np.clip(0.5 + 0.2 * rewards + generator.normal(0, 0.1, rewards.shape), 0, 1)
    to_quantile = calibration.global_map(rewards, quantiles)
    inside = to_quantile(np.sort(rewards, axis=None))
    assert np.all(np.diff(inside) >= 0)
    assert to_quantile(np.array(-1e9)) == inside[0]
    assert to_quantile(np.array(1e9)) == inside[-1]
    # |noise| has mean 0.1·√(2/π) = 0.080.
    error = calibration.absolute_error(to_quantile(rewards), quantiles)
    assert 0.07 < error < 0.081


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,))])
def test_a_global_map_of_nothing_is_refused(shapes):
    with pytest.raises(ValueError, match="as many quantiles as rewards"):
        calibration.global_map(*(np.zeros(shape) for shape in shapes))


def test_held_out_errors_tell_prompts_apart_and_are_noise_after(precision: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    same = rng.normal(size=(400, 32))
    before, after = calibration.held_out_errors(same)
    # Halves of 16, ranked in one another: E|û − u| without ties, by simulation.
    noise = []
    for _ in range(20):
        one, other = rng.uniform(size=(2, 500, 16))
        own = (np.argsort(np.argsort(one)) + 0.5) / 16
        held = ((other[:, None, :] < one[:, :, None]).sum(axis=2) + 0.5) / 17
        noise.append(np.mean(np.abs(held - own)))
    assert after.mean() == pytest.approx(np.mean(noise), abs=3 * after.std() / 20)
    assert before.mean() < after.mean()  # one map for all sees 6,400 rewards, not 16
    shifted = 3 * np.exp(same + rng.normal(0, 2, (400, 1)))  # monotone in each prompt
    worse, unmoved = calibration.held_out_errors(shifted)
    assert unmoved == pytest.approx(after, abs=1e-6)
    assert worse.mean() > before.mean() + 0.08
    with pytest.raises(ValueError, match=r"K at least 4, got \(400, 3\)"):
        calibration.held_out_errors(same[:, :3])
