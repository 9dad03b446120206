"""What is stored comes back as it went in, or is refused with the reason, and runs no code."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from infalign_jax.batches import Prompts
from infalign_jax.runtime.checkpoint import FORMAT, Damaged, load, save, whole_header
from infalign_jax.runtime.digests import digest
from infalign_jax.runtime.progress import latest_step, resumed, saving

TABLE = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


@dataclass(frozen=True)
class Config:
    width: int = 8
    rates: tuple[float, ...] = (0.1, 0.2)


@dataclass(frozen=True)
class Other:
    width: int = 8
    rates: tuple[float, ...] = (0.1, 0.2)


class State(NamedTuple):
    params: dict[str, Any]
    optimiser: optax.OptState
    step: jax.Array


def state() -> State:
    params = {
        "layers": {"w": jnp.linspace(0.0, 1.0, 12).reshape(3, 4), "b": jnp.ones(4, jnp.bfloat16)},
        "a/b 'c'.d": jnp.arange(3),
    }
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return State(params, optimiser.init(params), jnp.int32(7))


def shapes_of(tree: Any) -> Any:
    """The targets a resumed stage has: shapes, with the device each array belongs on."""
    device = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def keep(directory: Path, step: int, tree: Any, info: dict[str, Any]) -> None:
    with saving(directory, "d") as saver:
        saver.save(step, tree, info)


def everything_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_optimiser_state_comes_back_with_its_types(tmp_path: Path, precision: jnp.dtype) -> None:
    kept = state()
    save(tmp_path / "sft", kept, digest="d", info={"seen": 3})
    tree, info = load(tmp_path / "sft", shapes_of(kept), digest="d")
    assert_same(tree, kept)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))
    assert info == {"seen": 3}


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from infalign_jax.runtime import checkpoint
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
whole = np.arange(64.0, dtype=np.float32).reshape(8, 8)
tree = {"w": jax.device_put(whole, place("fsdp", "tensor"))}
checkpoint.save(sys.argv[1], tree, digest="d", info={})
like = {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=place("tensor", None))}
w = checkpoint.load(sys.argv[1], like, digest="d")[0]["w"]
assert w.sharding == like["w"].sharding and (np.asarray(w) == whole).all()
"""


def test_arrays_move_to_other_devices(tmp_path: Path) -> None:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "sft")]
    subprocess.run(command, check=True, env=os.environ | flags)
    whole = {"w": np.arange(64.0, dtype=np.float32).reshape(8, 8)}
    assert_same(load(tmp_path / "sft", shapes_of(whole), digest="d")[0], whole)


def test_numpy_tables_keep_their_precision(tmp_path: Path) -> None:
    kept = {
        "rewards": np.linspace(0, 1, 7),
        "index": np.array([2**40, -1]),
        "mask": np.array([True, False]),
        "model": np.frombuffer(b"\x00\xff proto", np.uint8),
        "scalar": np.array(3, np.int32),
    }
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), kept)
    save(tmp_path / "table", kept, digest="d", info={})
    tree, _ = load(tmp_path / "table", like, digest="d")
    assert_same(tree, kept)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))


def test_dataclasses_and_results_without_arrays_are_kept(tmp_path: Path) -> None:
    kept = Prompts(np.zeros((2, 3), np.int32), np.ones((2, 3), bool), np.arange(2))
    save(tmp_path / "prompts", kept, digest="d", info={})
    assert_same(load(tmp_path / "prompts", kept, digest="d")[0], kept)
    save(tmp_path / "figures", {}, digest="d", info={"kl": 0.5})
    assert load(tmp_path / "figures", {}, digest="d") == ({}, {"kl": 0.5})


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "sft", TABLE, digest="one", info={})
    with pytest.raises(ValueError, match=r"expected .* two .* another configuration \(one\); "):
        load(tmp_path / "sft", TABLE, digest="two")


def test_a_newer_format_is_refused_and_not_overwritten(tmp_path: Path) -> None:
    save(tmp_path / "sft", TABLE, digest="d", info={})
    keep(tmp_path / "steps", 5, TABLE, {})
    for path in (tmp_path / "sft", tmp_path / "steps" / "step-00000005"):
        header = path / "header.json"
        header.write_text(json.dumps({"format": FORMAT + 1}))
    for read in (
        lambda: load(tmp_path / "sft", TABLE, digest="d"),
        lambda: whole_header(tmp_path / "sft"),
        lambda: latest_step(tmp_path / "steps"),
    ):
        with pytest.raises(ValueError, match=f"format {FORMAT} .* newer format .* upgrade"):
            read()


def test_other_shapes_are_named(tmp_path: Path) -> None:
    save(tmp_path / "sft", TABLE, digest="d", info={})
    with pytest.raises(ValueError, match=r"expected x to be \[\[3, 3\], 'float32'\]"):
        load(tmp_path / "sft", {"x": np.zeros((3, 3), np.float32)}, digest="d")
    with pytest.raises(ValueError, match="expected x to be absent"):
        load(tmp_path / "sft", {}, digest="d")
    with pytest.raises(ValueError, match="got nothing"):
        load(tmp_path / "sft", TABLE | {"y": np.zeros(1)}, digest="d")


def test_two_leaves_of_one_name_are_refused(tmp_path: Path) -> None:
    tree = {"a": {"b": np.zeros(1)}, "a.b": np.ones(1)}
    with pytest.raises(ValueError, match="two leaves of one"):
        save(tmp_path / "sft", tree, digest="d", info={})
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("how", ["cut", "flip", "missing", "extra", "header"])
def test_damage_is_noticed(tmp_path: Path, how: str) -> None:
    save(tmp_path / "sft", TABLE, digest="d", info={})
    damage(tmp_path / "sft", how)
    with pytest.raises(Damaged):
        whole_header(tmp_path / "sft")
    with pytest.raises(ValueError, match="got a damaged one; delete it"):
        load(tmp_path / "sft", TABLE, digest="d")


def damage(path: Path, how: str) -> None:
    victim = max((p for p in (path / "arrays").rglob("*") if p.is_file()), key=lambda p: p.name)
    data = bytearray(victim.read_bytes())
    match how:
        case "cut":
            victim.write_bytes(data[: len(data) // 2])
        case "flip":
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        case "missing":
            victim.unlink()
        case "extra":
            (path / "arrays" / "stranger").write_bytes(b"")
        case "header":
            header = path / "header.json"
            header.write_text(header.read_text()[:-9])


def test_the_last_whole_step_is_found(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        keep(tmp_path, step, {"w": np.full(3, step)}, {"loss": step / 10})
    assert everything_in(tmp_path) == ["step-00000020", "step-00000030"]
    assert latest_step(tmp_path) == 30
    damage(tmp_path / "step-00000030", "flip")
    assert latest_step(tmp_path) == 20
    found = resumed(tmp_path, {"w": np.zeros(3, int)}, "d")
    assert found
    step, tree, info = found
    assert (step, tree["w"].tolist(), info) == (20, [20, 20, 20], {"loss": 2.0})


def test_a_damaged_later_step_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    for step in (20, 30):
        keep(tmp_path, step, TABLE, {})
    damage(tmp_path / "step-00000030", "cut")
    keep(tmp_path, 25, TABLE, {})
    assert everything_in(tmp_path) == ["step-00000020", "step-00000025"]


def test_leftovers_of_a_dead_process_are_ignored_and_swept(tmp_path: Path) -> None:
    for rest in (".step-00000010.tmp", ".step-00000008.old"):
        (tmp_path / rest / "arrays").mkdir(parents=True)
    assert latest_step(tmp_path) is None
    keep(tmp_path, 10, TABLE, {})
    assert everything_in(tmp_path) == ["step-00000010"]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path / "sft", TABLE, digest="d", info={"kept": True})
    with pytest.raises(TypeError):
        save(tmp_path / "sft", TABLE, digest="d", info={"not JSON": object()})
    assert everything_in(tmp_path) == ["sft"]
    assert load(tmp_path / "sft", TABLE, digest="d")[1] == {"kept": True}


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was called")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    save(tmp_path / "sft", state(), digest="d", info={})
    load(tmp_path / "sft", shapes_of(state()), digest="d")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or not path.read_bytes().startswith(b"\x80")
    with pytest.raises(TypeError, match="expected plain values"):
        digest(np.array([object()]))


def test_digest_sees_every_part() -> None:
    table = np.arange(6.0)
    parts: list[tuple[object, ...]] = [
        (),
        ("a",),
        ("a", "b"),
        ("ab",),
        (b"a",),
        (["a"],),
        (1,),
        (1.0,),
        (True,),
        (None,),
        ({"a": 1, "b": 2},),
        ({"a": 2, "b": 1},),
        (Config(),),
        (Other(),),
        (Config(width=9),),
        (Config(rates=(0.1, 0.3)),),
        (table,),
        (table.reshape(2, 3),),
        (np.zeros(2, np.float32),),
        (np.zeros(2, np.int32),),
        (b"a", b"b"),
        (b"abytesb",),
        (np.float64(1.0),),
    ]
    assert len({digest(*each) for each in parts}) == len(parts)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(table[::2]) == digest(table[::2].copy())
    with pytest.raises(TypeError, match="expected plain values"):
        digest(len)


def test_digest_is_the_same_in_every_process() -> None:
    source = "from infalign_jax.runtime.digests import digest; print(digest('a', {'b': 1.5}))"
    command = [sys.executable, "-c", source]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.strip() == digest("a", {"b": 1.5})
