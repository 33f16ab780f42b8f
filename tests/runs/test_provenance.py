"""What a run was made with."""

from __future__ import annotations

from rlt2i.runs.provenance import versions


def test_versions_name_the_commit_only_of_our_own_repository():
    found = versions()
    assert found["git"] is None or set(found["git"]) == {"commit", "dirty"}
    assert found["rlt2i"]
