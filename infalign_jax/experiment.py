"""An experiment: one frozen dataclass that says everything a run depends on."""

from dataclasses import dataclass, field
from typing import Literal

from infalign_jax import notation
from infalign_jax.drawing import SamplingConfig
from infalign_jax.hh import HHConfig
from infalign_jax.learner import Baseline
from infalign_jax.lm.tokenizer import EOS, TokenizerConfig
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime.mesh import MeshConfig
from infalign_jax.runtime.progress import KeepConfig
from infalign_jax.synthetic import SyntheticConfig
from infalign_jax.training import OptimiserConfig


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}; raise it")


def _at_most(name: str, value: float, most: float, advice: str) -> None:
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, got {value}; {advice}")


@dataclass(frozen=True)
class FitConfig:
    """A supervised stage: steps of `batch_size` rows.

    >>> FitConfig(steps=0)
    Traceback (most recent call last):
    ValueError: steps: expected at least 1, got 0; raise it
    """

    steps: int = 300
    batch_size: int = 128
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        _at_least("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class CalibrateConfig:
    """The stored reference: K responses of π_ref to each of so many training prompts.

    >>> CalibrateConfig().responses
    128
    """

    prompts: int = 512
    responses: int = 128
    chunk: int = 32  # prompts sampled in one call

    def __post_init__(self) -> None:
        _at_least("calibrate.prompts", self.prompts, 1)
        _at_least("calibrate.responses", self.responses, 2)  # each is ranked among the others
        _at_least("calibrate.chunk", self.chunk, 1)


@dataclass(frozen=True)
class ForesightConfig:
    """Before RL, the trunk learns to foresee the quantile (see `infalign_jax.foresight`).

    `steps = 0` leaves the stage out: policies then start from the reference.

    >>> ForesightConfig(steps=0).steps
    0
    """

    steps: int = 800
    batch_size: int = 16  # prompts
    responses: int = 16  # of each prompt's stored ones
    hold: float = 4.0  # weight of KL(π_ref ‖ π), which keeps the policy where it was
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def __post_init__(self) -> None:
        _at_least("foresight.steps", self.steps, 0)
        _at_least("foresight.batch_size", self.batch_size, 1)
        _at_least("foresight.responses", self.responses, 1)
        _at_least("foresight.hold", self.hold, 0)


@dataclass(frozen=True)
class AlignConfig:
    """The KL-regularised RL of every policy.

    >>> AlignConfig(responses=1, baseline="leave_one_out")
    Traceback (most recent call last):
    ValueError: align.responses: expected at least 2 for leave_one_out, got 1; raise it
    """

    solver: Literal["policy_gradient", "regression"] = "policy_gradient"
    baseline: Baseline = "partition"
    steps: int = 400
    batch_size: int = 16  # prompts
    responses: int = 16  # drawn for each prompt
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def __post_init__(self) -> None:
        _at_least("align.steps", self.steps, 1)
        _at_least("align.batch_size", self.batch_size, 1)
        _at_least("align.responses", self.responses, 1)
        if self.baseline == "leave_one_out" and self.responses < 2:
            raise ValueError(
                f"align.responses: expected at least 2 for leave_one_out, got {self.responses}; "
                "raise it"
            )


@dataclass(frozen=True)
class PolicyConfig:
    """One policy to train: Φ by name, and β itself or the KL for which β is to be found.

    >>> PolicyConfig("exponential(10)", kl=0.5).name
    'exponential(10) kl=0.5'
    """

    transformation: str = "identity"
    kl: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        notation.canonical(self.transformation)
        given = [x for x in (self.kl, self.beta) if x is not None]
        if len(given) != 1 or not given[0] > 0:
            raise ValueError(
                f"policies: expected a positive kl or a positive beta, got kl={self.kl}, "
                f"beta={self.beta}; give one of them"
            )

    @property
    def name(self) -> str:
        what = f"kl={self.kl:g}" if self.kl is not None else f"beta={self.beta:g}"
        return f"{notation.canonical(self.transformation)} {what}"


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out prompts, samples of each policy and of the reference, and what is compared.

    Of the reference samples the first `calibrate.responses` calibrate, the next 64 (or an eighth of
    the others) are ranked, and the rest (1,024 or more for a calibration error worth quoting) are
    the truth that the calibration error is measured by.

    >>> EvaluateConfig().procedures[0]
    'standard'
    """

    prompts: int = 128
    responses: int = 128
    reference_responses: int = 1216
    chunk: int = 32
    procedures: tuple[str, ...] = (
        "standard", "best_of_2", "best_of_4", "best_of_8", "worst_of_2", "worst_of_4", "worst_of_8",
    )  # fmt: skip
    show: int = 4  # prompts whose responses the report shows, 0 for none

    def __post_init__(self) -> None:
        for name in self.procedures:
            needed = notation.samples_needed(name)
            fewest = min(self.responses, self.reference_responses)
            if fewest < needed:
                raise ValueError(
                    f"evaluate: expected at least {needed} samples for {name}, got {fewest}; "
                    "raise evaluate.responses and evaluate.reference_responses"
                )
        _at_least("evaluate.prompts", self.prompts, 2)
        _at_least("evaluate.chunk", self.chunk, 1)
        _at_least("evaluate.show", self.show, 0)


@dataclass(frozen=True)
class Experiment:
    """Everything a run depends on; see experiments/ for runnable ones.

    Raises ValueError where the sampling law is not the policy's own: calibration, rollouts and
    KL all speak of temperature 1 with nothing truncated.

    >>> Experiment("quick", sampling=SamplingConfig(temperature=0.7))
    Traceback (most recent call last):
    ValueError: sampling: expected temperature=1, top_k=0, top_p=1, got temperature=0.7, \
top_k=0, top_p=1.0; calibration, rollouts and KL must speak of one law
    """

    name: str
    seed: int = 0
    procedure: str = "best_of_4"  # what the run is about: the report leads with it
    data: SyntheticConfig | HHConfig = field(default_factory=SyntheticConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prompt_length: int = 12  # P, in tokens; longer prompts are dropped and counted
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    # Of the reward model and the judge; None: as the policy, and the reward starts from π_ref.
    reward_model: TransformerConfig | None = None
    sft: FitConfig = field(default_factory=FitConfig)
    reward: FitConfig = field(default_factory=FitConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    foresight: ForesightConfig = field(default_factory=ForesightConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    policies: tuple[PolicyConfig, ...] = (PolicyConfig("exponential(10)", kl=0.5),)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint_every: int = 200  # steps
    keep: KeepConfig = field(default_factory=KeepConfig)

    def __post_init__(self) -> None:
        law = self.sampling
        if not law.plain:
            raise ValueError(
                f"sampling: expected temperature=1, top_k=0, top_p=1, got temperature="
                f"{law.temperature}, top_k={law.top_k}, top_p={law.top_p}; calibration, rollouts "
                "and KL must speak of one law"
            )
        if self.procedure not in self.evaluate.procedures:
            raise ValueError(
                f"procedure: expected one of evaluate.procedures, got {self.procedure}; add it"
            )
        if not self.policies:
            raise ValueError("policies: expected at least one, got none; name one")
        if len({policy.name for policy in self.policies}) != len(self.policies):
            raise ValueError("policies: expected distinct ones, got one twice; remove it")
        for name, model in self.models.items():
            if model.vocab_size != self.tokenizer.vocab_size:
                raise ValueError(
                    f"{name}.vocab_size: expected the tokenizer's {self.tokenizer.vocab_size}, got "
                    f"{model.vocab_size}; set both alike"
                )
        if law.end != EOS:
            raise ValueError(
                f"sampling.end: expected {EOS}, which ends the responses of the data, got "
                f"{law.end}; leave it"
            )
        _at_least("prompt_length", self.prompt_length, 2)
        _at_least("checkpoint_every", self.checkpoint_every, 1)
        if self.keep.every % self.checkpoint_every:
            raise ValueError(
                f"keep.every: expected a multiple of checkpoint_every = {self.checkpoint_every}, "
                f"got {self.keep.every}; set both alike"
            )
        _at_least("seed", self.seed, 0)
        _at_most("seed", self.seed, 10**8, "lower it")
        self._check_counts()
        if isinstance(self.data, HHConfig):
            _check_splits(self.data)

    @property
    def scorer(self) -> TransformerConfig:
        """What the reward model and the judge are made of."""
        return self.reward_model or self.model

    @property
    def models(self) -> dict[str, TransformerConfig]:
        """By the names of the fields."""
        return {"model": self.model} | (
            {} if self.reward_model is None else {"reward_model": self.reward_model}
        )

    @property
    def batch_sizes(self) -> dict[str, int]:
        """What the devices must divide, by the names of the fields."""
        sizes = {
            "sft.batch_size": self.sft.batch_size,
            "reward.batch_size": self.reward.batch_size,
            "calibrate.chunk": self.calibrate.chunk,
            "align.batch_size": self.align.batch_size,
        }
        if self.foresight.steps:
            sizes["foresight.batch_size"] = self.foresight.batch_size
        return sizes

    def _check_counts(self) -> None:
        """What one stage takes, another must have made."""
        stored = self.calibrate.responses
        _at_least("evaluate.reference_responses", self.evaluate.reference_responses, stored + 8)
        wanted = [("align.batch_size", self.align.batch_size, self.calibrate.prompts)]
        if self.align.solver == "regression":
            wanted += [("align.responses", self.align.responses, stored)]
        if self.foresight.steps:
            wanted += [("foresight.batch_size", self.foresight.batch_size, self.calibrate.prompts)]
            wanted += [("foresight.responses", self.foresight.responses, stored)]
        for name, value, most in wanted:
            source = f"calibrate.{name.split('.')[1].replace('batch_size', 'prompts')}"
            _at_most(name, value, most, f"lower it or raise {source}")


def _check_splits(data: HHConfig) -> None:
    for name in ("validation_fraction", "test_fraction", "judge_fraction"):
        if not getattr(data, name) > 0:
            raise ValueError(
                f"data.{name}: expected above 0, got {getattr(data, name)}; without that split "
                "there is nothing to train the judge on or to measure with"
            )
