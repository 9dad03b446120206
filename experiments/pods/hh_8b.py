"""Anthropic HH helpful-base, best of 4: 7.5 billion parameters, a reward model of 1.2 billion.

Command:   infalign run experiments/pods/hh_8b.py --mesh v5p-128 --set data.directory=PATH \
               --set tokenizer.file=SENTENCEPIECE_MODEL
Cost:      90 chip-hours at the very least
Expected:  planned, not run: experiments/results/plans/README.md
"""

import runpy
from dataclasses import replace
from pathlib import Path

from infalign_jax.lm.sizes import SIZES
from infalign_jax.training import OptimiserConfig

smaller = runpy.run_path(str(Path(__file__).with_name("hh_1b.py")))
base = smaller["experiment"]
supervised = OptimiserConfig(learning_rate=5e-5)
experiment = replace(
    base,
    name="hh_8b",
    model=replace(SIZES["8b"].model, **smaller["ON_TPU"], rematerialise="everything"),
    reward_model=base.model,
    sft=replace(base.sft, optimiser=supervised),
    reward=replace(base.reward, optimiser=supervised),
    align=replace(base.align, optimiser=OptimiserConfig(learning_rate=5e-6)),
)
