"""Eight simulated devices do what one does, and what they cannot do they say in a line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import toy
from jax.sharding import AxisType

from infalign_jax.lm import arithmetic, transformer
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.mesh import MeshConfig

Figures = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """What `mesh_worker.py` found, in a process of its own that has 8 devices."""
    out = tmp_path_factory.mktemp("mesh") / "found.npz"
    processes.work("mesh_worker.py", out, devices=8)
    with np.load(out, allow_pickle=False) as found:
        return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "names"), [(2, ("data", "data×tensor")), (4, ("fsdp",))], ids=["two", "four"]
)
def test_several_processes_do_what_one_does(
    count: int, names: tuple[str, ...], figures: Figures, tmp_path: Path
) -> None:
    """Every stage's update from the same state and batch, and what is drawn."""
    out = tmp_path / "found.npz"
    processes.work("mesh_worker.py", out, *names, devices=8, processes=count)
    with np.load(out, allow_pickle=False) as found:
        assert len(found.files) > 50
        for name in found.files:
            if name.startswith(("tokens/", "batches/")):
                np.testing.assert_array_equal(found[name], figures[name])
            else:
                size = np.linalg.norm(figures[name])
                assert np.linalg.norm(found[name] - figures[name]) <= 1e-4 * size, name


CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
MESHES = ("data", "fsdp", "data×tensor", "fsdp×tensor")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("stage", ["sft", "reward", "foresight", "align"])
def test_gradients_are_those_of_one_device(figures: Figures, stage: str, mesh: str) -> None:
    alone = {name: leaf for name, leaf in figures.items() if name.startswith(f"{stage}/one/")}
    assert len(alone) > 10
    for name, expected in alone.items():
        got = figures[name.replace("/one/", f"/{mesh}/")]
        size = np.linalg.norm(expected)
        assert size > 0, name
        assert np.linalg.norm(got - expected) <= 1e-4 * size, name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_sampled_tokens_are_those_of_one_device(figures: Figures, mesh: str) -> None:
    np.testing.assert_array_equal(figures[f"tokens/{mesh}"], figures["tokens/one"])
    assert len(np.unique(figures["tokens/one"].reshape(-1, 6), axis=0)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_batches_are_those_of_one_device(figures: Figures, mesh: str) -> None:
    assert figures[f"batches/{mesh}"].shape == (3, 8, 2)
    np.testing.assert_array_equal(figures[f"batches/{mesh}"], figures["batches/one"])


@pytest.mark.slow
def test_between_tokens_only_tensor_parallel_devices_speak(figures: Figures) -> None:
    """Shards of the batch end at different steps: a collective among them would wait for ever."""
    found = {mesh: int(figures[f"collectives/{mesh}"]) for mesh in MESHES}
    assert found["data"] == found["fsdp"] == 0 < found["data×tensor"] == found["fsdp×tensor"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "data×tensor", "fsdp×tensor"])
def test_shards_send_one_another_no_lanes(figures: Figures, mesh: str) -> None:
    """Parameters, once; with a tensor axis after each of 32 tokens a few flags besides."""
    few, many = figures[f"told/{mesh}"]
    assert 0 < many == few
    if mesh == "data×tensor":
        assert many < 32 * 2 * 16


@pytest.mark.slow
def test_no_logits_are_sent_around(figures: Figures) -> None:
    """Each shard has its own chunks of them: only their sums cross a tensor axis."""
    found = {mesh: int(figures[f"chunks/{mesh}"]) for mesh in MESHES}
    assert found["data"] == found["fsdp"] == 0 < found["data×tensor"] <= found["fsdp×tensor"]


@pytest.mark.slow
def test_weights_are_sent_and_not_what_is_computed(figures: Figures) -> None:
    """What `fsdp` costs does not grow with the batch; but for the tokens, to find their rows by."""
    few, many = figures["received/fsdp"]
    assert 0 < few <= many < 1.2 * few
    parameters = 4 * arithmetic.parameters(TransformerConfig())
    assert many < 2.5 * parameters / 2, "prompts and responses each gather the other's half once"


@pytest.mark.slow
def test_parameters_are_divided_as_the_mesh_says(figures: Figures) -> None:
    """The query weights [layers, width, heads·d]: width over fsdp, heads over tensor."""
    lies = {mesh: figures[f"lies/{mesh}"].tolist() for mesh in ("one", *MESHES)}
    assert lies == {
        "one": [2, 16, 16],
        "data": [2, 16, 16],
        "fsdp": [2, 8, 16],
        "data×tensor": [2, 16, 8],
        "fsdp×tensor": [2, 8, 8],
    }


def abstract(**sizes: int) -> jax.sharding.AbstractMesh:
    names = meshes.AXES
    shape = tuple(sizes.get(name, 1) for name in names)
    return jax.sharding.AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


@pytest.mark.parametrize(
    ("data", "fsdp", "size", "use"), [(8, 1, 12, 8), (4, 2, 20, 16), (8, 1, 3, 8)]
)
def test_a_batch_that_the_mesh_does_not_divide(data: int, fsdp: int, size: int, use: int) -> None:
    mesh = abstract(data=data, fsdp=fsdp)
    words = (
        f"sft.batch_size: expected a multiple of replica × data × fsdp = 8, got {size}; use {use}"
    )
    with pytest.raises(ValueError) as caught:
        meshes.check_batch("sft.batch_size", size, mesh)
    assert str(caught.value) == words
    meshes.check_batch("sft.batch_size", use, mesh)


def test_the_tensor_axis_does_not_divide_batches() -> None:
    meshes.check_batch("sft.batch_size", 3, abstract(tensor=8))


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=2), MeshConfig(tensor=5)])
def test_sizes_must_multiply_to_the_devices(config: MeshConfig) -> None:
    with pytest.raises(ValueError, match="product is the 1 devices there are"):
        meshes.make(config, jax.devices()[:1])


@pytest.mark.parametrize("sizes", [{"data": -1}, {"fsdp": 0}, {"tensor": 0}, {"replica": -1}])
def test_impossible_meshes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match="expected data >= 0, fsdp >= 1, tensor >= 1, replica >= 0"
    ):
        MeshConfig(**sizes)


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"tensor": 5}])
def test_an_axis_that_does_not_divide_the_model(sizes: dict[str, int]) -> None:
    config = toy.config()
    boxed = jax.eval_shape(lambda: transformer.initial_params(config, jax.random.key(0)))
    axis, size = next(iter(sizes.items()))
    with pytest.raises(ValueError, match=f"expected {axis} to divide .* got {axis}={size}"):
        meshes.shardings(abstract(**sizes), boxed)


def test_a_big_model_fits_a_pod_on_paper() -> None:
    """8 billion parameters over 16 × 8 devices: 60 million a device, without one array made."""
    config = TransformerConfig(
        vocab_size=128_256, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14_336
    )
    boxed = jax.eval_shape(lambda: transformer.initial_params(config, jax.random.key(0)))
    layout = meshes.shardings(abstract(data=2, fsdp=16, tensor=8), boxed)
    shapes = jax.tree.map(
        lambda leaf, where: where.shard_shape(leaf.shape), nn.unbox(boxed), layout
    )
    parts = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    assert sum(np.prod(part) for part in parts) < 7.6e9 / 100


@pytest.mark.skipif(CORES < 2, reason="one core")
def test_a_run_makes_a_device_of_each_core(tmp_path: Path) -> None:
    wanted = ["--mesh", "data=2", "--stage", "tokenizer", "--out", tmp_path]
    processes.well(processes.command(*wanted, XLA_FLAGS=""))


@dataclass(frozen=True)
class Chip:
    """A device as meshes of several slices are made of."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


CHIPS = [Chip(n, n % 2, coords=(n // 2, 0, 0)) for n in range(8)]  # two slices of four


def test_slices_are_joined_along_the_outer_axis_alone() -> None:
    made = meshes.make(MeshConfig(fsdp=2), CHIPS)  # type: ignore[arg-type]
    assert dict(made.shape) == {"replica": 2, "data": 2, "fsdp": 2, "tensor": 1}
    for number, part in enumerate(made.devices):
        assert {chip.slice_index for chip in part.flat} == {number}
    four = meshes.make(MeshConfig(replica=4, data=1, fsdp=2), CHIPS)  # type: ignore[arg-type]
    assert [{chip.slice_index for chip in part.flat} for part in four.devices] == [
        {0},
        {0},
        {1},
        {1},
    ]


def test_slices_that_would_be_joined_along_another_axis() -> None:
    with pytest.raises(ValueError, match="replica to be a multiple of the 2 slices, got replica=1"):
        meshes.make(MeshConfig(fsdp=8, replica=1), CHIPS)  # type: ignore[arg-type]


def test_host_rows_are_laid_over_the_batch_axes() -> None:
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    laid = meshes.put_batch({"x": np.arange(6).reshape(3, 2)}, mesh)["x"]
    assert tuple(laid.sharding.spec) == (("replica", "data", "fsdp"),)
    assert laid.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert isinstance(laid, jnp.ndarray)


@pytest.mark.parametrize(
    ("cores", "told", "config", "batches", "expected"),
    [
        (-1, {}, "", "16, 24", max(n for n in (1, 2, 4, 8) if n <= CORES)),
        (-1, {}, "data=1", "16, 24", 1),
        (4, {}, "", "12, 9", 3),
        (4, {}, "data=2", "12, 9", 2),
        (4, {}, "fsdp=2", "12, 9", 4),
        (-1, {"JAX_NUM_CPU_DEVICES": "8"}, "", "12, 9", 8),
        (-1, {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, "", "12, 9", 8),
    ],
)
def test_cores_become_devices_that_divide_every_batch(
    cores: int, told: dict[str, str], config: str, batches: str, expected: int
) -> None:
    """Where nobody says how many devices there are; `cores` stands for a machine's."""
    code = (
        "import jax\nfrom infalign_jax.runtime import mesh\n"
        + f"jax.config.update('jax_num_cpu_devices', {cores})\n" * (cores > 0)
        + f"print(len(mesh.available(mesh.MeshConfig({config}), [{batches}])))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"JAX_PLATFORMS": "cpu"} | told,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(done.stdout) == expected
