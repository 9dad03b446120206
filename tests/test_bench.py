"""The bench counts what XLA counts, measures every phase, and answers mistakes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from infalign_jax import programs
from infalign_jax.batches import Prompts, Responses
from infalign_jax.cli import main
from infalign_jax.commands import bench, bench_text
from infalign_jax.lm import arithmetic, decoding, layers, transformer
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.decoding import Places
from infalign_jax.lm.layers import TransformerConfig
from infalign_jax.lm.sizes import SIZES
from infalign_jax.runtime import measure
from infalign_jax.runtime.mesh import MeshConfig

MODEL = TransformerConfig(512, 256, 2, 4, 2, 768, unroll=2)
SHAPE = Shape(2, 24, 3, 16)
NARROW = TransformerConfig(64, 128, 2, 2, 1, 64, unroll=2)
LONG = Shape(2, 1024, 3, 1024)
either = pytest.mark.parametrize(
    ("model", "shape"), [(MODEL, SHAPE), (NARROW, LONG)], ids=["mostly layers", "mostly attention"]
)


def counted(function: Any, *operands: Any) -> float:
    """XLA's own count, of a program without loops, before it is optimised."""
    return float(jax.jit(function).lower(*operands).cost_analysis()["flops"])


def batch(shape: Shape) -> tuple[Prompts, Responses]:
    size, each = shape[:2], (shape.prompts, shape.responses, shape.response)
    tokens = jax.ShapeDtypeStruct
    return (
        Prompts(tokens(size, jnp.int32), tokens(size, bool), tokens(size[:1], jnp.int32)),
        Responses(tokens(each, jnp.int32), tokens(each, bool)),
    )


@either
def test_model_flops_are_those_that_xla_counts(model: TransformerConfig, shape: Shape) -> None:
    params, (x, y) = nn.unbox(programs.boxed_params(model)), batch(shape)
    forward = partial(transformer.log_probs, model)
    found = counted(forward, params, x, y)
    assert found == pytest.approx(arithmetic.forward(model, shape).flops, rel=0.03)
    hidden = counted(partial(transformer.hidden_states, model), params, x, y)
    assert hidden == pytest.approx(arithmetic.forward(model, shape, logits=False).flops, rel=0.03)
    prefill = counted(partial(transformer.prefill, model), params, x)
    assert prefill == pytest.approx(arithmetic.prefill(model, shape).flops, rel=0.03)
    # What the backward pass computes again is not counted as the model's: logits, by their chunk,
    # and attention's scores.
    back = counted(
        lambda *own: jax.grad(lambda p: forward(p, *own[1:]).sum())(own[0]), params, x, y
    )
    pairs = shape.prompts * shape.prompt**2 + shape.tokens * (shape.prompt + shape.response)
    again = 2 * model.width * (shape.tokens * model.vocab_size + model.layers * pairs)
    assert back - again == pytest.approx(arithmetic.update(model, shape).flops, rel=0.03)


@either
def test_decoding_flops_are_those_that_xla_counts(model: TransformerConfig, shape: Shape) -> None:
    b, p, k, t = shape
    params = nn.unbox(programs.boxed_params(model))
    decoder = jax.eval_shape(partial(transformer.decoder, model), params)
    cache = jax.eval_shape(lambda: decoding.empty_cache(model, b, k, t))
    _, prefix = jax.eval_shape(partial(transformer.prefill, model), params, batch(shape)[0])
    turned = jax.eval_shape(lambda: layers.turns(model, jnp.zeros((b, k), jnp.int32)))
    some = jax.ShapeDtypeStruct
    places = Places(turned, some((b, k, t), bool), some((b, p), bool), some((), jnp.int32))

    def token(decoder: Any, prefix: Any, cache: Any, tokens: Any, places: Any) -> Any:
        hidden, cache = decoding.advance(model, decoder, prefix, cache, tokens, places)
        return jnp.einsum("bkd,vd->bkv", hidden, decoder.embedding), cache

    one = counted(token, decoder, prefix, cache, some((b, k), jnp.int32), places)
    assert t * one == pytest.approx(arithmetic.decode(model, shape).flops, rel=0.03)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_counted(name: str) -> None:
    boxed = nn.unbox(programs.boxed_params(SIZES[name].model))
    assert arithmetic.parameters(SIZES[name].model) == sum(
        leaf.size for leaf in jax.tree.leaves(boxed)
    )


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench.run(bench.fitted("tiny"), Shape(2, 4, 2, 4), rounds=2)


def test_every_phase_is_measured(result: dict[str, Any]) -> None:
    assert list(result["phases"]) == [
        "prefill", "decode", "reference log-probabilities", "reward scoring", "calibration",
        "update", "whole step",
    ]  # fmt: skip
    for name, row in result["phases"].items():
        assert 0 <= row["least"] <= row["seconds"] <= row["most"]
        assert row["memory_bytes"] > 0
        assert row["bound"] in ("compute", "memory")
        assert ("tokens_per_second" in row) == (name != "prefill")
    whole, parts = result["phases"]["whole step"], list(result["phases"].values())[:-1]
    assert whole["flops"] == sum(part["flops"] for part in parts)
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_a_mesh_divides_what_is_measured() -> None:
    arguments = ["--preset", "tiny", "--rounds", "1", "--mesh", "fsdp=2"]
    source = f"from infalign_jax.cli import main; raise SystemExit(main(['bench', *{arguments}]))"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 × cpu (fsdp 2), "), done.stdout


def test_a_divided_model_keeps_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """On four TPU chips `fsdp` leaves each a quarter of the states, and more room."""
    chip = SimpleNamespace(platform="tpu")
    monkeypatch.setattr(jax, "devices", lambda: [chip] * 4)
    shape, model = Shape(4, 4, 2, 4), replace(SIZES["1m"].model, compute="bfloat16")
    room = arithmetic.TAKEN["nothing"] * arithmetic.update_memory(
        replace(model, rematerialise="nothing"), shape._replace(prompts=1), 4
    )
    monkeypatch.setattr(measure, "memory_limit", lambda device: room)
    kept = [
        bench.fitted("1m", None, shape, sizes).rematerialise
        for sizes in (MeshConfig(), MeshConfig(fsdp=4))
    ]
    assert kept == ["everything", "nothing"]


def test_a_percentage_is_of_the_ceiling_that_binds() -> None:
    ceilings = {"compute": {"training": 100.0}, "bytes_per_second": 10.0}
    costs = {"update": arithmetic.Cost(400.0, 20.0), "reward scoring": arithmetic.Cost(100.0, 30.0)}
    times = {name: measure.Timing(8.0, 8.0, 8.0) for name in (*costs, "whole step")}
    phases = dict.fromkeys(times, bench.Phase(lambda: None, 1, 0.0))
    rows = {n: bench._row(n, costs, times, phases, ceilings, SHAPE) for n in times}
    assert (rows["update"]["bound"], rows["update"]["percent"]) == ("compute", 50.0)
    assert (rows["reward scoring"]["bound"], rows["reward scoring"]["percent"]) == ("memory", 37.5)
    assert rows["whole step"]["percent"] == 87.5
    assert rows["update"]["tokens_per_second"] == SHAPE.tokens / 8


@pytest.mark.parametrize(("platform", "machines"), [("cpu", 1), ("tpu", 4)])
def test_ceilings_are_those_of_all_devices(
    monkeypatch: pytest.MonkeyPatch, platform: str, machines: int
) -> None:
    """A CPU's devices share one memory and one speed; others each have their own."""
    products: list[int] = []

    def rate(sizes: Any, dtype: jnp.dtype, rounds: int) -> float:
        products.append(sizes[0][0])
        return 5.0

    monkeypatch.setattr(measure, "product_rate", rate)
    monkeypatch.setattr(measure, "copy_rate", lambda size, rounds: 7.0)
    devices: Any = [SimpleNamespace(platform=platform)] * 4
    found = bench._ceilings(MODEL, SHAPE, bench._machines(devices), 1)
    assert found["bytes_per_second"] == 7 * machines
    assert set(found["compute"].values()) == {5.0 * machines}
    assert products[-1] == SHAPE.tokens / machines


def test_an_earlier_result_is_compared(result: dict[str, Any], tmp_path: Path) -> None:
    slower = json.loads(json.dumps(result))
    slower["phases"]["update"]["seconds"] *= 3
    (tmp_path / "before.json").write_text(json.dumps(slower))
    lines = bench_text.text(result, bench.earlier(tmp_path / "before.json")).splitlines()
    ends = {line.split("  ")[0]: line.split()[-1] for line in lines[-7:]}
    assert (ends["update"], ends["whole step"]) == ("3.00", "1.00")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "2m"], "invalid choice: '2m'"),
        (["--prompts", "0"], "whole number from 1 on, got 0"),
        (["--compare", "setup.cfg"], "infalign bench --json wrote, got setup.cfg"),
        (["--preset", "8b", "--prompts", "4096"], "GiB on a device"),
        (["--mesh", "fdsp=2"], "got fdsp=2; did you mean fsdp?"),
        (["--mesh", "data=3,fsdp=5"], "expected a product of"),
    ],
)
def test_mistakes_are_answered(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_bench_needs_neither_grain_nor_tfds() -> None:
    code = "import sys, infalign_jax.commands.bench; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"grain", "tensorflow_datasets", "sentencepiece"} & set(loaded)
