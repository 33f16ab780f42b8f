"""Rewards over HTTP: a server for any reward, and the client that is a reward itself. No pickle on the wire."""
