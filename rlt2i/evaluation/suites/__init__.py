"""Suites: measurements of a policy that can be repeated, shared out, interrupted and paired."""

from rlt2i.evaluation.suites.catalogue import list_suites, load_suite
from rlt2i.evaluation.suites.suite import Suite

__all__ = ["Suite", "list_suites", "load_suite"]
