"""Centered Reward Distillation (arXiv 2603.14128) for diffusion and flow models."""

__version__ = "0.1.0"
