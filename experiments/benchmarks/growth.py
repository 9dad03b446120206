"""How the time and the memory of each phase of a step grow, beside what arithmetic foretells.

Command:   python experiments/benchmarks/growth.py
           (with --axes K P: those alone)
Cost:      14 minutes on two idle cores with --rounds 2, 4 GB of memory
Expected:  experiments/results/benchmarks/growth.md: which phases grow faster than their arithmetic

One size changes at a time: K, P, T, V or the parameters, from the 1m preset with 8 prompts of 64
tokens. Each point is one `infalign bench`, but on one device of a CPU. Foretold is the time of the
phase's FLOPs or bytes (`lm/arithmetic.py`), whichever take longer at what the device does with
products of the point's own shapes and with copies; and the least memory that the phase can do with.
An exponent is the least-squares slope of a logarithm over the size's, so that 1 is proportional;
measured and foretold ones are fitted to the same points. What each call costs besides, at small
sizes, hides growth at large ones: so there is a second exponent, of the upper half of the sizes
alone. A phase is named where either is more than 0.1 above the foretold one. That is a complexity
to mend where it also passes FLOPs and bytes; else a part that uses less of the device has come to
weigh more, or sizes have outgrown a cache.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import load
import numpy as np

from infalign_jax.commands import bench
from infalign_jax.commands.bench_phases import WHOLE
from infalign_jax.lm import arithmetic
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.sizes import SIZES
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime import files
from infalign_jax.runtime.allocator import keep_freed_memory

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.1  # by which an exponent may pass the foretold one
LOG_PROBS = "reference log-probabilities"
PHASES = ("prefill", "decode", LOG_PROBS, "reward scoring", "update", WHOLE)

Answer = dict[str, Any]


class Axis(NamedTuple):
    """What grows, and each point's changes to the preset's model and batch.

    The size is the first of them, or where widths change the number of parameters.
    """

    about: str
    points: Sequence[Mapping[str, int]]


def models(*sizes: tuple[int, int]) -> list[dict[str, int]]:
    return [{"width": width, "layers": n, "mlp_width": 3 * width} for width, n in sizes]


# Where the largest point would take minutes, its axis has fewer responses.
AXES = {
    "K": Axis("responses to a prompt", [{"responses": n} for n in (1, 4, 16, 64)]),
    "P": Axis("tokens of a prompt, K = 8", [{"prompt": n} for n in (64, 128, 256, 512, 1024)]),
    "T": Axis(
        "tokens of a response, K = 4",
        [{"response": n, "responses": 4} for n in (64, 128, 256, 512)],
    ),
    "V": Axis(
        "tokens of the vocabulary, K = 2",
        [{"vocab_size": n, "responses": 2} for n in (2048, 8192, 32_768, 131_072)],
    ),
    "parameters": Axis(
        "by width and layers, V = 2,048, K = 4",
        [size | {"responses": 4} for size in models((64, 4), (128, 5), (256, 6), (384, 9))],
    ),
}


def seconds(row: Answer) -> float:
    """Decoding is a difference, which noise can make 0."""
    return float(max(row["seconds"], 1e-9))


def few(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


class Quantity(NamedTuple):
    """What is measured of a phase, and what is foretold of it, from one point's row."""

    about: str
    measured: Callable[[Answer], float]
    foretold: Callable[[Answer], float]
    cell: Callable[[float, float], str]
    beside: Sequence[str] = ()  # entries of a row whose exponents are told besides


QUANTITIES = {
    "time": Quantity(
        "Milliseconds (% of the ceiling)",
        seconds,
        lambda row: row["percent"] / 100 * seconds(row),
        lambda found, told: f"{few(1e3 * found)} ({100 * told / found:.0f})",
        ("flops", "bytes"),
    ),
    "memory": Quantity(
        "Memory, MiB (times the least)",
        lambda row: row["memory_bytes"],
        lambda row: row["least_memory"],
        lambda found, told: f"{few(found / 2**20)} ({found / told:.1f})",
    ),
}


def work(changes: Mapping[str, int]) -> tuple[TransformerConfig, Shape]:
    """A point's model and batch."""
    of_batch = {name: n for name, n in changes.items() if name in Shape._fields}
    of_model: Answer = {name: n for name, n in changes.items() if name not in of_batch}
    model = replace(bench.fitted("1m"), **of_model)
    unroll = 1 if model.unroll == 1 else model.layers
    return replace(model, unroll=unroll), SIZES["1m"].shape._replace(**of_batch)


def least_memory(phase: str, model: TransformerConfig, shape: Shape) -> int:
    """Bytes that a phase cannot do without; no scores of attention, which need not stand whole.

    A forward pass holds the parameters, the hidden states, and one layer's widest product or, where
    they are more, as many logits as stand at once; prefill also what it keeps of the prompts.
    """
    if phase == "decode":
        return arithmetic.sampling_memory(model, shape)
    if phase in ("update", WHOLE):
        return arithmetic.update_memory(model, shape)
    prompts, responses = shape.prompts * shape.prompt, shape.tokens * (phase != "prefill")
    rows, widest = prompts + responses, max(outer for _, outer in arithmetic.layer_products(model))
    logits = (phase == LOG_PROBS) * min(model.logits_at_once, responses * model.vocab_size)
    numbers = rows * model.width + max(rows * widest, logits)
    if phase == "prefill":
        numbers += prompts * 2 * model.layers * model.kv_heads * model.head_size
    return 4 * arithmetic.parameters(model) + numbers * model.dtype.itemsize


def point(changes: Mapping[str, int], options: argparse.Namespace) -> Answer:
    """What `infalign bench` finds at one point, with its size, and the cores others used."""
    model, shape = work(changes)
    others = None
    if options.load_check:
        load.wait_until_idle()
        begun, before, own = time.monotonic(), load.now()[0], load.used()
    found = bench.run(model, shape, options.rounds)
    if options.load_check:
        all_of_it, ours = load.now()[0] - before, load.used() - own
        others = load.by_others(all_of_it, ours, time.monotonic() - begun)
    phases = {
        phase: found["phases"][phase] | {"least_memory": least_memory(phase, model, shape)}
        for phase in PHASES
    }
    size = found["parameters"] if "width" in changes else next(iter(changes.values()))
    kept = {name: found[name] for name in ("model", "parameters", "shape", "ceilings")}
    return {"size": size, "others": others} | kept | {"phases": phases}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of the size that the values grow with."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def growth(
    sizes: Sequence[float], found: Sequence[float], told: Sequence[float]
) -> dict[str, float]:
    """Exponents of what was measured and foretold, of all sizes and of their upper half.

    `excess` is how far the measured ones are above the foretold ones, at most.
    """
    upper = slice(min(len(sizes) // 2, len(sizes) - 2), None)
    both = {"measured": found, "foretold": told}
    exponents = {name: exponent(sizes, values) for name, values in both.items()}
    exponents |= {
        f"upper_{name}": exponent(sizes[upper], values[upper]) for name, values in both.items()
    }
    over = (exponents[part + "measured"] - exponents[part + "foretold"] for part in ("", "upper_"))
    return exponents | {"excess": max(over)}


def grown(points: Sequence[Answer]) -> Answer:
    """The growth of each quantity of each phase."""
    sizes, found = [p["size"] for p in points], {}
    for name, quantity in QUANTITIES.items():
        found[name] = {}
        for phase in PHASES:
            rows = [p["phases"][phase] for p in points]
            both = (list(map(each, rows)) for each in (quantity.measured, quantity.foretold))
            beside = {x: exponent(sizes, [row[x] for row in rows]) for x in quantity.beside}
            found[name][phase] = growth(sizes, *both) | beside
    return found


def too_fast(growth: Mapping[str, float]) -> bool:
    return growth["excess"] > TOLERANCE


def table(letter: str, points: Sequence[Answer], name: str, found: Answer) -> list[str]:
    """One quantity of all phases at all sizes, with its exponents."""
    quantity = QUANTITIES[name]
    header = [quantity.about, *(f"{letter} = {p['size']:,}" for p in points)]
    header += ["exponent", "foretold", "upper half", "foretold", *quantity.beside, "above by"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    columns = ("measured", "foretold", "upper_measured", "upper_foretold", *quantity.beside)
    for phase in PHASES:
        rows = [p["phases"][phase] for p in points]
        cells = [quantity.cell(quantity.measured(row), quantity.foretold(row)) for row in rows]
        cells += [f"{round(found[phase][column], 2) + 0.0:.2f}" for column in columns]
        cells += [f"**{found[phase]['excess']:.2f}**" if too_fast(found[phase]) else ""]
        lines.append(f"| {' | '.join([phase, *cells])} |")
    return lines


def verdict(axes: Mapping[str, Answer]) -> list[str]:
    """Every phase that grows faster than foretold, the worst first."""
    fast = [
        (found["excess"], f"{letter}: {name} of {phase}, by {found['excess']:.2f}")
        for letter, axis in axes.items()
        for name, phases in axis["growth"].items()
        for phase, found in phases.items()
        if too_fast(found)
    ]
    return [f"- {text}" for _, text in sorted(fast, reverse=True)] or ["- none"]


def markdown(stored: Answer) -> str:
    disturbed = [p["others"] for axis in stored["axes"].values() for p in axis["points"]]
    known = [others for others in disturbed if others is not None]
    others = f"others used up to {max(known):.2f} cores" if known else "LOAD NOT CHECKED"
    lines = [
        "# How time and memory of a step grow", "",
        "```", "python experiments/benchmarks/growth.py", "```", "",
        f"{stored['machine']}; medians of {stored['rounds']} rounds; {others}.",
        "The 1m preset, 8 prompts, P = T = 64, but for what a heading says. An exponent of 1 is",
        "proportional growth; foretold by arithmetic at the point's own ceilings.", "",
        f"## Faster than foretold by more than {TOLERANCE}", "", *verdict(stored["axes"]),
    ]  # fmt: skip
    for letter, axis in stored["axes"].items():
        lines += ["", f"## {letter}: {axis['about']}"]
        for name, found in axis["growth"].items():
            lines += ["", *table(letter, axis["points"], name, found)]
    return "\n".join([*lines, ""])


def measure_all(options: argparse.Namespace) -> str:
    """Measures the axes in turn; each is on disk once it is done."""
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {versions}"
    stored: Answer = {"machine": machine, "rounds": options.rounds, "axes": {}}
    for letter in options.axes:
        points = []
        for changes in AXES[letter].points:
            begun = time.perf_counter()
            points.append(point(changes, options))
            took = time.perf_counter() - begun
            print(f"{letter} = {points[-1]['size']:,}: {took:.0f} s", file=sys.stderr, flush=True)
        about = {"about": AXES[letter].about, "points": points}
        stored["axes"][letter] = about | {"growth": grown(points)}
        files.write_text(options.out / "growth.json", json.dumps(stored, indent=1) + "\n")
        files.write_text(options.out / "growth.md", markdown(stored))
    return markdown(stored)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/benchmarks")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-load-check", action="store_false", dest="load_check")
    return parser.parse_args(arguments)


def main() -> None:
    keep_freed_memory()
    print(measure_all(parsed(sys.argv[1:])))


if __name__ == "__main__":
    main()
