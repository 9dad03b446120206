"""Models by size, with the batch that `infalign bench` gives them."""

from typing import NamedTuple

from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.layers import TransformerConfig


class Size(NamedTuple):
    """A model and a batch for it."""

    model: TransformerConfig
    shape: Shape


SMALL = Shape(prompts=8, prompt=64, responses=8, response=64)
SIZES = {
    "tiny": Size(TransformerConfig(512, 64, 2, 4, 2, 192), Shape(8, 16, 8, 16)),
    "1m": Size(TransformerConfig(2048, 128, 5, 4, 2, 384), SMALL),
    "5m": Size(TransformerConfig(2048, 256, 6, 4, 2, 768), SMALL),
    "125m": Size(TransformerConfig(32_000, 768, 12, 12, 4, 3072), Shape(16, 256, 8, 256)),
    "1b": Size(TransformerConfig(128_256, 2048, 16, 32, 8, 8192), Shape(16, 512, 8, 512)),
    "8b": Size(TransformerConfig(128_256, 4096, 32, 32, 8, 14_336), Shape(8, 512, 8, 512)),
}
