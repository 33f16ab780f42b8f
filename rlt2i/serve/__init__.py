"""Rewards over HTTP: a server for any reward, and a client that is a reward. No pickle on the wire."""
