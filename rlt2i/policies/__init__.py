"""Backbones: the velocity fields that learn."""
