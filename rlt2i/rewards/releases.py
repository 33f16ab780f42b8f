"""`rlt2i reward convert`: a released checkpoint of a reward model, rewritten as safetensors under transformers' names.

The result goes to $RLT2I_WEIGHTS/NAME (~/.cache/rlt2i/weights/NAME by default), where the reward of that name finds it.
Most publishers offer pickles only: this is the one place that reads such files, by torch's
restricted unpickler, so that nothing in them is executed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import attrs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlt2i.rewards import convert, mask2former
from rlt2i.rewards.aesthetic import HEAD_FILE
from rlt2i.rewards.hpsv3 import HEAD_LAYERS, TEMPLATE_FILE
from rlt2i.rewards.weights import SOURCE_FILE, weights_home

State = Mapping[str, Tensor]


@attrs.frozen(kw_only=True)
class Release:
    """A released checkpoint.

    Attributes:
        url: where it is.
        sha256: of the file, or as much of the beginning as is on record; empty when none is.
        licence: of the weights.
        write: (state dict, folder) -> files in the folder.
    """

    url: str
    sha256: str
    licence: str
    write: Callable[[State, Path], None]


def write_mask2former(state: State, folder: Path) -> None:
    """mmdet's detector."""
    model = mask2former.detector_class()(mask2former.official_config())
    load(model, mask2former.convert(state), may_miss="swin.layernorm.")
    model.save_pretrained(folder)


def write_hpsv2(state: State, folder: Path) -> None:
    """open_clip's ViT-H/14."""
    from transformers import CLIPModel

    model = CLIPModel(convert.vit_h_config())
    load(model, convert.open_clip_to_transformers(state))
    model.save_pretrained(folder)


def write_image_reward(state: State, folder: Path) -> None:
    """BLIP's two towers and the head on them."""
    from transformers import BlipTextModel, BlipVisionModel

    vision_state, text_state, head = convert.image_reward_to_transformers(state)
    vision_config, text_config = convert.blip_configs()
    vision, text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
    load(vision, vision_state)
    load(text, text_state)
    vision.save_pretrained(folder / "vision")
    text.save_pretrained(folder / "text")
    save_file(head, folder / HEAD_FILE)


def write_hpsv3(state: State, folder: Path) -> None:
    """Qwen2-VL-7B, the head on it, and the question that it was trained on.

    Raises:
        ValueError: for another checkpoint.
    """
    from transformers import Qwen2VLModel

    renamed, head = convert.hpsv3_to_transformers(state)
    rows = renamed.get("language_model.embed_tokens.weight")
    if rows is None or sorted(head) != sorted(f"{n}.{kind}" for n in HEAD_LAYERS for kind in ("weight", "bias")):
        raise ValueError(f"this is not the expected checkpoint: it holds {len(state)} tensors, such as {[*state][:3]}")
    # Read the question first: it may need the network, and 16 GB would have been written in vain.
    template = convert.hpsv3_template(hpsv3_module())
    with torch.device("meta"):
        model = Qwen2VLModel(convert.qwen2_vl_config(len(rows)))
    load(model, renamed, assign=True)
    model.save_pretrained(folder)
    save_file(head, folder / HEAD_FILE)
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def hpsv3_module() -> str:
    """The text of the authors' module with their question, out of their package: it is theirs and does not ship here.

    Raises:
        ValueError: when pip cannot fetch the package, or it is another one.
    """
    name, version, digest = HPSV3_PACKAGE
    with tempfile.TemporaryDirectory() as scratch:
        words = ["download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest", scratch]
        command = [sys.executable, "-m", "pip", *words, f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = [*Path(scratch).glob("*.whl")]
        if done.returncode or len(files) != 1:
            why = (done.stderr.strip() or "no wheel came").splitlines()[-1]
            raise ValueError(f"pip download {name}=={version} failed ({why}). Convert where there is a network.")
        check(files[0], digest)
        with zipfile.ZipFile(files[0]) as wheel:
            return wheel.read("hpsv3/dataset/data_collator_qwen.py").decode()


def write_aesthetic(state: State, folder: Path) -> None:
    """LAION's layers without nonlinearity, multiplied into one."""
    layers = {name.removeprefix("layers."): tensor for name, tensor in state.items()}
    save_file(convert.collapse_linear(layers), folder / HEAD_FILE)


HPSV3_PACKAGE = ("hpsv3", "1.0.0", "1a1b3ed1f538315ddf0e90c55b9f5c8ab3248d772cd713c11f7dfe35bf867ab3")
"""Name, version and SHA-256 of the wheel that the authors of HPSv3 published (MIT)."""
MMDET = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
RELEASES = {
    "mask2former_swin-s_mmdet": Release(
        url=f"https://download.openmmlab.com/mmdetection/v2.0/mask2former/{MMDET}/{MMDET}_20220504_001756-743b7d99.pth",
        sha256="743b7d99",
        licence="Apache-2.0",
        write=write_mask2former,
    ),
    "hpsv2": Release(
        url="https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2_compressed.pt",
        sha256="",
        licence="Apache-2.0",
        write=write_hpsv2,
    ),
    "hpsv2.1": Release(
        url="https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt",
        sha256="",
        licence="Apache-2.0",
        write=write_hpsv2,
    ),
    "hpsv3": Release(
        url="https://huggingface.co/MizzenAI/HPSv3/resolve/main/HPSv3.safetensors",
        sha256="",
        licence="MIT; the network that it was trained from, Qwen2-VL-7B-Instruct, is under Apache-2.0",
        write=write_hpsv3,
    ),
    "imagereward-v1.0": Release(
        url="https://huggingface.co/zai-org/ImageReward/resolve/main/ImageReward.pt",
        sha256="",
        licence="Apache-2.0",
        write=write_image_reward,
    ),
    "aesthetic_sac_logos_ava1_l14": Release(
        url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/"
        "fe88a163f4661b4ddabba0751ff645e2e620746e/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        sha256="",
        licence="Apache-2.0 according to its repository; confirm before redistributing",
        write=write_aesthetic,
    ),
}


def load(model: torch.nn.Module, state: State, *, may_miss: str = "\0", assign: bool = False) -> None:
    """Load every parameter, or take the tensors themselves; refuse a checkpoint that is not the expected one.

    Raises:
        ValueError: naming parameters that are missing or unknown.
    """
    missing, unexpected = model.load_state_dict(dict(state), strict=False, assign=assign)
    missing = [name for name in missing if may_miss not in name]
    if missing or unexpected:
        raise ValueError(
            f"this is not the expected checkpoint: {len(missing)} parameters missing, such as {missing[:3]}; "
            f"{len(unexpected)} unknown, such as {unexpected[:3]}"
        )


def read(checkpoint: Path) -> State:
    """The state dict inside a checkpoint, at whatever depth trainers usually put it; safetensors are left on disk."""
    with checkpoint.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{":
        return load_file(checkpoint)
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return cast(State, stored.get("state_dict", stored))


def check(checkpoint: Path, expected: str) -> str:
    """The file's SHA-256, if it is the expected one.

    Raises:
        ValueError: for another file.
    """
    with checkpoint.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(expected):
        raise ValueError(f"{checkpoint}: SHA-256 is {digest}, expected {expected}...; not used")
    print(f"SHA-256 {digest}" + ("" if expected else " (none is on record yet: compare with its publisher)"))
    return digest


def main(arguments: Sequence[str]) -> None:
    """Command line of `rlt2i reward convert`.

    Raises:
        ValueError: when the file is not the expected one.
    """
    parser = argparse.ArgumentParser(
        prog="rlt2i reward convert", description="make a reward's released weights loadable"
    )
    parser.add_argument("name", choices=sorted(RELEASES))
    parser.add_argument("--checkpoint", type=Path, help="a file that is already here, instead of a download")
    parser.add_argument("--sha256", help="what the file must have, instead of what is on record")
    parser.add_argument("--out", type=Path, help="folder to write; default: where the reward looks")
    options = parser.parse_args(arguments)
    release = RELEASES[options.name]
    folder = options.out or weights_home() / options.name
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = Path(scratch) / "checkpoint"
            print(f"downloading {release.url}")
            urllib.request.urlretrieve(release.url, checkpoint)
        digest = check(checkpoint, release.sha256 if options.sha256 is None else options.sha256)
        folder.mkdir(parents=True, exist_ok=True)
        release.write(read(checkpoint), folder)
    source = {"url": release.url, "sha256": digest, "licence": release.licence}
    (folder / SOURCE_FILE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {folder} (licence of the weights: {release.licence})")
