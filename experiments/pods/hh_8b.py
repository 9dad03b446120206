"""Anthropic HH helpful-base, best of 4: 7.5 billion parameters, a reward model of 1.2 billion.

Command:   infalign run experiments/pods/hh_8b.py --mesh v5p-128 --set data.directory=PATH \
               --set tokenizer.file=SENTENCEPIECE_MODEL
Cost:      36 chip-hours at the very least
Expected:  planned, not run: experiments/results/plans/README.md
"""

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
from infalign_jax.lm.tokenizer import TokenizerConfig
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.sampling import SamplingConfig
from infalign_jax.training import OptimiserConfig

VOCABULARY = 128_256

experiment = Experiment(
    name="hh_8b",
    procedure="best_of_4",
    data=HHConfig(file="helpful-base.train.jsonl.gz", judge_fraction=0.4),
    tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
    prompt_length=512,
    sampling=SamplingConfig(length=512),
    model=TransformerConfig(
        VOCABULARY,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        mlp_width=14_336,
        compute="bfloat16",
        attention="splash",
        logits_at_once=2**27,
        rematerialise="everything",
    ),
    reward_model=TransformerConfig(
        VOCABULARY,
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        mlp_width=8192,
        compute="bfloat16",
        attention="splash",
        logits_at_once=2**27,
        rematerialise="cheap",
    ),
    sft=FitConfig(steps=1000, batch_size=256, optimiser=OptimiserConfig(learning_rate=5e-5)),
    reward=FitConfig(steps=500, batch_size=128, optimiser=OptimiserConfig(learning_rate=5e-5)),
    calibrate=CalibrateConfig(prompts=8192, responses=64, chunk=64),
    foresight=ForesightConfig(steps=0),
    align=AlignConfig(
        steps=1000, batch_size=64, responses=8, optimiser=OptimiserConfig(learning_rate=5e-6)
    ),
    policies=(PolicyConfig("exponential(10)", kl=2.0),),
    evaluate=EvaluateConfig(prompts=512, responses=64, reference_responses=256, chunk=64),
    checkpoint_every=50,
)
