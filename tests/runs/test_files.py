"""Files change in one step, whatever is written to them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rlt2i.runs.files import replace_tensors, replace_text, replacing


def test_tensors_of_any_memory_layout_are_written(tmp_path):
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).to(torch.uint8)
    shared = torch.arange(6.0)
    tensors = {
        "channels last": images.to(memory_format=torch.channels_last),
        "transposed": shared.view(2, 3).T,
        "expanded": torch.ones(1, 3).expand(2, 3),
        "whole": shared,
        "part": shared[:2],
        "same": shared,
        "with gradient": torch.ones(2, requires_grad=True),
        "empty": torch.zeros(0, 3),
        "also empty": torch.zeros(0),
    }
    replace_tensors(tmp_path / "a.safetensors", tensors, metadata={"info": "{}"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(read[name], value), name


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    replace_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError), replacing(tmp_path / "a") as partial:
        partial.write_text("half of the n\ud800", encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_every_writer_leaves_files_that_others_may_read(tmp_path):
    (tmp_path / "plain").touch()
    replace_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    replace_text(tmp_path / "b.json", "{}")
    assert {p.stat().st_mode for p in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}
