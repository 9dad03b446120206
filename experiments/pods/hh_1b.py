"""Anthropic HH helpful-base, best of 4: 1.2 billion parameters, a reward model of 0.2 billion.

Command:   infalign run experiments/pods/hh_1b.py --mesh v5e-64 --set data.directory=PATH \
               --set tokenizer.file=SENTENCEPIECE_MODEL
Cost:      44 chip-hours at the very least
Expected:  planned, not run: experiments/results/plans/README.md
"""

from dataclasses import replace
from typing import Any

from infalign_jax.experiment import (
    AlignConfig,
    CalibrateConfig,
    EvaluateConfig,
    Experiment,
    FitConfig,
    ForesightConfig,
    PolicyConfig,
)
from infalign_jax.hh import HHConfig
from infalign_jax.lm.sizes import SIZES
from infalign_jax.lm.tokenizer import TokenizerConfig
from infalign_jax.sampling import SamplingConfig
from infalign_jax.training import OptimiserConfig

VOCABULARY = SIZES["1b"].model.vocab_size
ON_TPU: dict[str, Any] = {"compute": "bfloat16", "attention": "splash", "logits_at_once": 2**27}

experiment = Experiment(
    name="hh_1b",
    procedure="best_of_4",
    data=HHConfig(file="helpful-base.train.jsonl.gz", judge_fraction=0.4),
    tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
    prompt_length=512,
    sampling=SamplingConfig(length=512),
    model=replace(SIZES["1b"].model, **ON_TPU, rematerialise="cheap"),
    reward_model=replace(
        SIZES["125m"].model, **ON_TPU, vocab_size=VOCABULARY, rematerialise="cheap"
    ),
    sft=FitConfig(steps=1000, batch_size=256, optimiser=OptimiserConfig(learning_rate=1e-4)),
    reward=FitConfig(steps=500, batch_size=128, optimiser=OptimiserConfig(learning_rate=1e-4)),
    calibrate=CalibrateConfig(prompts=8192, responses=64, chunk=64),
    foresight=ForesightConfig(steps=0),
    align=AlignConfig(
        steps=1000, batch_size=64, responses=8, optimiser=OptimiserConfig(learning_rate=1e-5)
    ),
    policies=(PolicyConfig("exponential(10)", kl=2.0),),
    evaluate=EvaluateConfig(prompts=512, responses=64, reference_responses=256, chunk=64),
    checkpoint_every=50,
)
