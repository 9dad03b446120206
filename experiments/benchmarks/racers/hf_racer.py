"""HF `generate` on the work of `work.py`: K responses to each prompt, all of one length.

Run by `peers.py`. Its settings, which `peers.py --try` compares:

- `prefill`: "shared" computes the keys and values of a prompt once for its K responses (a cache
  filled by hand, then `batch_repeat_interleave`), "repeated" is `num_return_sequences=K`.
- `cache`: "dynamic" or "static"; `compile` (static only): `torch.compile` of the decoding step.
- `attention`: "sdpa" or "eager".
"""

import os
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from transformers import CompileConfig, DynamicCache, GenerationConfig, LlamaConfig
from transformers import LlamaForCausalLM as Llama
from work import Work, prompt_tokens, read, report

DEFAULTS = {"prefill": "shared", "cache": "dynamic", "compile": False, "attention": "sdpa"}


def llama_config(work: Work, attention: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=work.vocab, hidden_size=work.width, num_hidden_layers=work.layers,
        num_attention_heads=work.heads, num_key_value_heads=work.kv_heads,
        intermediate_size=work.mlp_width, max_position_embeddings=work.prompt + work.response,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        attn_implementation=attention,
    )  # fmt: skip


def place(work: Work) -> dict[str, object]:
    """Where a model's parameters lie, and in what precision."""
    device = "cuda" if work.device == "gpu" else "cpu"
    return {"device": device, "dtype": getattr(torch, work.compute)}


def wait(work: Work) -> None:
    """Until the device has done what it was asked for."""
    if work.device == "gpu":
        torch.cuda.synchronize()


def generation(work: Work, settings: dict[str, object]) -> GenerationConfig:
    """Exactly T tokens, since no token ends a response, at temperature 1 and nothing truncated."""
    static = {"cache_implementation": "static"} if settings["cache"] == "static" else {}
    cpu = work.device == "cpu"
    compiled = None
    if settings["compile"]:
        compiled = CompileConfig(mode="default" if cpu else "reduce-overhead")
        compiled._compile_all_devices = cpu  # otherwise not on a CPU
    return GenerationConfig(
        max_new_tokens=work.response, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        eos_token_id=None, pad_token_id=0, compile_config=compiled,
        disable_compile=compiled is None, **static,
    )  # fmt: skip


def ran_on(work: Work) -> str:
    return torch.cuda.get_device_name() if work.device == "gpu" else f"{work.threads} threads"


@torch.inference_mode()
def respond(
    model: Llama, prompts: torch.Tensor, responses: int, config: GenerationConfig, shared: bool
) -> torch.Tensor:
    """int64[B·K, P + T]."""
    repeated = prompts.repeat_interleave(responses, 0)
    given = {"attention_mask": torch.ones_like(repeated), "generation_config": config}
    if not shared:
        return model.generate(repeated, **given)
    cache = DynamicCache(config=model.config)
    model(prompts[:, :-1], past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(responses)
    return model.generate(repeated, past_key_values=cache, **given)


def main() -> None:
    work = read()
    settings = DEFAULTS | work.settings
    shared = settings["prefill"] == "shared"
    if shared and settings["cache"] == "static":
        raise SystemExit("prefill: expected repeated with a static cache, got shared")
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    model = Llama(llama_config(work, settings["attention"])).eval().to(**place(work))
    config, times = generation(work, settings), [time.perf_counter()]
    for step in range(work.warm_up + work.updates):
        prompts = torch.from_numpy(prompt_tokens(work, step)).long().to(model.device)
        tokens = respond(model, prompts, work.responses, config, shared)
        wait(work)
        times.append(time.perf_counter())
        assert tokens.shape == (work.prompts * work.responses, work.prompt + work.response)
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    report(
        work, times, model.num_parameters(),
        {"transformers": transformers.__version__, "torch": torch.__version__},
        f"generate, inference_mode, {work.compute}, no end token, {ran_on(work)}; {chosen}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
