"""Rewards: images, prompts and dataset columns in; one score per image out. No reward knows training."""

from crd.rewards.base import RewardSet, WeightedReward, resolve

__all__ = ["RewardSet", "WeightedReward", "resolve"]
