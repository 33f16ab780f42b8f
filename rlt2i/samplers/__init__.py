"""Samplers: how a trajectory unfolds, and where it is stochastic."""
