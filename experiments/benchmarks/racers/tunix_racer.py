"""Tunix's GRPO on the work of `work.py`, each step whole: draw, score, update.

Run by `peers.py`. Tunix's own Llama with tied embeddings, in float32 (its MLPs, made to be loaded,
start at 0: here they are drawn); everything jitted, no rematerialisation, caches and prompts of
exactly the length needed, nothing truncated (its sampler then sorts nothing), padding and end
outside the vocabulary, no metrics backend, a step's responses in one batch. Its learner takes no
reward model: the reward is a function. Its settings, over these, are `devices`, how many of XLA's
the cores are (1), and fields of `tunix.RLTrainingConfig`.
"""

import os
import time
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tunix
from flax import nnx
from tunix.models.llama3 import model as llama3
from work import Work, even_share, ids, prompt_tokens, read, report, text


class Tokenizer:
    """What Tunix asks of a tokenizer: one letter a token, no end that a response could reach."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def encode(self, text: str) -> list[int]:
        return ids(text)

    def decode(self, tokens: list[int]) -> str:
        return text(tokens)

    def pad_id(self) -> int:
        return self.vocab

    def eos_id(self) -> int:
        return self.vocab + 1

    def bos_id(self) -> None:
        return None


def make_model(work: Work) -> tuple[llama3.Llama3, int]:
    """The model and its number of parameters."""
    config = llama3.ModelConfig(
        num_layers=work.layers, vocab_size=work.vocab, embed_dim=work.width,
        hidden_dim=work.mlp_width, num_heads=work.heads, head_dim=work.width // work.heads,
        num_kv_heads=work.kv_heads, rope_theta=10_000, norm_eps=1e-6, weight_tying=True,
    )  # fmt: skip
    structure, weights = nnx.split(llama3.Llama3(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda w: w if w.ndim == 1 else jnp.asarray(rng.normal(0, 0.02, w.shape), w.dtype), weights
    )
    leaves = jax.tree.leaves(drawn)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    return nnx.merge(structure, drawn), sum(leaf.size for leaf in leaves)


def make_learner(
    work: Work, policy: llama3.Llama3
) -> tuple[tunix.GRPOLearner, tunix.RolloutConfig]:
    devices, settings = jax.devices(), {k: v for k, v in work.settings.items() if k != "devices"}
    mesh = jax.sharding.Mesh(np.reshape(devices, (len(devices), 1)), ("fsdp", "tp"))
    rollout = tunix.RolloutConfig(
        temperature=1.0, top_p=1.0, top_k=None, max_prompt_length=work.prompt,
        max_tokens_to_generate=work.response, kv_cache_size=work.prompt + work.response,
    )  # fmt: skip
    steps = work.warm_up + work.updates + 1
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    training = tunix.RLTrainingConfig(
        actor_optimizer=adam, max_steps=steps, eval_every_n_steps=steps, **settings
    )
    roles = (tunix.Role.ACTOR, tunix.Role.REFERENCE, tunix.Role.ROLLOUT)
    cluster = tunix.RLCluster(
        actor=nnx.clone(policy), reference=policy, tokenizer=Tokenizer(work.vocab),
        cluster_config=tunix.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), training_config=training,
            rollout_config=rollout,
        ),
    )  # fmt: skip

    def reward(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        assert {len(completion) for completion in completions} == {work.response}
        assert len(completions) == work.prompts * work.responses
        return even_share(map(ids, completions))

    config = tunix.GRPOConfig(beta=work.beta, num_generations=work.responses, num_iterations=1)
    return tunix.GRPOLearner(cluster, config, reward), rollout


def batches(
    work: Work, rollout: tunix.RolloutConfig, times: list[float]
) -> Iterator[dict[str, np.ndarray]]:
    """Tunix asks for a batch when the step before has ended: one step more than is timed."""
    for step in range(work.warm_up + work.updates + 1):
        rollout.seed = jax.random.key(step)  # otherwise one and the same at each step
        times.append(time.perf_counter())
        yield {"prompts": np.array([text(row) for row in prompt_tokens(work, step)])}


def main() -> None:
    work = read()
    if (work.algorithm, work.reward) != ("grpo", "function"):
        raise SystemExit(f"expected grpo with a function, got {work.algorithm}, {work.reward}")
    jax.config.update("jax_num_cpu_devices", work.settings.get("devices", 1))
    policy, parameters = make_model(work)
    learner, rollout = make_learner(work, policy)
    times: list[float] = []
    learner.train(batches(work, rollout, times))
    versions = {"tunix": tunix.__version__, "jax": jax.__version__}
    report(
        work, times,
        parameters, versions,
        "float32, jit, vanilla sampler, caches of exactly P + T, tied embeddings, no "
        f"rematerialisation, XLA's default threads; {work.settings or 'defaults'}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
