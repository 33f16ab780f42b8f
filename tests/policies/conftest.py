"""Two tiny Stable Diffusion 3 pipelines with random weights, saved to disk: one without T5, one with."""

from __future__ import annotations

import pytest
import torch

from rlt2i.policies.tiny import save_tiny
from rlt2i.policies.tiny.text import clip_tokenizer as build_clip_tokenizer
from rlt2i.policies.tiny.text import unigram_tokenizer

CLIP_LENGTH = 16
T5_LENGTH = 12


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices this small only lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def clip_pipeline(tmp_path_factory):
    """A pipeline directory without T5, shift 1."""
    folder = tmp_path_factory.mktemp("sd3_clip")
    return save_tiny("StableDiffusion3Pipeline", folder, with_t5=False, shift=1.0, clip_length=CLIP_LENGTH)


@pytest.fixture(scope="session")
def t5_pipeline(tmp_path_factory):
    """A pipeline directory with T5, shift 3."""
    return save_tiny("StableDiffusion3Pipeline", tmp_path_factory.mktemp("sd3_t5"), clip_length=CLIP_LENGTH)


@pytest.fixture(scope="session")
def clip_tokenizer():
    return build_clip_tokenizer(CLIP_LENGTH)


@pytest.fixture(scope="session")
def t5_tokenizer():
    return unigram_tokenizer()


@pytest.fixture(scope="session")
def stock():
    """Loads the stock diffusers pipeline of a directory."""
    from diffusers import StableDiffusion3Pipeline

    def load(folder, **options):
        if not (folder / "text_encoder_3").exists():
            options |= {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load
