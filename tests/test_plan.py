"""A plan counts what will run, says what does not fit and what would, and answers mistakes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
import toy
import toy_run

from infalign_jax import cli, phases
from infalign_jax.commands import (
    plan,
    plan_compile,
    plan_fit,
    plan_phases,
    plan_text,
)
from infalign_jax.commands.plan_compile import Compiled
from infalign_jax.drawing import SamplingConfig
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.lm.arithmetic import Cost, Shape
from infalign_jax.phases import FORESIGHT, LOG_PROBS, SAMPLER, SFT, TRUNK, UPDATE
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import topology as topologies
from infalign_jax.runtime.accounts import Account
from infalign_jax.runtime.chips import CHIPS, Chip
from infalign_jax.runtime.collectives import Collective
from infalign_jax.runtime.mesh import MeshConfig
from infalign_jax.runtime.topology import Topology

TOY = str(Path(toy_run.__file__))
PEAKS = Chip(flops=1e12, memory=2**40, memory_rate=1e11, network_rate=1e10)
NOTHING = Account(1.0, 1.0, (), (), ())


def one_device(chip: Chip | None) -> Topology:
    return Topology("cpu:1", tuple(jax.devices()[:1]), chip)


def as_counted(phase: plan_phases.Phase, mesh: Any) -> Compiled:
    """In place of compilation: a device does twice the model's FLOPs, and moves 1 kB each MFLOP."""
    over = Collective("all-reduce", ("data",), 1.0, phase.shape.tokens)
    return Compiled(10**6, 1.0, Account(2 * phase.flops, phase.flops / 1e3, (over,), (), ()))


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_compile, "compiled", as_counted)
        return plan.run(toy_run.experiment, one_device(PEAKS))


def check_flops(found: dict[str, Any]) -> None:
    """The compiler's are the model's, and where there is a backward pass what is computed again."""
    for name, row in found["phases"].items():
        most = 1.5 if name in (SFT, FORESIGHT, UPDATE) else 1.2
        share = row["flops"] * found["chips"] / row["model_flops"]
        assert 0.8 < share < most, name  # of the last layer the prompts need keys and values alone
        assert row["uncounted_loops"] == 0, name


@pytest.mark.slow
def test_compiled_flops_are_the_models_and_what_is_computed_again() -> None:
    check_flops(plan.run(toy_run.experiment, one_device(PEAKS)))


@pytest.mark.parametrize("lanes", [0, 1])
def test_the_samplers_loops_count_at_full_length(lanes: int) -> None:
    """Whether all responses are drawn side by side or one lane goes on to the next."""
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    law, shape = SamplingConfig(length=9, end=11, in_hand=lanes, lanes=lanes), Shape(2, 4, 3, 9)
    phase = plan_phases.sampler(mesh, toy.config(layers=1), law, shape)
    found = plan_compile.compiled(phase, mesh.shape).account
    assert found is not None
    assert not found.unknown
    assert 0.8 < found.flops / phase.flops < 1.2


def test_the_least_time_is_that_of_what_binds(result: dict[str, Any]) -> None:
    row = result["phases"][UPDATE]
    least = row["seconds_at_least"]
    assert least == pytest.approx({
        "compute": 2 * row["model_flops"] / 1e12, "memory": row["model_flops"] / 1e14,
        "network": 4 * 8 * 32 / 1e10,
    })  # fmt: skip
    assert row["bound"] == "compute"
    assert least[row["bound"]] == max(least.values())
    parts = [result["phases"][name] for name in (SAMPLER, LOG_PROBS, "rewards", UPDATE)]
    step = result["step"]
    assert step["seconds"] == pytest.approx(
        sum(max(part["seconds_at_least"].values()) for part in parts)
    )
    tokens = 4 * 8 * 32
    assert step["tokens_per_second_per_chip"] == pytest.approx(tokens / step["seconds"])
    model = sum(part["model_flops"] for part in parts)
    assert step["model_flop_utilisation"] == pytest.approx(model / step["seconds"] / 1e12)


def test_the_stages_are_those_of_the_experiment(result: dict[str, Any]) -> None:
    whole = result["experiment_at_least"]
    steps = {stage["stage"]: stage["steps"] for stage in whole["stages"]}
    assert steps == {
        "sft and judge_sft": 6, "reward and judge": 6, "calibrate": 2, "foresight": 3,
        "align": 8, "evaluate": 1,
    }  # fmt: skip
    assert whole["seconds"] == pytest.approx(sum(s["seconds"] for s in whole["stages"]))
    assert whole["chip_hours"] == pytest.approx(whole["seconds"] / 3600)
    align = next(stage for stage in whole["stages"] if stage["stage"] == "align")
    assert align["seconds"] == pytest.approx(8 * result["step"]["seconds"])


def test_a_plan_is_written_and_read(result: dict[str, Any]) -> None:
    assert (
        json.loads(json.dumps(result, allow_nan=False))["phases"].keys() == result["phases"].keys()
    )
    text = plan_text.text(result)
    assert all(name in text for name in result["phases"])
    assert "An RL step takes at least" in text


def test_what_a_run_keeps_beside_a_phase_counts() -> None:
    """π_ref, reward, judge, foresight's trunk and the policy trained before, each by its size."""
    mesh = jax.make_mesh((1, 1, 1, 1), meshes.AXES, devices=jax.devices()[:1])
    toy, n = toy_run.experiment, arithmetic.parameters(toy_run.experiment.model)
    programs = plan_phases.of_experiment(toy, mesh)
    assert programs[UPDATE].held == (3 + 1 + 1) * n
    assert programs[SAMPLER].held == programs["rewards"].held == (3 + 1 + 1 + 2) * n
    assert (programs[SFT].held, programs["reward step"].held) == (2 * n, 3 * n)
    quick = replace(toy, foresight=replace(toy.foresight, steps=0), policies=toy.policies[:1])
    assert plan_phases.of_experiment(quick, mesh)[UPDATE].held == 3 * n
    small = replace(toy.model, width=8)
    m = arithmetic.parameters(small)
    programs = plan_phases.of_experiment(replace(quick, reward_model=small), mesh)
    assert programs[UPDATE].held == n + 2 * m
    assert programs["rewards"].held == n + m + 3 * n
    assert (programs[SFT].held, programs[TRUNK].held) == (0, n + 2 * m)


@pytest.mark.slow
def test_the_smallest_change_that_fits_is_named_and_compiled() -> None:
    """Half of the batch holds less; the same with nothing changed does not fit."""
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    phase = plan_phases.of_experiment(toy_run.experiment, mesh)[UPDATE]
    row = {"memory_bytes": plan_compile.compiled(phase, mesh.shape).memory, "held_bytes": 0}
    model = replace(toy_run.experiment.model, logits_at_once=320)  # nothing is left to save there
    experiment = replace(toy_run.experiment, model=model)
    used = row["memory_bytes"] + row["held_bytes"]
    for share in (0.98, 0.9):
        tight = one_device(PEAKS._replace(memory=int(share * used)))
        found = plan_fit.smallest(experiment, tight, MeshConfig(1, replica=1), UPDATE, row)
        assert found is not None
        assert found["bytes"] <= share * used
    assert found["set"].startswith(("model.rematerialise=", "align.batch_size="))
    nothing = one_device(PEAKS._replace(memory=100))
    assert plan_fit.smallest(experiment, nothing, MeshConfig(1, replica=1), UPDATE, row) is None


def test_changes_are_tried_from_the_least_costly() -> None:
    experiment = Experiment("quick")
    now = plan_fit.Candidate("", experiment, MeshConfig(4, replica=1))
    tried = [candidate.change for candidate in plan_fit.candidates(now, 4, UPDATE)]
    kinds = list(dict.fromkeys(change.partition("=")[0] for change in tried))
    assert kinds == [
        "model.logits_at_once", "model.rematerialise", "mesh.data", "align.batch_size",
    ]  # fmt: skip
    estimates = [
        phases.estimate(candidate.experiment, candidate.sizes, UPDATE)
        for candidate in plan_fit.candidates(now, 4, UPDATE)
        if candidate.change.startswith("align.batch_size")
    ]
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[0] < phases.estimate(experiment, now.sizes, UPDATE)


def test_what_does_not_fit_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The first phase that does not, with a change that the compiler has tried."""
    limit, path = 2**20, tmp_path / "plan.json"
    tight = one_device(PEAKS._replace(memory=limit))
    monkeypatch.setattr(topologies, "described", lambda name: tight)

    def compiled(phase: plan_phases.Phase, mesh: Any) -> Compiled:
        fits = phase.shape.prompts < 8  # as that of the RL update is, and of half an SFT batch
        return Compiled(1000 if fits else int(1.2 * limit), 1.0, NOTHING if fits else None)

    monkeypatch.setattr(plan_compile, "compiled", compiled)
    asked = ["--topology", "cpu:1", "--set", "model.logits_at_once=320", "--json", str(path)]
    assert cli.main(["plan", TOY, *asked]) == 1
    found = json.loads(path.read_text())
    assert next(name for name, row in found["phases"].items() if not row["fits"]) == SFT
    assert found["step"] is None
    large = found["first_too_large"]
    assert large["phase"] == SFT
    assert large["change"]["set"] == "sft.batch_size=4"
    assert large["change"]["compiled"]
    assert large["change"]["bytes"] < limit
    assert f"{SFT} does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "said",
    [
        "Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (18.50G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_want_of_memory_is_a_result_and_other_errors_are_not(said: str) -> None:
    def full() -> Any:
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    def broken() -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: planted")

    shape, sizes = Shape(1, 1, 1, 1), {"data": 1}
    found = plan_compile.compiled(plan_phases.Phase(full, shape, Cost), sizes)
    assert (found.account, found.memory) == (None, int(18.5 * 2**30))
    with pytest.raises(jax.errors.JaxRuntimeError, match="planted"):
        plan_compile.compiled(plan_phases.Phase(broken, shape, Cost), sizes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v5e"], "write for example v5e:4x4"),
        (["--topology", "v7x:2x2"], "v6e, a100, h100, h200, b200 or cpu with its sizes"),
        (["--topology", "cpu:64"], "xla_force_host_platform_device_count=64"),
        (["--topology", "cpu:1", "--mesh", "data=1,fdsp=1"], "did you mean fsdp?"),
        (["--topology", "cpu:1", "--mesh", "fsdp=4"], "expected a product of 1 (the devices)"),
        (["--topology", "cpu:1", "--set", "model.widht=1"], "did you mean width?"),
        ([], "--topology"),
    ],
)
def test_mistakes_are_answered(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", TOY, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_without_the_compiler_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topologies.util, "find_spec", lambda name: None)
    assert cli.main(["plan", TOY, "--topology", "v5e:2x2"]) == 2
    error = capsys.readouterr().err
    assert 'pip install "infalign-jax[tpu-plan]"' in error
    assert error.count("\n") == 1


def planned(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from infalign_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "plan", TOY, "--json", "-", *arguments]
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.mark.slow
def test_eight_devices_speak_over_the_axes_that_divide_them() -> None:
    flags = "--xla_force_host_platform_device_count=8"
    names = ("align.batch_size", "sft.batch_size", "calibrate.chunk", "foresight.batch_size")
    sizes = [word for name in names for word in ("--set", f"{name}=8")]
    done = planned("--topology", "cpu:8", "--mesh", "data=2,fsdp=4", *sizes, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chip"] is None is found["step"]
    over = {tuple(each["axes"]) for each in found["phases"][UPDATE]["collectives"]}
    assert ("fsdp",) in over
    assert {axis for axes in over for axis in axes} == {"data", "fsdp"}


@pytest.mark.slow
@pytest.mark.skipif(topologies.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
@pytest.mark.parametrize(("kind", "sizes"), [("v5e", "2x2"), ("v4", "2x2x1")])
def test_a_plan_for_tpus(kind: str, sizes: str) -> None:
    done = planned("--topology", f"{kind}:{sizes}", "--mesh", "data=2,fsdp=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chip"]["flops"] == CHIPS[kind].flops
    assert all(row["fits"] for row in found["phases"].values())
    check_flops(found)
    assert 0 < found["step"]["model_flop_utilisation"] < 1
