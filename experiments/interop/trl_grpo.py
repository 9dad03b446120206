"""TRL's GRPO trainer with an InfAlign reward: best-of-4 alignment of a tiny Llama, made here.

Command:   pip install -e ".[trl]" && python experiments/interop/trl_grpo.py
           (with a name of Φ, such as identity, as argument: another one at the same KL)
Cost:      250 steps of TRL on one thread, 0.5 s (an idle core) to 16 s (a crowded one) each;
           nothing is downloaded
Expected:  experiments/results/interop/trl.md

The model learns the language of `letters.py` (π_ref), K responses to each prompt become a
calibration table, and TRL trains on `calibrated_reward`. The settings of `config` that keep
E[R_Φ] − β·KL(π ‖ π_ref), where TRL 1.16's defaults do not:

- `scale_rewards="none"`: dividing by the group's standard deviation undoes Φ's scale, on which β
  depends.
- `beta`: 0 by default. The mean of a group of G contains each member itself, so the reward's
  gradient comes out (G−1)/G as large as it is: β is made as much smaller.
- `loss_type="dr_grpo"` adds up a response's tokens (and divides by a constant); "grpo" divides by
  each response's length and "dapo" by the batch's tokens, which weighs reward against KL by length.
- `use_bias_correction_kl=True`: the bare estimator's gradient is that of KL(π_ref ‖ π) instead.
- `num_iterations=1` and one step a generation (`gradient_accumulation_steps=1`): ratios are 1, so
  nothing is clipped and no reward is stale. `temperature=1`, `top_p=1`, `top_k=0`: what is sampled
  is π. No dropout, no weight decay.

What still differs from the exact objective: a token is charged for its own KL, not for that of the
tokens it leads to; and the gradient's norm is clipped at 1, reward and KL together.
"""

import os
import sys
import tempfile
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import letters
import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from letters import LETTERS, PROMPT, RESPONSE, K
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infalign_jax import notation

GROUP, BATCH, STEPS, RATE = 16, 256, 250, 4e-3  # BATCH in responses

torch.set_num_threads(1)  # two fall tenfold behind where another process has one of the cores


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[EOS]", *LETTERS])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[EOS]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **names)


def learn_language(steps: int = 600) -> LlamaForCausalLM:
    """π_ref: a transformer of 0.1M parameters, trained from nothing on texts of the language."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "vocab_size": 14}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids, num_attention_heads=4))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        tokens = torch.from_numpy(2 + letters.walk(128, PROMPT + RESPONSE))
        loss = model(tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"π_ref: loss {loss.item():.3f} a letter, entropy of the language {np.log(6):.3f}")
    return model.eval()


@torch.no_grad()
def respond(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], k: int
) -> tuple[torch.Tensor, list[str]]:
    """k responses to each prompt: tokens int[B·k, PROMPT + RESPONSE] and texts."""
    asked = tokenizer(prompts, return_tensors="pt")["input_ids"].repeat_interleave(k, 0)
    tokens = model.generate(asked, max_new_tokens=RESPONSE, do_sample=True, top_k=0)
    return tokens, tokenizer.batch_decode(tokens[:, PROMPT:], skip_special_tokens=True)


@torch.no_grad()
def log_probs(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    scores = torch.log_softmax(model(tokens).logits[:, PROMPT - 1 : -1], dim=-1)
    return scores.gather(2, tokens[:, PROMPT:, None]).sum((1, 2))


def config(beta: float, directory: str) -> trl.GRPOConfig:
    return trl.GRPOConfig(
        output_dir=directory, beta=beta * (GROUP - 1) / GROUP, scale_rewards="none",
        loss_type="dr_grpo", use_bias_correction_kl=True, num_iterations=1,
        temperature=1.0, top_p=1.0, top_k=0, num_generations=GROUP,
        max_completion_length=RESPONSE, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="linear", weight_decay=0.0, disable_dropout=True, bf16=False,
        use_cpu=True, seed=0, report_to="none", save_strategy="no", logging_steps=25,
        disable_tqdm=True,
    )  # fmt: skip


def main(name: str) -> None:
    beta = float(notation.beta_for_kl(name, letters.KL))
    start, tokenizer = time.perf_counter(), make_tokenizer()
    reference = learn_language()
    training, held_out = letters.make_prompts()
    _, texts = respond(reference, tokenizer, training, K)
    reward = letters.inference_aware(training, texts, notation.transformation(name, beta))
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)  # TRL reads policy and reference from there
        trainer = trl.GRPOTrainer(
            directory, reward, config(beta, directory), Dataset.from_dict({"prompt": training}),
            processing_class=tokenizer,
        )  # fmt: skip
        begun = time.perf_counter()
        trainer.train()
    trained, seconds = trainer.model.eval(), time.perf_counter() - begun

    tokens, ours = respond(trained, tokenizer, held_out, K)
    _, theirs = respond(reference, tokenizer, held_out, K)
    ratios = log_probs(trained, tokens) - log_probs(reference, tokens)
    letters.report(name, held_out, ours, theirs, ratios.numpy())
    versions = {"trl": trl, "transformers": transformers, "torch": torch}
    print(", ".join(f"{module} {code.__version__}" for module, code in versions.items()))
    print(f"GRPO {seconds:.0f} s of {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["exponential(10)"])
