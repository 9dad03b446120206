"""GPUs are planned by arithmetic; what does not fit is told the smallest change that would."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import toy_run

from infalign_jax import cli, phases
from infalign_jax.commands import (
    plan,
    plan_arithmetic,
    plan_fit,
    plan_rows,
)
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.phases import LOG_PROBS, PREFILL, SAMPLER, UPDATE
from infalign_jax.runtime import topology
from infalign_jax.runtime.chips import GPUS, Chip
from infalign_jax.runtime.mesh import MeshConfig
from infalign_jax.runtime.topology import Topology

TOY, QUICK = str(Path(toy_run.__file__)), Experiment("quick")


def gpus(count: int, chip: Chip = GPUS["h100"]) -> Topology:
    return Topology(f"h100:{count}", (), chip, count)


def test_gpus_are_planned_by_arithmetic_and_it_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    sizes = ["--topology", "h100:2", "--mesh", "data=2", "--set", "align.batch_size=4"]
    assert cli.main(["plan", TOY, *sizes, "--json", str(path)]) == 0
    assert "by arithmetic, nothing compiled" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert (found["compiled"], found["chips"]) == (False, 2)
    assert set(found["versions"]) == {"jax"}
    for name, row in found["phases"].items():
        assert row["flops"] == pytest.approx(row["model_flops"] / 2), name
        assert row["compile_seconds"] is None
    update = found["phases"][UPDATE]
    parameters = arithmetic.parameters(toy_run.experiment.model)
    assert update["collectives"] == [
        {"kind": "all-reduce", "axes": ["data"], "calls": 1.0, "bytes": 4.0 * parameters}
    ]
    assert update["held_bytes"] == 5 * 4 * parameters


def test_a_gpu_that_is_too_small_is_told_the_smallest_change() -> None:
    """Half of the batch, where nothing is left to save otherwise; estimated, not compiled."""
    one, toy = MeshConfig(1, replica=1), toy_run.experiment
    toy = replace(toy, model=replace(toy.model, rematerialise="everything", logits_at_once=320))
    row = plan_rows.planned(toy, gpus(1), one, [UPDATE]).rows[UPDATE]
    tight = gpus(1, GPUS["h100"]._replace(memory=row["memory_bytes"] + row["held_bytes"] - 1))
    found = plan_fit.smallest(toy, tight, one, UPDATE, row)
    assert found is not None
    half = replace(toy, align=replace(toy.align, batch_size=2))
    needed = phases.estimate(half, one, UPDATE) + row["held_bytes"]
    assert found == {"set": "align.batch_size=2", "bytes": int(needed), "compiled": False}
    nothing = gpus(1, GPUS["h100"]._replace(memory=1000))
    assert plan_fit.smallest(toy, nothing, one, UPDATE, row) is None


def test_what_a_run_keeps_beside_it_must_fit_too() -> None:
    one = MeshConfig(1, replica=1)
    row = plan_rows.planned(QUICK, gpus(1), one, [UPDATE]).rows[UPDATE]
    both = row["memory_bytes"] + row["held_bytes"]
    for memory in (both, both - 1):
        chips = gpus(1, GPUS["h100"]._replace(memory=memory))
        found = plan_rows.planned(QUICK, chips, one, [UPDATE]).rows[UPDATE]
        assert found["fits"] == (memory == both)


def test_another_mesh_divides_what_is_kept_too() -> None:
    """Parameters over two GPUs: half of those beside the phase are on each."""
    two, over = MeshConfig(2, replica=1), MeshConfig(1, 2, 1, 1)
    quick = replace(
        QUICK, model=replace(QUICK.model, rematerialise="everything", logits_at_once=512)
    )
    row = plan_rows.planned(quick, gpus(2), two, [UPDATE]).rows[UPDATE]
    needed = int(phases.estimate(quick, over, UPDATE) + row["held_bytes"] / 2)
    chips = gpus(2, GPUS["h100"]._replace(memory=needed))
    found = plan_fit.smallest(quick, chips, two, UPDATE, row)
    assert found == {"set": "mesh.data=1,mesh.fsdp=2", "bytes": needed, "compiled": False}


def test_two_changes_are_tried_where_one_does_not_do() -> None:
    """Less than any one of them leaves: more is computed again, of a smaller batch."""
    one, toy = MeshConfig(1, replica=1), toy_run.experiment
    toy = replace(toy, model=replace(toy.model, logits_at_once=320))
    row = plan_rows.planned(toy, gpus(1), one, [UPDATE]).rows[UPDATE]
    now = plan_fit.Candidate("", toy, one)
    changes = list(plan_fit.candidates(now, 1, UPDATE))
    single = [each for each in changes if each.change.count("=") == 1]
    least = min(phases.estimate(each.experiment, one, UPDATE) for each in single)
    tight = GPUS["h100"]._replace(memory=int(least) + row["held_bytes"] - 1)
    found = plan_fit.smallest(toy, gpus(1, tight), one, UPDATE, row)
    assert found is not None
    assert found["set"].startswith("model.rematerialise=")
    assert ",align.batch_size=" in found["set"]
    assert len({each.change for each in changes}) == len(changes)


@pytest.mark.parametrize(
    ("name", "words"),
    [("h100:16", "at most 8 GPUs"), ("h100:2x4", "write for example h100:8"), ("h10:8", "a100")],
)
def test_gpus_that_there_are_not(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", TOY, "--topology", name]) == 2
    assert words in capsys.readouterr().err


def test_what_crosses_the_network_by_arithmetic() -> None:
    """Of 8 devices: parameters are gathered within fsdp, gradients summed over all others."""
    model = toy_run.experiment.model
    whole = 4.0 * arithmetic.parameters(model)
    found = plan_arithmetic.network(model, MeshConfig(2, 2, 1, 2), rows=10, learns=True)
    told = {(each.kind, each.axes): each.bytes for each in found}
    assert told == {
        ("all-gather", ("fsdp",)): 2 * whole / 2,
        ("reduce-scatter", ("fsdp",)): whole / 2,
        ("all-reduce", ("replica", "data")): 2 * whole / 2 * 3 / 4,
    }
    halves = plan_arithmetic.network(model, MeshConfig(1, 1, 2, 1), rows=10, learns=False)
    (over,) = halves
    assert over.bytes == 2 * model.layers * 10 * model.width * 4 * 1.0


def test_a_device_moves_its_own_part() -> None:
    """Of a batch divided in two, half of the keys and values, and all parameters."""
    shape = phases.shapes(QUICK)[PREFILL]
    phase = plan_rows.phases_of(QUICK, gpus(2), MeshConfig(2, replica=1))[PREFILL]
    own = arithmetic.prefill(QUICK.model, shape._replace(prompts=shape.prompts // 2))
    found = plan_arithmetic.counted(QUICK, MeshConfig(2, replica=1), PREFILL, phase)
    assert found.account is not None
    assert found.account.bytes == own.bytes
    tensor = plan_arithmetic.counted(QUICK, MeshConfig(1, 1, 2, 1), PREFILL, phase).account
    assert tensor is not None
    assert tensor.bytes == arithmetic.prefill(QUICK.model, shape).bytes / 2


def test_a_reward_of_its_own_size_has_changes_and_stages_of_its_own() -> None:
    small = replace(QUICK.model, width=32, logits_at_once=2**12)
    quick = replace(QUICK, reward_model=small)
    found = plan.run(quick, gpus(1))
    names = [stage["stage"] for stage in found["experiment_at_least"]["stages"]]
    assert names[:3] == ["sft", "reward_sft and judge_sft", "reward and judge"]
    one, parts = MeshConfig(1, replica=1), ("policy's", "reward's")
    rows = found["phases"]
    told = [rows[name]["model_flops"] for name in ("SFT step", "SFT step of a reward")]
    assert told[0] > told[1], parts
    now = plan_fit.Candidate("", quick, one)
    changes = [each.change for each in plan_fit.candidates(now, 1, "SFT step of a reward")]
    assert changes[0] == "reward_model.logits_at_once=2048"
    assert "reward_model.rematerialise=cheap" in changes


def test_memory_by_arithmetic() -> None:
    """Of foresight π_ref too, of updates what was seen above the least, of prompts no answer."""
    one, n = MeshConfig(1, replica=1), arithmetic.parameters(QUICK.model)
    shape = phases.shapes(QUICK)["foresight step"]
    learns = arithmetic.update_memory(QUICK.model, shape)
    assert phases.least(QUICK, one, "foresight step") == learns + 4 * n
    assert phases.estimate(QUICK, one, "foresight step") == 2.0 * (learns + 4 * n)
    prompts = phases.shapes(QUICK)[PREFILL]
    assert phases.least(QUICK, one, PREFILL) == arithmetic.scoring_memory(
        QUICK.model, prompts._replace(responses=0)
    )


def test_an_update_moves_its_own_part_of_the_state() -> None:
    whole, half = (arithmetic.update(QUICK.model, Shape(4, 3, 2, 5), n).bytes for n in (1, 2))
    assert whole - half == pytest.approx(7 * 4 * arithmetic.parameters(QUICK.model) / 2)


def test_foresight_and_scoring_are_phases_of_their_own() -> None:
    """A step of foresight learns, and has π_ref's pass besides."""
    found = plan.run(QUICK, gpus(1))["phases"]
    shape = phases.shapes(QUICK)["foresight step"]
    once = arithmetic.forward(QUICK.model, shape).flops
    assert found["foresight step"]["model_flops"] == 4 * once
    stages = plan.run(QUICK, gpus(1))["experiment_at_least"]["stages"]
    own = next(stage for stage in stages if stage["stage"] == "foresight")
    assert own["phases"] == {"foresight step": 1.0}
    assert found[LOG_PROBS]["model_flops"] == found[SAMPLER]["model_flops"]


@pytest.mark.parametrize("name", ["2xh100:8", "2xcpu:1"])
def test_several_slices_are_of_tpus(name: str) -> None:
    with pytest.raises(ValueError, match=f"slices of TPUs alone, got {name}; plan for"):
        topology.described(name)
