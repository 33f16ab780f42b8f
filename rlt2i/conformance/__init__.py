"""Conformance: what a part written by anybody must keep, checked law by law, with a message for every mistake.

`rlt2i check policy SPEC` runs the laws of a policy on the command line. In a test module:

    from rlt2i.conformance import PolicyConformance

    class TestMyPolicy(PolicyConformance):
        spec = MySpec(path="...")
"""

from rlt2i.conformance.laws import POLICY_LAWS, Finding, Mistake, check_policy, table
from rlt2i.conformance.subject import Subject
from rlt2i.conformance.testing import PolicyConformance

__all__ = ["POLICY_LAWS", "Finding", "Mistake", "PolicyConformance", "Subject", "check_policy", "table"]
