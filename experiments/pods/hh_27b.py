"""Anthropic HH helpful-base, best of 4: 27 billion parameters, a reward model of 7.5 billion.

Command:   infalign run experiments/pods/hh_27b.py --mesh fsdp=32,tensor=8 \
               --set data.directory=PATH \
               --set tokenizer.file=SENTENCEPIECE_MODEL
Cost:      296 chip-hours at the very least
Expected:  planned, not run: experiments/results/plans/README.md
"""

import runpy
from dataclasses import replace
from pathlib import Path

from infalign_jax.training import OptimiserConfig

base = runpy.run_path(str(Path(__file__).with_name("hh_8b.py")))["experiment"]
supervised = OptimiserConfig(learning_rate=2e-5)
experiment = replace(
    base,
    name="hh_27b",
    model=replace(base.model, width=5120, layers=54, heads=40, kv_heads=8, mlp_width=27_648),
    reward_model=base.model,
    sft=replace(base.sft, optimiser=supervised),
    reward=replace(base.reward, optimiser=supervised),
    align=replace(base.align, optimiser=OptimiserConfig(learning_rate=2e-6)),
)
