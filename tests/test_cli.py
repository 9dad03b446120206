"""The command hands over what was asked, answers mistakes in one line and stops politely."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import infalign_jax
from infalign_jax import cli

EXPERIMENT = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Toy:
    seed: int = 0
    width: int = 8
experiment = Toy()
"""


class Calls(list[Any]):
    """What the stubs were called with; `failure` is raised by them."""

    failure: BaseException | None = None

    def add(self, *arguments: Any) -> Path:
        self.append(arguments)
        if self.failure is not None:
            raise self.failure
        return Path("drawn.html")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """Stubs in place of the pipeline and the report, in a directory with an experiment."""
    calls = Calls()
    for name, function in (("pipeline", "run"), ("report", "draw")):
        stub = types.ModuleType(f"infalign_jax.{name}")
        setattr(stub, function, calls.add)
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
        monkeypatch.setattr(infalign_jax, name, stub, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("toy.py").write_text(EXPERIMENT)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    return calls


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_run_hands_over_the_experiment(calls: Calls) -> None:
    assert cli.main(["run", "toy.py"]) == 0
    assert cli.main(["run", "toy.py", "--set", "width=9", "--out", "x", "--stage", "sft"]) == 0
    assert cli.main(["run", "toy.py", "--seed=3", "--set", "seed=2", "--set=width=7"]) == 0
    assert cli.main(["run", "toy.py", "--profile", "5"]) == 0
    told = [((e.seed, e.width), str(out), *rest) for e, out, *rest in calls]
    assert told == [
        ((0, 8), "runs/toy", None, 0),
        ((0, 9), "x", "sft", 0),
        ((3, 7), "runs/toy", None, 0),
        ((0, 8), "runs/toy", None, 5),
    ]


def test_report_draws(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "runs/toy"]) == 0
    assert calls == [(Path("runs/toy"),)]
    assert capsys.readouterr().out == "drawn.html\n"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([], "required: COMMAND; see infalign --help"),
        (["rum"], "invalid choice: 'rum'"),
        (["run"], "required: EXPERIMENT; see infalign run --help"),
        (["run", "toy.py", "--stge", "sft"], "got --stge; did you mean --stage?"),
        (["run", "toy.py", "--stge=sft"], "got --stge=sft; did you mean --stage?"),
        (["run", "toy.py", "--zzz"], "got --zzz; see infalign run --help"),
        (["report", "toy", "--directry"], "got --directry; see infalign report --help"),
        (["run", "toy.py", "extra"], "got extra; see infalign run --help"),
        (["run", "toy.py", "--sta", "sft"], "got --sta; did you mean --stage?"),
        (["run", "tyo.py"], "got tyo.py, which does not exist; did you mean toy.py?"),
        (["run", "toy.py", "--set", "widht=3"], "got widht; did you mean width?"),
        (["run", "toy.py", "--set", "width=x"], "expected width to be int, got x"),
        (["run", "toy.py", "--seed", "x"], "expected seed to be int, got x"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    calls: Calls, capsys: pytest.CaptureFixture[str], arguments: list[str], answer: str
) -> None:
    assert cli.main(arguments) == 2
    assert answer in told(capsys)
    assert calls == []


@pytest.mark.parametrize(
    ("failure", "answer"),
    [
        (ValueError("expected a,\n  got b; do c"), "infalign: expected a, got b; do c\n"),
        (FileNotFoundError("expected x, got nothing"), "infalign: expected x, got nothing\n"),
        (OSError(28, "No space left on device", "out/sft"), "infalign: No space left on device: "),
        (FloatingPointError("loss is nan at step 3"), "infalign: loss is nan at step 3\n"),
        (ValueError(), "infalign: ValueError\n"),
    ],
)
def test_what_the_pipeline_refuses_is_answered_in_one_line(
    calls: Calls, capsys: pytest.CaptureFixture[str], failure: Exception, answer: str
) -> None:
    calls.failure = failure
    assert cli.main(["run", "toy.py"]) == 2
    assert told(capsys).startswith(answer)


def test_a_fault_of_the_program_is_not_hidden(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.failure = KeyError("x")
    with pytest.raises(KeyError):
        cli.main(["run", "toy.py"])
    calls.failure = ValueError("expected a")
    assert cli.main(["run", "toy.py", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("infalign: expected a\n")


def test_ctrl_c_says_how_to_go_on(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.failure = KeyboardInterrupt()
    assert cli.main(["run", "toy.py", "--set", "width=9"]) == 130
    assert "run again: infalign run toy.py --set width=9\n" in told(capsys)


WAITING = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import infalign_jax
from infalign_jax import cli
def wait(*_):
    try:
        print("running", flush=True)
        time.sleep(60)
    finally:
        print("let go", flush=True)
infalign_jax.pipeline = stub = types.ModuleType("infalign_jax.pipeline")
sys.modules[stub.__name__] = stub
stub.run = wait
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_a_real_run(calls: Calls, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", WAITING, "run", "toy.py"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "let go\n")
    assert err == "infalign: stopped; to continue, run again: infalign run toy.py\n"


def test_the_handler_of_the_caller_comes_back(calls: Calls) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        cli.main(["run", "toy.py"])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


COMMANDS = ("run", "report", "doctor", "frontier", "predict", "evaluate")


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_shows_an_example_and_imports_nothing_heavy(arguments: list[str]) -> None:
    source = (
        "import sys; from infalign_jax import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "finally: print('HEAVY', {'jax', 'numpy', 'rich', 'orbax', 'flax'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "example:\n  infalign " in done.stdout
    assert done.stdout.endswith("HEAVY set()\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"infalign {infalign_jax.__version__}\n"


CACHE = """
import os, sys, types
import infalign_jax
from infalign_jax import cli
infalign_jax.pipeline = stub = types.ModuleType("infalign_jax.pipeline")
sys.modules[stub.__name__] = stub
def compile_something(*_):
    import jax
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x + 1)(1.0)
stub.run = compile_something
sys.exit(cli.main(["run", "toy.py"]))
"""


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        ("JAX_COMPILATION_CACHE_DIR", "there"),
        ("XDG_CACHE_HOME", "there/infalign-jax/compiled"),
        ("HOME", "there/.cache/infalign-jax/compiled"),
    ],
)
def test_compiled_programs_are_kept(
    calls: Calls, tmp_path: Path, variable: str, place: str
) -> None:
    names = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {"HOME": str(tmp_path / "home"), variable: str(tmp_path / "there")}
    if variable == "HOME" and sys.platform == "darwin":
        place = "there/Library/Caches/infalign-jax/compiled"
    command = [sys.executable, "-c", CACHE]
    subprocess.run(command, check=True, env=environment | {"JAX_PLATFORMS": "cpu"})
    assert any(path.name.startswith("jit_") for path in (tmp_path / place).iterdir())
