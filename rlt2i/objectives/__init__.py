"""Objectives: losses that consume credit, one idea a file."""
