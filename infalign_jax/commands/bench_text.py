"""The tables of `infalign bench`."""

from typing import Any

from infalign_jax.commands.printing import table


def text(result: dict[str, Any], earlier: dict[str, Any] | None = None) -> str:
    """What was measured, for a reader; with an earlier result, how much faster it has become.

    >>> row = {"seconds": 0.5, "least": 0.4, "most": 0.6, "flops_per_second": 2e9,
    ...     "bytes_per_second": 1e8, "bound": "compute", "percent": 40.0, "memory_bytes": 2**20,
    ...     "compile_seconds": 1.5, "tokens_per_second": 128.0}
    >>> rates = {"prefill": 5e9, "decode": 5e9, "training": 5e9}
    >>> result = {"device": "cpu", "devices": 1, "mesh": {"data": 1}, "rounds": 3,
    ...     "parameters": 1000,
    ...     "versions": {"python": "3.11", "jax": "0.10"}, "model": {"compute": "float32"},
    ...     "shape": {"prompts": 2, "prompt": 4, "responses": 2, "response": 4},
    ...     "ceilings": {"bytes_per_second": 1e9, "float32": rates, "bfloat16": rates},
    ...     "phases": {"update": row}}
    >>> for line in text(result, result).splitlines()[-2:]:
    ...     print(line[:50].rstrip())
    phase    ms      spread  tokens/s  GFLOP/s  GB/s
    update  500  400 to 600       128     2.00  0.10
    """
    header = ["phase", "ms", "spread", "tokens/s", "GFLOP/s", "GB/s", "bound", "% of it"]
    header += ["MiB", "compile, s"] + ["times as fast"] * (earlier is not None)
    rows = [_row(name, row, earlier) for name, row in result["phases"].items()]
    return "\n".join([*_about(result), "", table(header, rows)])


def _about(result: dict[str, Any]) -> list[str]:
    shape, ceilings = result["shape"], result["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    kinds = ("float32", "bfloat16")
    rates = [[kind, *(f"{rate / 1e9:,.0f}" for rate in ceilings[kind].values())] for kind in kinds]
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    return [
        f"{result['devices']} × {result['device']}{mesh and f' ({mesh})'}, {versions}; "
        f"{result['parameters']:,} parameters, {result['model']['compute']}",
        f"{shape['prompts']} prompts of {shape['prompt']} tokens, {shape['responses']} responses "
        f"of {shape['response']} to each; medians of {result['rounds']} and their spread",
        "",
        f"copy: {ceilings['bytes_per_second'] / 1e9:,.1f} GB/s",
        table(["products, GFLOP/s, at the rows of", *ceilings["float32"]], rates),
    ]


def _row(name: str, row: dict[str, Any], earlier: dict[str, Any] | None) -> list[str]:
    cells = [
        name,
        f"{1e3 * row['seconds']:.3g}",
        f"{1e3 * row['least']:.3g} to {1e3 * row['most']:.3g}",
        f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "–",
        f"{row['flops_per_second'] / 1e9:,.2f}",
        f"{row['bytes_per_second'] / 1e9:,.2f}",
        row["bound"],
        f"{row['percent']:.0f}",
        f"{row['memory_bytes'] / 2**20:,.1f}",
        f"{row['compile_seconds']:.1f}",
    ]
    if earlier is not None:
        before = earlier["phases"].get(name)
        known = before is not None and row["seconds"] > 0
        cells.append(f"{before['seconds'] / row['seconds']:.2f}" if known else "–")
    return cells
