"""Five Φ at two KLs each on the synthetic task, against the analytic frontier.

Command:   infalign run experiments/frontier.py --seed 0 --out runs/frontier-0
Cost:      47 to 51 minutes a seed, one thread each and two at a time on two CPU cores
Expected:  experiments/results/frontier/README.md: best of 4 with optimal(best_of_4) 1.5 to 1.9
           points under the frontier at KL 0.43 to 0.48, about 6 over the trained identity
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
    name="frontier",
    data=SyntheticConfig(train_pairs=32_000, judge_pairs=16_000),
    tokenizer=TokenizerConfig(vocab_size=576, symbols=()),
    prompt_length=12,
    sampling=SamplingConfig(length=14),
    model=TransformerConfig(
        vocab_size=576, width=64, layers=3, heads=4, kv_heads=2, mlp_width=192, unroll=3
    ),
    sft=FitConfig(steps=250, optimiser=OptimiserConfig(learning_rate=3e-3)),
    reward=FitConfig(steps=600, optimiser=OptimiserConfig(learning_rate=2e-3)),
    calibrate=CalibrateConfig(prompts=1024, responses=256),
    foresight=ForesightConfig(steps=2000, optimiser=OptimiserConfig(learning_rate=2e-3)),
    align=AlignConfig(steps=600, optimiser=OptimiserConfig(learning_rate=1e-3)),
    policies=tuple(
        PolicyConfig(transformation, kl=kl)
        for kl in (0.5, 0.25)
        for transformation in (
            "identity",
            "log",
            "exponential(5)",
            "exponential(10)",
            "optimal(best_of_4)",
        )
    ),
    evaluate=EvaluateConfig(prompts=128, responses=128, reference_responses=1344),
)
