"""What both sides of a race do, and how a racer is asked and answers.

A racer is a script that the Python of its own environment runs: its argument is a Work as JSON, the
last line it prints is its answer (`report`).
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

RESERVED = 3  # no prompt holds the first ids, which are an end or padding elsewhere
FIRST = 0x4E00  # a token's text is one letter, so that texts joined are tokens joined


@dataclass(frozen=True)
class Work:
    """One race's work: a Llama-like model from scratch, and what is measured of it.

    `algorithm` is the peer's: grpo, rloo or online_dpo for whole RL steps, sample for drawing
    responses. `updates` steps are measured after `warm_up` others.
    """

    algorithm: str
    prompt: int = 64  # tokens, of every prompt
    response: int = 64  # tokens, of every response
    prompts: int = 8  # in a step
    responses: int = 8  # to each
    vocab: int = 2048
    width: int = 128
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 384
    reward: str = "model"  # of the policy's size, or "function": `even_share`
    beta: float = 0.04
    updates: int = 8
    warm_up: int = 3
    threads: int = 2
    device: str = "cpu"  # or "gpu"
    compute: str = "float32"  # or "bfloat16"
    settings: dict[str, Any] = field(default_factory=dict)  # the racer's own, over its defaults

    @property
    def tokens(self) -> int:
        """Tokens generated in a step."""
        return self.prompts * self.responses * self.response

    @property
    def parameters(self) -> int:
        """Of a Llama with tied embeddings and without biases."""
        attention = 2 * self.width**2 * (1 + self.kv_heads / self.heads)
        layer = int(attention) + 3 * self.width * self.mlp_width + 2 * self.width
        return self.vocab * self.width + self.layers * layer + self.width


def prompt_tokens(work: Work, step: int) -> np.ndarray:
    """int32[prompts, prompt], others at each step, the same for every racer."""
    shape = work.prompts, work.prompt
    return np.random.default_rng([0, step]).integers(RESERVED, work.vocab, shape, np.int32)


def text(tokens: Iterable[int]) -> str:
    return "".join(chr(FIRST + int(i)) for i in tokens)


def ids(text: str) -> list[int]:
    return [ord(letter) - FIRST for letter in text]


def even_share(responses: Iterable[Sequence[int]]) -> list[float]:
    """The cheap reward: the share of even tokens in each response."""
    return [sum(i % 2 == 0 for i in tokens) / len(tokens) for tokens in responses]


def read() -> Work:
    """The work this process was asked for."""
    return Work(**json.loads(sys.argv[1]))


def report(
    work: Work, times: Sequence[float], parameters: int, versions: dict[str, str], settings: str
) -> None:
    """The answer: seconds of every measured step, from its beginning or the end of the one before.

    `times` are the beginning and the end of every step. Exits with an error where the model is of
    another size than asked for.
    """
    seconds = [end - begin for begin, end in pairwise(times)][work.warm_up :]
    if abs(parameters / work.parameters - 1) > 0.05:
        sys.exit(f"expected a model of {work.parameters} parameters, got {parameters}")
    if len(seconds) != work.updates:
        sys.exit(f"expected {work.updates} measured steps, got {len(seconds)}")
    answer = {"seconds": seconds, "parameters": parameters, "tokens": work.tokens}
    print(json.dumps(answer | {"versions": versions, "settings": settings}))
