"""The options of the commands that need no model, and who answers them.

Nothing heavy is imported before a command is answered: `infalign --help` reads this file.
"""

import argparse
import math
from pathlib import Path
from typing import Any

TEXTS = {  # of each command a brief and a long description
    "frontier": (
        "what each Φ reaches at a KL",
        """\
What a perfect solver reaches with each Φ at a KL (or β), and how far under the frontier, the
highest win rate that any policy of this KL can have. No model and no data are needed.

example:
  infalign frontier --procedure best_of_4 --kl 0.25 0.5 --plot best_of_4.png
""",
    ),
    "predict": (
        "what rewards of the reference promise",
        """\
From the rewards of K reference responses to each prompt: how far the raw reward is from calibrated,
what each Φ would gain at equal KL by this reward and by a second judge, the Φ and β to take, and
what more responses would help.

REWARDS ends in .jsonl, .ndjson, .csv, .parquet or .npz. Its columns: prompt, reward and, if there
is a second judge, judge, a row a response; or prompt, rewards and judge, lists of K, a row a prompt
(in CSV reward_0, reward_1, … and judge_0, …). Arrays of NPZ: rewards and judge [B, K], prompts [B].
infalign_jax/reward_files.py says all of it.

example:
  infalign predict rewards.csv --procedure best_of_4 --kl 0.25 0.5
""",
    ),
    "evaluate": (
        "win rates from files of rewards",
        """\
Win rates of a policy over the reference, with 95 % intervals, from files of rewards of both (as for
`infalign predict`); by a second judge too, where all files have one. Prompts are matched by text.

example:
  infalign evaluate policy.csv reference.csv --procedure standard best_of_4 --against other.csv
""",
    ),
    "bench": (
        "how fast this device is at it",
        """\
How fast one RL step is on the devices that are there, phase by phase, with a model of random
weights; beside what the device itself can do, measured first. `--compare` prints how many times as
fast each phase has become since an earlier `--json`.

example:
  infalign bench --preset 1m --json now.json
  infalign bench --preset 1m --compare now.json
""",
    ),
    "plan": (
        "what an experiment needs of TPUs",
        """\
What an experiment would need of TPUs that need not be there: every phase is compiled for them from
shapes alone and none is run. Memory a chip, FLOPs, bytes moved, collectives and the axes they run
over; the least time that the chip's published peaks allow, and the chip-hours that comes to. Exit
code 1, with the smallest change that would help, where a phase does not fit. Needs libtpu
(pip install "infalign-jax[tpu-plan]"), except for cpu:N and for GPUs, which are planned by
arithmetic alone. --sweep compiles one RL step on every mesh of the topology and ranks them; exit
code 1 where it fits on none.

examples:
  infalign plan experiments/quickstart.py --topology v5e:2x2 --mesh data=2,fsdp=2
  infalign plan experiments/quickstart.py --topology h100:8 --sweep
""",
    ),
}
SIZES = ("tiny", "1m", "5m", "125m", "1b", "8b")  # of lm/sizes.py


def add_options(name: str, command: argparse.ArgumentParser) -> None:
    """Gives the command of that name its arguments and options.

    >>> parser = argparse.ArgumentParser()
    >>> add_options("frontier", parser)
    >>> parser.parse_args(["--procedure", "best_of_4", "--kl", "0.25", "0.5", "--kl", "1"]).kl
    [0.25, 0.5, 1.0]
    """
    match name:
        case "frontier":
            _add_contest(command)
            _add_transformations(command)
            at = command.add_mutually_exclusive_group()
            _add_numbers(at, "--kl", "KLs in nats (default: 0.1 0.25 0.5 1 2)")
            _add_numbers(at, "--beta", "βs in place of KLs")
            command.add_argument(
                "--plot", type=Path, metavar="FILE", help="a .png, .pdf or .svg to draw"
            )
        case "predict":
            _add_file(command, "rewards", "REWARDS", "of reference responses")
            _add_contest(command)
            _add_transformations(command)
            _add_numbers(command, "--kl", "KLs in nats (default: 0.5)")
        case "evaluate":
            _add_file(command, "policy", "POLICY_REWARDS", "of the policy's responses")
            _add_file(command, "reference", "REFERENCE_REWARDS", "of the reference's")
            _add_contest(command, nargs="+", action="extend")
            command.add_argument(
                "--against",
                type=Path,
                metavar="OTHER",
                help="another policy's rewards, for the paired difference",
            )
        case "bench":
            _add_bench(command)
        case "plan":
            _add_plan(command)
    command.add_argument(
        "--json",
        metavar="FILE",
        help=f"write all digits as JSON, - to print it (fields: infalign_jax/commands/{name}.py)",
    )


def add_experiment(command: argparse.ArgumentParser, needed: bool = True) -> None:
    """The experiment of a command, and changes to it.

    >>> parser = argparse.ArgumentParser()
    >>> add_experiment(parser)
    >>> parser.parse_args("mine.py --set seed=1 --set model.width=8".split()).set
    ['seed=1', 'model.width=8']
    """
    command.add_argument(
        "experiment",
        metavar="EXPERIMENT",
        type=Path,
        nargs=None if needed else "?",
        help="its Python file",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field, such as model.width=128; may be repeated",
    )
    _add_mesh(command, "the file's")


def _add_plan(command: argparse.ArgumentParser) -> None:
    add_experiment(command)
    kinds = "v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4, h100:8, … or cpu:N"
    command.add_argument("--topology", required=True, metavar="KIND:SIZES", help=kinds)
    ranked = "one RL step on all meshes there are, ranked, in place of --mesh"
    command.add_argument("--sweep", action="store_true", help=ranked)


def _add_file(command: argparse.ArgumentParser, name: str, shown: str, text: str) -> None:
    command.add_argument(name, metavar=shown, type=Path, help=text)


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--preset", choices=SIZES, default="1m", help="the model and its batch (default: 1m)"
    )
    sizes = {"prompts": "prompts", "prompt": "tokens of each", "responses": "responses to each"}
    for name, text in (sizes | {"response": "tokens of each of those"}).items():
        command.add_argument(f"--{name}", type=_count, metavar="NUMBER", help=text)
    command.add_argument(
        "--compute", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16"
    )
    command.add_argument(
        "--rounds", type=_count, default=5, metavar="NUMBER", help="measurements (default: 5)"
    )
    command.add_argument("--compare", type=Path, metavar="FILE", help="an earlier --json")
    _add_mesh(command, "all devices along data")


def _add_mesh(command: argparse.ArgumentParser, usual: str) -> None:
    sizes = f"its axes, such as data=4,fsdp=8, or a preset, such as v5e-64 (default: {usual})"
    command.add_argument("--mesh", metavar="SIZES", help=sizes)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(text)


def _add_contest(command: argparse.ArgumentParser, **several: Any) -> None:
    known = "standard, best_of_4, worst_of_4, order_statistic(2,3), best_of_poisson(3), …"
    command.add_argument("--procedure", required=True, metavar="NAME", help=known, **several)
    command.add_argument(
        "--reference-procedure", metavar="NAME", help="the reference's (default: the same)"
    )


def _add_transformations(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--transformation",
        nargs="+",
        action="extend",
        default=[],
        metavar="Φ",
        help="identity, log, 'exponential(10)', 'optimal(best_of_4)', …; default: the usual ones",
    )


def _add_numbers(command: argparse._ActionsContainer, name: str, text: str) -> None:
    command.add_argument(
        name, nargs="+", action="extend", default=[], type=_positive, metavar="NUMBER", help=text
    )


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected positive numbers, got {text}: such as 0.5")
    return number


def answer(options: argparse.Namespace) -> None:
    """Answers the command in `options.command`, on the standard output and in files asked for.

    Raises ValueError on a user's mistake, before anything is written; OSError where a file cannot
    be read or written.

    >>> parser = argparse.ArgumentParser()
    >>> add_options("frontier", parser)
    >>> asked = "--procedure standard --transformation log --beta 0.5".split()
    >>> answer(parser.parse_args(asked, argparse.Namespace(command="frontier")))
    standard, reference standard: what a perfect solver reaches
    <BLANKLINE>
    Φ                    β      KL  win rate %  below the frontier
    log                0.5  0.4319       75.00                0.64
    optimal(standard)  0.5  0.1516       65.65                0.00
    """
    import jax

    from infalign_jax.commands import printing

    printing.check_targets(options.json, getattr(options, "plot", None))
    # Sharp Φ at a large KL, and optima for a large N, need double precision.
    with jax.enable_x64(True):
        {"frontier": _frontier, "predict": _predict, "evaluate": _evaluate}[options.command](
            options
        )


def _frontier(options: argparse.Namespace) -> None:
    from infalign_jax.commands import frontier, printing

    result = frontier.compare(
        options.procedure,
        reference_procedure=options.reference_procedure,
        transformations=options.transformation,
        kls=options.kl,
        betas=options.beta,
    )
    picture = None
    if options.plot is not None:
        from infalign_jax.commands import frontier_plot

        picture = options.plot, frontier_plot.picture(result, options.plot.suffix)
    printing.deliver(result, frontier.text(result), options.json, picture)


def _predict(options: argparse.Namespace) -> None:
    from infalign_jax import reward_files
    from infalign_jax.commands import predict, predict_text, printing

    result = predict.advise(
        reward_files.read(options.rewards),
        options.procedure,
        reference_procedure=options.reference_procedure,
        transformations=options.transformation,
        kls=options.kl or predict.USUAL_KLS,
    )
    printing.deliver(result, predict_text.text(result, str(options.rewards)), options.json)


def _evaluate(options: argparse.Namespace) -> None:
    from infalign_jax import reward_files
    from infalign_jax.commands import evaluate, printing

    paths = {role: getattr(options, role) for role in ("policy", "reference", "against")}
    files = {role: (str(path), reward_files.read(path)) for role, path in paths.items() if path}
    result = evaluate.measure(
        files, options.procedure, reference_procedure=options.reference_procedure
    )
    printing.deliver(result, evaluate.text(result, files), options.json)
