"""InfAlign in JAX: align a language model for the way it is decoded."""

__version__ = "0.1.0"
