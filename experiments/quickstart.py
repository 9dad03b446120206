"""Align a small language model for best-of-4 and see how close to the frontier it gets.

Command:   infalign run experiments/quickstart.py
Cost:      9 to 10 minutes on two CPU cores, installation included; 17 on slower ones
Expected:  see README, "Reproduce"
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
from infalign_jax.lm.tokenizer import TokenizerConfig
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.sampling import SamplingConfig
from infalign_jax.synthetic import SyntheticConfig
from infalign_jax.training import OptimiserConfig

experiment = Experiment(
    name="quickstart",
    data=SyntheticConfig(train_pairs=32_000, judge_pairs=16_000),
    tokenizer=TokenizerConfig(vocab_size=576, symbols=()),
    prompt_length=12,
    sampling=SamplingConfig(length=14),
    model=TransformerConfig(
        vocab_size=576, width=64, layers=2, heads=4, kv_heads=2, mlp_width=192, unroll=2
    ),
    sft=FitConfig(steps=250, optimiser=OptimiserConfig(learning_rate=3e-3)),
    reward=FitConfig(steps=500, optimiser=OptimiserConfig(learning_rate=2e-3)),
    calibrate=CalibrateConfig(prompts=512, responses=256),
    foresight=ForesightConfig(steps=1000, optimiser=OptimiserConfig(learning_rate=2e-3)),
    align=AlignConfig(steps=500, optimiser=OptimiserConfig(learning_rate=1e-3)),
    policies=(
        PolicyConfig("identity", kl=0.5),
        PolicyConfig("exponential(10)", kl=0.5),
    ),
    evaluate=EvaluateConfig(prompts=128, responses=128, reference_responses=1344),
)
