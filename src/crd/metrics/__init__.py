"""Held-out scores, image statistics and intervals; no training."""
