"""JPEG sizes: what the encoder writes, in kB."""

from __future__ import annotations

import io

import torch
from PIL import Image

from rlt2i.interfaces import RewardBatch
from rlt2i.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility


def batch() -> RewardBatch:
    noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.stack([torch.full((3, 64, 64), 90, dtype=torch.uint8), noise])
    return RewardBatch(images=images, prompts=["flat", "noise"], metadata=[{}, {}])


def test_scores_are_the_bytes_of_the_file():
    buffer = io.BytesIO()
    Image.fromarray(batch().images[1].permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
    output = JPEGIncompressibility().score(batch())
    assert round(output.scores[1].item() * 1000) == buffer.tell()
    assert output.valid.all()


def test_flat_images_win_in_one_and_lose_in_the_other():
    small, large = JPEGCompressibility().score(batch()).scores, JPEGIncompressibility().score(batch()).scores
    assert small[0] > small[1]
    assert large[0] < large[1]
    torch.testing.assert_close(small, -large)
    assert (JPEGIncompressibility(quality=30).score(batch()).scores < large).all()


def test_the_fingerprint_names_the_encoder():
    assert JPEGCompressibility().fingerprint()["encoder"].startswith("libjpeg ")
