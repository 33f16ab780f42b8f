"""Suites: measurements of a policy that can be repeated, shared out, interrupted and paired."""

from rlt2i.suites.catalogue import list_suites, load_suite
from rlt2i.suites.suite import Suite

__all__ = ["Suite", "list_suites", "load_suite"]
