"""The real pipeline at toy size: `infalign run tests/toy_run.py` takes seconds."""

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

FIT = FitConfig(steps=3, batch_size=8)
# Of one shape wherever it can be, so that one program draws and one scores: 4 prompts, 8 responses.

experiment = Experiment(
    name="toy",
    data=SyntheticConfig(train_pairs=60, judge_pairs=30, validation_pairs=20, test_pairs=20),
    tokenizer=TokenizerConfig(vocab_size=320, symbols=()),
    model=TransformerConfig(vocab_size=320, width=16, layers=1, heads=2, kv_heads=1, mlp_width=32),
    prompt_length=32,
    sampling=SamplingConfig(length=32),
    sft=FIT,
    reward=FIT,
    calibrate=CalibrateConfig(prompts=8, responses=8, chunk=4),
    foresight=ForesightConfig(steps=3, batch_size=4, responses=4),
    align=AlignConfig(steps=4, batch_size=4, responses=8),
    policies=(PolicyConfig("identity", beta=0.3), PolicyConfig("exponential(10)", kl=0.5)),
    evaluate=EvaluateConfig(
        prompts=4, responses=8, reference_responses=24, chunk=4, procedures=("best_of_4",)
    ),
    checkpoint_every=2,
)
