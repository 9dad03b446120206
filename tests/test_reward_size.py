"""A reward model of another size than the policy, through the whole pipeline."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import toy_run

from infalign_jax import pipeline
from infalign_jax.stages import serve


@pytest.mark.slow
def test_a_reward_model_of_its_own_size(tmp_path: Path) -> None:
    small = replace(toy_run.experiment.model, width=8, mlp_width=16)
    experiment = replace(toy_run.experiment, reward_model=small)
    found = pipeline.run(experiment, tmp_path)
    assert {"sft", "reward_sft", "judge_sft"} <= found["seconds"].keys()
    widths = {
        header.parent.name.rpartition("-")[0]: json.loads(header.read_text())["leaves"]
        for header in tmp_path.glob("stages/*/header.json")
    }
    for stage in ("reward_sft", "judge_sft"):
        assert widths[stage]["embedding"][0] == [320, 8]
    for stage in ("reward", "judge"):
        assert widths[stage]["trunk.embedding"][0] == [320, 8]
    served = serve.load(experiment, tmp_path)
    prompt = served.words.pairs["test"][0].prompt
    assert len(serve.respond(served, serve.REFERENCE, [prompt], count=3)[prompt]) == 3
    assert widths["sft"]["embedding"][0] == widths["align"]["embedding"][0] == [320, 16]
