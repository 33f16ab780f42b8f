"""Rewards: what judges a finished image. No part here imports a model library before its first score."""
