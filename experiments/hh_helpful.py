"""Anthropic HH helpful-base, best of 4: the same pipeline on real human preferences.

Command:   infalign run experiments/hh_helpful.py --set data.directory=PATH/TO/hh
Cost:      under 20 minutes on two CPU cores with the 2,000 rows of the test file
Expected:  experiments/results/hh/README.md; a reward model this small is weak, and says so
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

experiment = Experiment(
    name="hh_helpful",
    procedure="best_of_4",
    data=HHConfig(file="helpful-base.test.jsonl.gz", judge_fraction=0.4),
    tokenizer=TokenizerConfig(vocab_size=1024),
    prompt_length=160,
    sampling=SamplingConfig(length=32),
    model=TransformerConfig(
        vocab_size=1024, width=96, layers=2, heads=4, kv_heads=2, mlp_width=288
    ),
    sft=FitConfig(steps=120, batch_size=32, optimiser=OptimiserConfig(learning_rate=2e-3)),
    reward=FitConfig(
        steps=30,
        batch_size=32,
        optimiser=OptimiserConfig(learning_rate=1e-3, weight_decay=0.1),
    ),
    calibrate=CalibrateConfig(prompts=256, responses=64, chunk=16),
    foresight=ForesightConfig(steps=0),  # 540 rows teach it less than its KL costs
    align=AlignConfig(
        steps=250, batch_size=16, responses=16, optimiser=OptimiserConfig(learning_rate=2e-4)
    ),
    policies=(
        PolicyConfig("identity", kl=0.5),
        PolicyConfig("exponential(10)", kl=0.5),
    ),
    evaluate=EvaluateConfig(prompts=96, responses=64, reference_responses=512, show=4),
    checkpoint_every=50,
)
