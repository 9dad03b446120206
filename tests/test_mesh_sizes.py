"""A mesh that does not fit is answered with the nearest that do."""

from math import prod

import pytest

from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime import mesh_sizes, slices
from infalign_jax.runtime.mesh import MeshConfig

MODEL = {"model": TransformerConfig(512, width=96, layers=2, heads=4, kv_heads=2, mlp_width=96)}


@pytest.mark.parametrize("text", ["", "data", "data=", "data=x", "data=1,data=2", "data=-2", "4"])
def test_what_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^mesh: expected .*data=4,fsdp=8$"):
        mesh_sizes.parse(text)


def test_a_mesh_is_read_as_it_is_written() -> None:
    for config in (
        MeshConfig(2, 4, 8),
        MeshConfig(data=1),
        MeshConfig(replica=2, fsdp=4),
        MeshConfig(tensor=2),
    ):
        assert mesh_sizes.parse(mesh_sizes.written(config)) == config


@pytest.mark.parametrize(
    ("config", "words", "use"),
    [
        (MeshConfig(3, 2), "a product of 8 (the devices)", "data=4,fsdp=2"),
        (MeshConfig(1, 1, 8), "", "tensor=8"),
        (MeshConfig(1, 8), "", "fsdp=8"),
        (MeshConfig(0, 16), "a product of 8 (the devices)", "fsdp=8"),
    ],
)
def test_the_nearest_that_fits_is_named(config: MeshConfig, words: str, use: str) -> None:
    batches = {"sft.batch_size": 32, "align.batch_size": 8}
    if not words:
        assert mesh_sizes.written(mesh_sizes.check(config, 8, MODEL, batches)) == use
        return
    with pytest.raises(ValueError) as caught:
        mesh_sizes.check(config, 8, MODEL, batches)
    said = str(caught.value)
    assert f"expected {words}, got" in said
    assert use in said.partition("; use ")[2].split(" or ")


def test_a_batch_and_the_model_are_told_of() -> None:
    with pytest.raises(
        ValueError, match=r"divide 12 \(align.batch_size; 8 would do\), got data=8; use data=4"
    ):
        mesh_sizes.check(MeshConfig(data=8), 8, MODEL, {"align.batch_size": 12})
    with pytest.raises(ValueError, match=r"fsdp to divide 96 .*use data=7"):
        mesh_sizes.check(MeshConfig(fsdp=7), 7, MODEL, {"align.batch_size": 14})
    with pytest.raises(ValueError, match="no mesh of so many fits"):
        mesh_sizes.check(MeshConfig(), 7, MODEL, {"align.batch_size": 4})

    both = MODEL | {"reward_model": TransformerConfig(512, width=48, heads=4)}
    with pytest.raises(ValueError, match=r"fsdp to divide 48 \(reward_model.width\)"):
        mesh_sizes.check(MeshConfig(fsdp=32), 32, both, {"align.batch_size": 32})


def test_every_mesh_named_fits() -> None:
    found = mesh_sizes.fitting(16, MODEL, {"align.batch_size": 8})
    assert MeshConfig(8, 1, 2, 1) in found
    assert MeshConfig(16, 1, 1, 1) not in found
    for config in found:
        assert mesh_sizes.check(config, 16, MODEL, {"align.batch_size": 8}) == config


@pytest.mark.parametrize(
    ("name", "chips", "mesh"),
    [
        ("v5e-1", 1, MeshConfig(1, 1, replica=1)),
        ("v6e-256", 256, MeshConfig(4, 64, replica=1)),
        ("v5p-8", 4, MeshConfig(1, 4, replica=1)),
        ("v5e-16", 16, MeshConfig(2, 8, replica=1)),
        ("v5p-64", 32, MeshConfig(4, 8, replica=1)),
        ("v6e-64", 64, MeshConfig(1, 64, replica=1)),
        ("v5p-512", 256, MeshConfig(4, 64, replica=1)),
        ("4xgpu-8", 32, MeshConfig(1, 8, replica=4)),
    ],
)
def test_a_slice_by_its_name(name: str, chips: int, mesh: MeshConfig) -> None:
    assert mesh_sizes.parse(name) == mesh
    assert mesh.size == chips


def test_every_slice_has_its_chips() -> None:
    for kind, shapes in slices.KINDS.items():
        for number, shape in shapes.items():
            found = slices.named(f"3x{kind}-{number}")
            assert found is not None
            assert (found.slices, found.shape) == (3, shape)
            assert found.chips == prod(map(int, shape.split("x")))
            assert found.mesh.size == 3 * found.chips
