"""The command `infalign`. Whatever is heavy is imported by the command that needs it."""

import argparse
import difflib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from infalign_jax import __version__
from infalign_jax.commands import questions
from infalign_jax.runtime import parent, stopping

RUN = """\
Run an experiment: from preference pairs to an aligned policy and its report. Finished stages
found in the output directory are reused, and a run that was stopped goes on where it was.

example:
  infalign run experiments/quickstart.py --set model.width=128 --out runs/wide --seed 1
"""
REPORT = """\
Draw the report of a run again from its stored results.

example:
  infalign report runs/quickstart
"""
DOCTOR = """\
Look at what a run needs, one line each: versions, devices, processes, mesh, links between devices,
disk, data, and that all processes have the same code and configuration. Ends with 0 when all is
well, with 1 where a line says FAILED and what to do.

example:
  infalign doctor experiments/quickstart.py --out runs/quickstart
"""


class _Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong, without its usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `arguments` default to the process's own.

    0: done; 1: something is amiss, says `infalign doctor`, or too large, says `infalign plan`; 2: a
    mistake that one line on standard error explains; 130: stopped by Ctrl-C, and 75: by SIGTERM or
    the loss of a host, to be continued by the same command. `--help` and `--version` raise
    SystemExit.

    >>> main(["rum", "experiments/quickstart.py"])
    2
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _read(arguments)
        if options.command == "run" and _one_of_several(options) and not parent.is_child():
            return parent.watch(arguments)
        with stopping.heard():
            return ANSWERED_BY.get(options.command, _ask)(options) or 0
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        lost = parent.is_child() and parent.is_loss(error)
        if not lost and not isinstance(error, (ValueError, OSError, FloatingPointError)):
            raise
        print(f"infalign: {_one_line(error)}", file=sys.stderr)
        return stopping.AGAIN if lost else 2
    except KeyboardInterrupt as stop:
        command = shlex.join(["infalign", *arguments])
        print(f"infalign: stopped; to continue, run again: {command}", file=sys.stderr)
        return stopping.AGAIN if isinstance(stop, stopping.Stopped) else 128 + signal.SIGINT


def _one_of_several(options: argparse.Namespace) -> bool:
    return options.num_processes is not None or parent.launched()


def _parser() -> _Parser:
    parser = _Parser(
        prog="infalign",
        description="Align a language model for the way it is decoded (InfAlign).",
        epilog="example:\n  infalign run experiments/quickstart.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"infalign {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = _command(commands, "run", "run an experiment", RUN)
    questions.add_experiment(run)
    run.add_argument("--out", type=Path, help="output directory (default: runs/EXPERIMENT)")
    run.add_argument("--stage", help="go no further than this stage")
    run.add_argument("--seed", help="the same as --set seed=SEED")
    run.add_argument(
        "--profile", type=int, metavar="STEPS", default=0,
        help="trace so many steps of every training stage, for XProf, into OUT/profile",
    )  # fmt: skip
    _add_hosts(run)
    report = _command(commands, "report", "draw the report of a run again", REPORT)
    report.add_argument("directory", metavar="DIR", type=Path, help="the run's output directory")
    doctor = _command(commands, "doctor", "whether this machine is fit for a run", DOCTOR)
    questions.add_experiment(doctor, needed=False)
    doctor.add_argument("--out", type=Path, help="as of infalign run, to look at its disk")
    _add_hosts(doctor)
    for name, (brief, text) in questions.TEXTS.items():
        questions.add_options(name, _command(commands, name, brief, text))
    return parser


def _add_hosts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where the first of several processes is"
    )
    command.add_argument("--process-id", type=int, help="this process, from 0 on")
    command.add_argument("--num-processes", type=int, help="how many there are")


def _command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    brief: str,
    text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=brief,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument(
        "--traceback", action="store_true", help="show where in the program an error arose"
    )
    return command


def _read(arguments: list[str]) -> argparse.Namespace:
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        positional = {"command", "experiment", "directory", "rewards", "policy", "reference"}
        names = [f"--{name.replace('_', '-')}" for name in vars(options).keys() - positional]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see infalign {options.command} --help"
        raise ValueError(
            f"expected an option of infalign {options.command}, got {unknown[0]}; {hint}"
        )
    return options


def _run(options: argparse.Namespace) -> None:
    from infalign_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    experiment = _experiment(options, [] if options.seed is None else [f"seed={options.seed}"])
    _keep_compiled_programs()
    _join(options)
    from infalign_jax import pipeline

    out = options.out or Path("runs", options.experiment.stem)
    pipeline.run(experiment, out, options.stage, options.profile)


def _experiment(options: argparse.Namespace, changes: Sequence[str] = ()) -> Any:
    """The experiment of a command with its changes, and with its mesh."""
    from infalign_jax import config

    experiment = config.override(config.load(options.experiment), [*options.set, *changes])
    if options.mesh is None:
        return experiment
    from infalign_jax.runtime import mesh_sizes

    return replace(experiment, mesh=mesh_sizes.parse(options.mesh))


def _join(options: argparse.Namespace) -> None:
    from infalign_jax.runtime import hosts

    hosts.join(options.coordinator, options.process_id, options.num_processes)


def _doctor(options: argparse.Namespace) -> int:
    path = options.experiment
    if path is None and (options.set or options.mesh):
        raise ValueError("expected an EXPERIMENT for --set and --mesh, got none; name its file")
    experiment = None if path is None else _experiment(options)
    _join(options)
    from infalign_jax.commands import doctor

    out = options.out or (Path() if path is None else Path("runs", path.stem))
    findings = doctor.examine(experiment, out)
    if told := doctor.told(findings):
        print(doctor.text(told))
    return int(not all(finding.ok for finding in findings))


def _report(options: argparse.Namespace) -> None:
    from infalign_jax import report

    print(report.draw(options.directory))


def _ask(options: argparse.Namespace) -> None:
    _keep_compiled_programs()
    questions.answer(options)


def _bench(options: argparse.Namespace) -> None:
    """Compiled programs are not kept: compilation is measured too."""
    from infalign_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    from infalign_jax.commands import bench, bench_text, printing
    from infalign_jax.lm.sizes import SIZES
    from infalign_jax.runtime import mesh_sizes

    printing.check_targets(options.json)
    earlier = None if options.compare is None else bench.earlier(options.compare)
    usual = SIZES[options.preset].shape
    given = {name: getattr(options, name) for name in usual._fields}
    shape = usual._replace(**{name: n for name, n in given.items() if n is not None})
    sizes = mesh_sizes.parse(options.mesh) if options.mesh else bench.USUAL
    model = bench.fitted(options.preset, options.compute, shape, sizes)
    result = bench.run(model, shape, options.rounds, sizes)
    printing.deliver(result, bench_text.text(result, earlier), options.json)


def _plan(options: argparse.Namespace) -> int:
    """1 where nothing fits, or a phase does not. Compiled programs are not kept: that is timed."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs; a TPU that is there stays free
    from infalign_jax.commands import plan, plan_sweep, plan_text, printing
    from infalign_jax.runtime import topology

    printing.check_targets(options.json)
    if options.sweep and options.mesh is not None:
        raise ValueError(f"expected --sweep or --mesh, got both; leave out --mesh {options.mesh}")
    experiment, chips = _experiment(options), topology.described(options.topology)
    if options.sweep:
        result = plan_sweep.run(experiment, chips)
        printing.deliver(result, plan_sweep.text(result), options.json)
        return int(not any(row["fits"] for row in result["meshes"]))
    result = plan.run(experiment, chips)
    printing.deliver(result, plan_text.text(result), options.json)
    return int(result["first_too_large"] is not None)


ANSWERED_BY: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "run": _run, "report": _report, "bench": _bench, "plan": _plan, "doctor": _doctor,
}  # fmt: skip


def _keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles, in the user's cache unless the environment says where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(_cache_directory()))


def _cache_directory() -> Path:
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home, "infalign-jax", "compiled")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}; put it right and run the same command again"
    return " ".join(str(error).split()) or type(error).__name__
