"""How fast one RL step is on this device, phase by phase, beside what the device can do.

As JSON, with `--json`:

- `device`, `devices`, `mesh` (sizes by axis), `versions`, `model`, `parameters`, `shape` (prompts,
  prompt, responses, response), `rounds`;
- `ceilings`: bytes a second of a copy, and FLOP/s of products of the model's shapes in float32 and
  bfloat16, at the rows of training and, on CPU, at those of prefill and of decoding (of few rows an
  accelerator's products are bound by memory and by launches); all devices together;
- `phases`, by name: `seconds` (median), `least`, `most`, `tokens_per_second` (response tokens;
  absent from prefill), `flops` and `bytes` (by `lm/arithmetic.py`), `flops_per_second`,
  `bytes_per_second`, `bound` (compute or memory: what takes longer at its ceiling), `percent` of
  that ceiling, `memory_bytes` (of the compiled program, a device) and `compile_seconds`.

Decoding is the sampler's time less prefill's. The whole step is sampling, log π_ref, rewards,
calibration among 128 reference rewards a prompt, and the update; its ceiling is that of its phases.
"""

import json
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from infalign_jax import config
from infalign_jax.commands import bench_phases
from infalign_jax.commands.bench_phases import REFERENCE, WHOLE, Phase
from infalign_jax.drawing import SamplingConfig
from infalign_jax.lm import arithmetic
from infalign_jax.lm.arithmetic import Cost, Shape
from infalign_jax.lm.sizes import SIZES
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.programs import memory_to_draw, memory_to_learn
from infalign_jax.runtime import measure, mesh_sizes
from infalign_jax.runtime.devices import cores_as_devices
from infalign_jax.runtime.measure import Timing
from infalign_jax.runtime.mesh import MeshConfig

COPY = 2**28  # bytes
USUAL = MeshConfig()  # all devices along `data`


def fitted(
    preset: str, compute: str | None = None, shape: Shape | None = None,
    sizes: MeshConfig = USUAL,
) -> TransformerConfig:  # fmt: skip
    """A preset's model as these devices run it best, on a batch (by default the preset's own).

    On CPU in float32; elsewhere in bfloat16, with the kernel for attention that there is for the
    device. For the backward pass as much is kept as memory has room for. No loop over layers on
    CPU, and none on GPU where all is kept, since a loop copies it.

    >>> fitted("1m", "float32").width
    128
    """
    cores_as_devices()
    model, devices = SIZES[preset].model, jax.devices()
    device, cpu = devices[0], devices[0].platform == "cpu"
    kind: Any = compute or ("float32" if cpu else "bfloat16")
    kernel: Any = "splash" if device.platform == "tpu" else "plain"
    if kind == "bfloat16" and _has_flash_attention(device):
        kernel = "cudnn"
    at_once = 2**27 if device.platform == "gpu" else model.logits_at_once
    model = replace(model, compute=kind, attention=kernel, logits_at_once=at_once)
    shape = shape or SIZES[preset].shape
    sizes = MeshConfig(1, 1, 1, 1) if cpu else sizes.over(len(devices))  # of memory
    model = replace(model, rematerialise=_kept(model, shape, sizes, measure.memory_limit(device)))
    whole = cpu or (device.platform == "gpu" and model.rematerialise == "nothing")
    return replace(model, unroll=model.layers if whole else 1)


def _kept(model: TransformerConfig, shape: Shape, sizes: MeshConfig, limit: int | None) -> Any:
    """The `rematerialise` that computes least again in so much memory of a device."""
    for kind, taken in arithmetic.TAKEN.items():
        other = replace(model, rematerialise=kind)
        if limit is None or taken * memory_to_learn(other, shape, sizes) <= limit:
            return kind
    return "everything"


def _has_flash_attention(device: jax.Device) -> bool:
    """Whether cuDNN computes attention in bfloat16 there: NVIDIA's from Ampere on."""
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8.0


def run(
    model: TransformerConfig, shape: Shape, rounds: int = 5, sizes: MeshConfig = USUAL
) -> dict[str, Any]:
    """Measures a model and a batch on a mesh of all devices.

    Raises ValueError where the mesh does not divide the prompts or the model, and where parameters,
    caches and activations alone do not fit.

    >>> run(fitted("tiny"), Shape(3, 16, 10**9, 16), rounds=1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: bench: expected at most ... GiB on a device, got at least ...; lower --prompts, ...
    """
    mesh = mesh_sizes.fitted(sizes, {"model": model}, {"--prompts": shape.prompts})
    devices = list(mesh.devices.flat)
    advice = "lower --prompts, --responses, --response or the preset, or divide it by --mesh"
    own, law = MeshConfig(**mesh.shape), SamplingConfig(length=shape.response)
    needed = max(memory_to_learn(model, shape, own), memory_to_draw(model, law, shape, own))
    measure.check_memory("bench", needed, mesh, advice)
    ceilings = _ceilings(model, shape, _machines(devices), rounds)
    phases = bench_phases.compiled(model, shape, mesh)
    times = {name: measure.timed(phase.call, rounds) for name, phase in phases.items()}
    times["decode"] = _less(times.pop("sample"), times["prefill"])
    phases["decode"] = phases.pop("sample")
    costs = _costs(model, shape)
    names = [*costs, WHOLE]
    rows = {name: _row(name, costs, times, phases, ceilings, shape) for name in names}
    return {
        "device": devices[0].device_kind, "devices": len(devices), "mesh": dict(mesh.shape),
        "versions": {"python": platform.python_version(), "jax": metadata.version("jax")},
        "model": config.to_dict(model), "parameters": arithmetic.parameters(model),
        "shape": shape._asdict(), "rounds": rounds, "ceilings": ceilings, "phases": rows,
    }  # fmt: skip


def earlier(path: Path) -> dict[str, Any]:
    """What `--json` wrote before; raises ValueError where the file is not of that kind.

    >>> earlier(Path("pyproject.toml"))
    Traceback (most recent call last):
    ValueError: bench: expected a file that infalign bench --json wrote, got pyproject.toml; \
name another
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {"seconds"} <= found["phases"][WHOLE].keys():
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(
        f"bench: expected a file that infalign bench --json wrote, got {path}; name another"
    )


def _machines(devices: list[jax.Device]) -> int:
    """How many times the memory and the speed of one device there are: a CPU's share one's."""
    return 1 if devices[0].platform == "cpu" else len(devices)


def _ceilings(model: TransformerConfig, shape: Shape, devices: int, rounds: int) -> dict[str, Any]:
    """What all devices together can do, measured on one."""
    wanted = sorted({*arithmetic.layer_products(model), (model.width, model.vocab_size)})
    rows = {
        "prefill": shape.prompts * shape.prompt, "decode": shape.prompts * shape.responses,
        "training": shape.tokens,
    }  # fmt: skip
    if jax.devices()[0].platform != "cpu":
        rows = {"training": rows["training"]}

    def rate(n: int, dtype: str) -> float:
        own = [(-(-n // devices), *sizes) for sizes in wanted]
        return devices * measure.product_rate(own, jnp.dtype(dtype), rounds)

    found: dict[str, Any] = {"bytes_per_second": devices * measure.copy_rate(COPY, rounds)}
    for dtype in ("float32", "bfloat16"):
        found[dtype] = {name: rate(n, dtype) for name, n in rows.items()}
    found["compute"] = found[model.compute if model.compute in found else "float32"]
    return found


def _costs(model: TransformerConfig, shape: Shape) -> dict[str, Cost]:
    rewards = 4.0 * shape.prompts * (shape.responses + REFERENCE)
    return {
        "prefill": arithmetic.prefill(model, shape),
        "decode": arithmetic.decode(model, shape),
        "reference log-probabilities": arithmetic.forward(model, shape),
        "reward scoring": arithmetic.forward(model, shape, logits=False),
        "calibration": Cost(0.0, rewards),
        "update": arithmetic.update(model, shape),
    }


def _less(whole: Timing, part: Timing) -> Timing:
    return Timing(*(max(seconds - part.seconds, 0.0) for seconds in whole))


def _row(
    name: str, costs: dict[str, Cost], times: dict[str, Timing], phases: dict[str, Phase],
    ceilings: dict[str, Any], shape: Shape,
) -> dict[str, Any]:  # fmt: skip
    """What the JSON says of one phase."""
    parts = list(costs) if name == WHOLE else [name]
    needs = {part: _needs(part, costs[part], ceilings) for part in parts}
    compute, memory = (sum(need[i] for need in needs.values()) for i in range(2))
    flops, moved = (sum(costs[part][i] for part in parts) for i in range(2))
    seconds = max(times[name].seconds, 1e-9)
    told = {} if name == "prefill" else {"tokens_per_second": shape.tokens / seconds}
    return times[name]._asdict() | told | {
        "flops": flops, "bytes": moved,
        "flops_per_second": flops / seconds, "bytes_per_second": moved / seconds,
        "bound": "compute" if compute > memory else "memory",
        "percent": 100 * sum(map(max, needs.values())) / seconds,
        "memory_bytes": phases[name].memory, "compile_seconds": phases[name].compile_seconds,
    }  # fmt: skip


def _needs(name: str, cost: Cost, ceilings: dict[str, Any]) -> tuple[float, float]:
    """The seconds that a phase's FLOPs and its bytes take at this device's ceilings."""
    rates = ceilings["compute"]
    rate = rates.get(name, rates["training"])
    return cost.flops / rate, cost.bytes / ceilings["bytes_per_second"]
