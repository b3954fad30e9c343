"""Rewards over HTTP: a server of a `RewardSet`, and what asks one or several of them. No pickle on the wire."""
