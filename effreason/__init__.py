"""effreason: train large reasoning models to reason efficiently (arXiv 2502.04463), in JAX."""

__version__ = "0.1.0"
