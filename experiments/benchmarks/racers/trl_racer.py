"""TRL's GRPO, RLOO or Online-DPO on the work of `work.py`, each step whole: draw, score, update.

Run by `peers.py`. What is chosen for speed, where TRL's default is slower on a CPU: no gradient
checkpointing, float32, no logging, an end token outside the vocabulary (nothing is padded), a
tokenizer of single letters. Its settings, which `peers.py --try` compares:

- `attention`: "sdpa" or "eager"; `cache`: "dynamic" or "static", of the generation;
- `torch_compile`: of the training step, by the trainer's own option;
- `optim`: the name of an optimiser of transformers, fused AdamW by default;
- `micro_batch`: responses in one forward and backward, all of a step's by default (0).
"""

import os
import tempfile
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
import trl
from datasets import Dataset
from hf_racer import llama_config, place, ran_on, wait
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from work import Work, even_share, ids, prompt_tokens, read, report, text

DEFAULTS = {
    "attention": "sdpa", "cache": "dynamic", "torch_compile": False, "optim": "adamw_torch_fused",
    "micro_batch": 0,
}  # fmt: skip


class Clock(transformers.TrainerCallback):
    """When training began, and when each optimiser step had ended."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.times: list[float] = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        wait(self.work)
        self.times.append(time.perf_counter())


def make_tokenizer(work: Work) -> PreTrainedTokenizerFast:
    """One letter a token; padding and end lie outside the model's vocabulary."""
    words = {text([i]): i for i in range(work.vocab)}
    words |= {"[PAD]": work.vocab, "[EOS]": work.vocab + 1}
    plain = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain.decoder = decoders.Fuse()
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **names)
    every = list(range(work.vocab))
    assert tokenizer(text(every))["input_ids"] == ids(tokenizer.decode(every)) == every
    return tokenizer


def shared_arguments(work: Work, settings: dict[str, object], directory: str) -> dict[str, object]:
    """What the three trainers' configurations share."""
    micro = settings["micro_batch"] or work.prompts * work.responses
    cache = None if settings["cache"] == "dynamic" else settings["cache"]
    return {
        "output_dir": directory, "max_steps": work.warm_up + work.updates, "beta": work.beta,
        "gradient_accumulation_steps": work.prompts * work.responses // micro,
        "per_device_train_batch_size": micro // 2 if work.algorithm == "online_dpo" else micro,
        "gradient_checkpointing": False, "bf16": work.compute == "bfloat16",
        "use_cpu": work.device == "cpu", "learning_rate": 1e-4,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "cache_implementation": cache, "torch_compile": settings["torch_compile"],
        "optim": settings["optim"], "report_to": "none", "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "dataloader_num_workers": 0, "seed": 0,
    }  # fmt: skip


def make_trainer(work: Work, settings: dict[str, object], directory: str) -> transformers.Trainer:
    config = llama_config(work, settings["attention"])
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)  # TRL reads the reference from there
    policy = LlamaForCausalLM.from_pretrained(
        directory, attn_implementation=settings["attention"], dtype=place(work)["dtype"]
    )
    scorer = LlamaForSequenceClassification(llama_config(work, settings["attention"]))
    scorer.to(**place(work))
    steps = range(work.warm_up + work.updates)
    prompts = [text(row) for step in steps for row in prompt_tokens(work, step)]
    made = {
        "model": policy, "train_dataset": Dataset.from_dict({"prompt": prompts}),
        "processing_class": make_tokenizer(work), "reward_funcs": rewards,
    }  # fmt: skip
    if work.reward == "model":
        made |= {"reward_funcs": scorer, "reward_processing_classes": make_tokenizer(work)}
    shared = shared_arguments(work, settings, directory)
    if work.algorithm == "online_dpo":
        arguments = OnlineDPOConfig(
            **shared, max_new_tokens=work.response, max_length=work.prompt + work.response
        )
        return OnlineDPOTrainer(**made, args=arguments)
    kinds = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}
    arguments, trainer = kinds[work.algorithm]
    return trainer(**made, args=arguments(
        **shared, max_completion_length=work.response, num_generations=work.responses,
        num_iterations=1, shuffle_dataset=False,
    ))  # fmt: skip


def rewards(prompts: list[str], completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    return even_share(completion_ids)


def check_lengths(work: Work, trainer: transformers.Trainer) -> None:
    """Every response had T tokens."""
    if work.algorithm == "online_dpo":
        assert set(trainer.stats["val/contain_eos_token"]) == {0.0}
        return
    means = trainer.state.log_history[-1]
    for name in ("min", "max"):
        assert means[f"completions/{name}_length"] == work.response, means


def main() -> None:
    work = read()
    if work.algorithm == "online_dpo" and work.responses != 2:
        raise SystemExit(f"online_dpo: expected 2 responses a prompt, got {work.responses}")
    settings, clock = DEFAULTS | work.settings, Clock(work)
    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(work, settings, directory)
        trainer.add_callback(clock)
        trainer.train()
    check_lengths(work, trainer)
    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    report(
        work, clock.times,
        trainer.model.num_parameters(), versions,
        f"{work.compute}, no gradient checkpointing, no logging, {ran_on(work)}; {chosen}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
