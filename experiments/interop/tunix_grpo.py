"""Tunix's GRPO learner with an InfAlign reward: best-of-4 alignment of a tiny Llama, made here.

Command:   pip install -e ".[tunix]" && python experiments/interop/tunix_grpo.py
           (with a name of Φ, such as identity, as argument: another one at the same KL)
Cost:      3 to 6 minutes of one thread, most of it 800 steps of Tunix; nothing is downloaded
Expected:  experiments/results/interop/tunix.md

The model learns the language of `letters.py` (π_ref), K responses to each prompt become a
calibration table, and Tunix trains on `calibrated_reward`. The settings of `make_learner` that keep
E[R_Φ] − β·KL(π ‖ π_ref), where Tunix 0.1.7's defaults do not:

- `advantage_estimator="rloo"`: "grpo" divides by the group's standard deviation, which undoes Φ's
  scale, on which β depends. Others' mean as the baseline leaves the gradient unbiased; with the
  whole group's ("drgrpo") it comes out (G−1)/G as large, and β would have to be as much smaller.
- `kl_loss_mode="mse_kl"`: ½·log²(π/π_ref) has the gradient of KL(π ‖ π_ref). That of "kl", the
  default, is 0 on average, whatever β; that of "low_var_kl" is KL(π_ref ‖ π)'s.
- `loss_agg_mode="seq-mean-token-sum"` adds up a response's tokens; the default divides by each
  response's length, which weighs reward against KL by length.
- `temperature=1.0`: 0.9 by default. `top_p=1`, `top_k=None`: what is sampled is π.
- `rollout.seed`, new at each step: by default every step draws with one and the same key.
- `num_iterations=1` and one step a generation (no `mini_batch_size`): ratios are 1, so nothing is
  clipped and no reward is stale.

What still differs from the exact objective: a token is charged for its own KL, not for that of the
tokens it leads to; and our optimiser clips the gradient's norm at 1, reward and KL together, as TRL
does. Tunix cuts the token that ends a response off before the loss: to end is neither learnt nor
charged for. A model that could end early learnt to by accident, so here none can.
"""

import os
import sys
import time
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import letters
import numpy as np
import optax
import tunix
from flax import nnx
from letters import LETTERS, PROMPT, RESPONSE, K
from tunix.models.llama3 import model as llama3
from tunix.rl import common

from infalign_jax import notation

GROUP, BATCH, STEPS, RATE = 16, 256, 800, 4e-3  # BATCH in responses
PAD, EOS = 12, 13  # beyond the vocabulary: no response can end early
SHAPE = {"num_layers": 2, "num_kv_heads": 4, "head_dim": 16}


class Tokenizer:
    """What Tunix asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(LETTERS[i] for i in ids)

    def pad_id(self) -> int:
        return PAD

    def eos_id(self) -> int:
        return EOS

    def bos_id(self) -> None:
        return None


def make_model() -> llama3.Llama3:
    """A transformer of 0.1M parameters."""
    config = llama3.ModelConfig(
        **SHAPE, num_heads=4, embed_dim=64, hidden_dim=256, vocab_size=12, rope_theta=10_000,
        norm_eps=1e-6,
    )  # fmt: skip
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    structure, weights = nnx.split(model)
    # Tunix makes models to be loaded: its MLPs are all zero, where no gradient moves them.
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda w: w if w.ndim == 1 else rng.normal(0, 0.125, w.shape).astype(w.dtype), weights
    )
    return nnx.merge(structure, drawn)


def log_probs(
    structure: nnx.GraphDef, weights: nnx.State, tokens: jax.Array, known: int
) -> jax.Array:
    """log π of every token after the first ``known``, float[n, length - known]."""
    return common.compute_per_token_logps(
        structure, weights, tokens[:, :known], tokens[:, known:], PAD, EOS, stop_gradient=False
    )


def learn_language(steps: int = 600) -> llama3.Llama3:
    """π_ref, trained from nothing on texts of the language."""
    structure, weights = nnx.split(make_model())
    optimiser = optax.adam(optax.linear_schedule(3e-3, 0.0, steps))

    @jax.jit
    def step(weights: nnx.State, state: optax.OptState, tokens: jax.Array) -> tuple:
        def loss(weights: nnx.State) -> jax.Array:
            return -log_probs(structure, weights, tokens, 1).mean()

        value, gradient = jax.value_and_grad(loss)(weights)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(weights, updates), state, value

    state = optimiser.init(weights)
    for _ in range(steps):
        tokens = letters.walk(128, PROMPT + RESPONSE)
        weights, state, loss = step(weights, state, tokens)
    print(f"π_ref: loss {loss:.3f} a letter, entropy of the language {np.log(6):.3f}")
    return nnx.merge(structure, weights)


def respond(model: llama3.Llama3, prompts: list[str], seed: int) -> tuple[np.ndarray, list[str]]:
    """K responses to each prompt: tokens int[B·K, PROMPT + RESPONSE] and texts."""
    cache = tunix.CacheConfig(cache_size=PROMPT + RESPONSE, **SHAPE)
    found = tunix.Sampler(model, Tokenizer(), cache)(
        np.repeat(prompts, K).tolist(), max_generation_steps=RESPONSE, max_prompt_length=PROMPT,
        temperature=1.0, top_p=1.0, seed=seed, pad_output=True,
    )  # fmt: skip
    return np.concatenate([found.padded_prompt_tokens, found.tokens], axis=1), found.text


def batches(prompts: list[str], rollout: tunix.RolloutConfig) -> Iterator[dict[str, np.ndarray]]:
    for step in range(STEPS):
        rollout.seed = jax.random.key(step)
        yield {"prompts": letters.generator.choice(prompts, BATCH // GROUP, replace=False)}


def make_learner(
    reference: llama3.Llama3, reward: tunix.RewardFn, beta: float
) -> tuple[tunix.GRPOLearner, tunix.RolloutConfig]:
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:1], (1, 1)), ("fsdp", "tp"))
    rollout = tunix.RolloutConfig(
        temperature=1.0, top_p=1.0, top_k=None, max_prompt_length=PROMPT,
        max_tokens_to_generate=RESPONSE, kv_cache_size=PROMPT + RESPONSE,
    )  # fmt: skip
    rates = optax.linear_schedule(RATE, 0.0, STEPS)
    training = tunix.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates)),
        max_steps=STEPS, eval_every_n_steps=STEPS,
    )  # fmt: skip
    roles = (tunix.Role.ACTOR, tunix.Role.REFERENCE, tunix.Role.ROLLOUT)
    cluster = tunix.RLCluster(
        actor=nnx.clone(reference), reference=reference, tokenizer=Tokenizer(),
        cluster_config=tunix.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), training_config=training,
            rollout_config=rollout,
        ),
    )  # fmt: skip
    config = tunix.GRPOConfig(
        beta=beta, advantage_estimator="rloo", kl_loss_mode="mse_kl",
        loss_agg_mode="seq-mean-token-sum", num_generations=GROUP, num_iterations=1,
    )  # fmt: skip
    return tunix.GRPOLearner(cluster, config, reward), rollout


def main(name: str) -> None:
    beta = float(notation.beta_for_kl(name, letters.KL))
    start = time.perf_counter()
    reference = learn_language()
    training, held_out = letters.make_prompts()
    _, texts = respond(reference, training, 1)
    reward = letters.inference_aware(training, texts, notation.transformation(name, beta))
    learner, rollout = make_learner(reference, reward, beta)
    begun = time.perf_counter()
    learner.train(batches(training, rollout))
    trained, seconds = learner.rl_cluster.actor_trainer.model, time.perf_counter() - begun

    tokens, ours = respond(trained, held_out, 2)
    _, theirs = respond(reference, held_out, 3)
    ratios = [log_probs(*nnx.split(model), tokens, PROMPT).sum(1) for model in (trained, reference)]
    letters.report(name, held_out, ours, theirs, np.asarray(ratios[0] - ratios[1]))
    print(f"tunix {tunix.__version__}, jax {jax.__version__}")
    print(f"GRPO {seconds:.0f} s of {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["exponential(10)"])
