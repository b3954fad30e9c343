"""Rewards: images, prompts and dataset columns in; one score per image out. No reward knows training."""

from crd.rewards.base import RewardFunction, RewardSet, WeightedReward, resolve

__all__ = ["RewardFunction", "RewardSet", "WeightedReward", "resolve"]
