"""Two tiny Stable Diffusion 3 pipelines with random weights, saved to disk: one without T5, one with."""

from __future__ import annotations

import string

import pytest
import torch

WORDS = (
    "a",
    "an",
    "the",
    "red",
    "blue",
    "green",
    "cat",
    "cats",
    "dog",
    "box",
    "boxes",
    "two",
    "and",
    "of",
    "on",
    "photo",
    "sign",
    "saying",
    "hello",
    "world",
    "left",
)
CLIP_LENGTH = 16
T5_LENGTH = 12


def build_clip_tokenizer():
    """Byte-pair encoding that knows WORDS whole and spells everything else letter by letter."""
    from transformers import CLIPTokenizer

    symbols = string.ascii_lowercase + string.digits + "\"'.,!?-:"
    vocab = ["<|startoftext|>", "<|endoftext|>", *symbols, *(symbol + "</w>" for symbol in symbols)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # right to left, so that no word's merge can interrupt another's
            pair = (pieces[-2], pieces[-1])
            pieces[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                vocab.append(pieces[-1])
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CLIP_LENGTH)


def build_t5_tokenizer():
    """A unigram model that knows WORDS whole (with the leading space mark) and letters."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [("\u2581" + word, -3.0) for word in WORDS]
    pieces += [(symbol, -6.0) for symbol in string.ascii_letters + string.digits + "\"'.,!?-:"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def build_pipeline(*, with_t5: bool, shift: float):
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip_tokenizer = build_clip_tokenizer()
    t5_tokenizer = build_t5_tokenizer() if with_t5 else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=16, dual_attention_layers=(0, 1), qk_norm="rms_norm",
        )  # fmt: skip
        encoders = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(clip_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2, max_position_embeddings=CLIP_LENGTH, projection_dim=16,
                    bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_factor=8.0,
                )
            )
            for _ in range(2)
        ]  # fmt: skip
        t5 = None
        if t5_tokenizer is not None:
            t5 = T5EncoderModel(
                T5Config(vocab_size=len(t5_tokenizer), d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
            )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1,
            mid_block_add_attention=False, scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False,
            use_post_quant_conv=False,
        )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=vae.eval(),
        text_encoder=encoders[0].eval(), tokenizer=clip_tokenizer, text_encoder_2=encoders[1].eval(),
        tokenizer_2=clip_tokenizer, text_encoder_3=t5 if t5 is None else t5.eval(), tokenizer_3=t5_tokenizer,
    )  # fmt: skip


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
    build_pipeline(with_t5=False, shift=1.0).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def t5_pipeline(tmp_path_factory):
    """A pipeline directory with T5, shift 3."""
    folder = tmp_path_factory.mktemp("sd3_t5")
    build_pipeline(with_t5=True, shift=3.0).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def clip_tokenizer():
    return build_clip_tokenizer()


@pytest.fixture(scope="session")
def t5_tokenizer():
    return build_t5_tokenizer()


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
