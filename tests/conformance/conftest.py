"""Matrices this small only lose time to a second thread."""

from tests.policies.conftest import one_thread

__all__ = ["one_thread"]
