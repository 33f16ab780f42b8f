"""Published prompt sets that are fetched, not shipped: where they are, their SHA-256, and under which licence."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import attrs

from rlt2i.inputs.textfiles import has_suffix, numbered_lines, parse_json, read_text, split_lines
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.download import download, keep

LARGEST: Final = 64 << 20
"""Bytes; no prompt set is larger."""
WITHOUT_A_NETWORK: Final = "use prompts of your own: PromptFileTask(train=...)"

_FLOW_GRPO: Final = (
    "https://raw.githubusercontent.com/yifan123/flow_grpo/ac4c86e8cae021841f1fde853d340e0db67690dd/dataset/"
)
_FLOW_FACTORY: Final = (
    "https://raw.githubusercontent.com/X-GenGroup/Flow-Factory/a0b2bc5a2b4fbf9125429b3fb70c0c5d7631047c/dataset/"
)
_DIFFUSION_NFT: Final = (
    "https://raw.githubusercontent.com/NVlabs/DiffusionNFT/24af5554898d85e93efa492f42b5e9cdf4156e9b/dataset/"
)
_GENEVAL2: Final = (
    "https://raw.githubusercontent.com/facebookresearch/GenEval2/a6e82d2289e8d418f27f0adee77908b07060eea3/"
)
_PARTI: Final = "https://raw.githubusercontent.com/google-research/parti/5a657978134374ce28973948331b319adef164bd/"


@attrs.frozen(kw_only=True)
class PromptSet:
    """One file of prompts at a fixed commit.

    Attributes:
        url: of the file; `.txt` has one prompt per line, `.tsv` a header with Prompt and Category,
            `.jsonl` an object with prompt per line, which becomes its metadata.
        sha256: of its bytes.
        count: distinct prompts in it.
        licence: of the prompts, as far as their publishers say.
        note: what to know before using it.
    """

    url: str
    sha256: str
    count: int
    licence: str
    note: str = ""

    def prompts(self) -> list[TaskPrompt]:
        """The distinct prompts in their order; downloads the file unless it is there already."""
        return parse_prompts(fetch(self.url, self.sha256))


PROMPT_SETS: Final[Mapping[str, PromptSet]] = MappingProxyType(
    {
        "pickscore_train": PromptSet(
            url=_FLOW_GRPO + "pickscore/train.txt",
            sha256="2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f",
            count=25_432,
            licence="MIT (Pick-a-Pic)",
            note="what Flow-GRPO trains on; holds sexual and violent prompts",
        ),
        "pickscore_test": PromptSet(
            url=_FLOW_GRPO + "pickscore/test.txt",
            sha256="d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262",
            count=2_048,
            licence="MIT (Pick-a-Pic)",
            note="holds sexual and violent prompts",
        ),
        "pickscore_sfw_train": PromptSet(
            url=_FLOW_FACTORY + "pickscore/train.txt",
            sha256="f7ccf3512532e8c86c677a09907dad85a38a2d22ca95e701c11779b88cad33f0",
            count=15_471,
            licence="MIT (Pick-a-Pic)",
            note="filtered by its publishers",
        ),
        "pickscore_sfw_test": PromptSet(
            url=_FLOW_FACTORY + "pickscore/test.txt",
            sha256="d839050acb06aa045e399e76a81e4ade9a55fc743dc0e22e7b3eaeaca5c19107",
            count=1_024,
            licence="MIT (Pick-a-Pic)",
            note="filtered by its publishers",
        ),
        "ocr_test": PromptSet(
            url=_FLOW_GRPO + "ocr/test.txt",
            sha256="4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc",
            count=1_018,
            licence="MIT (flow_grpo; written by a language model)",
        ),
        "drawbench": PromptSet(
            url=_DIFFUSION_NFT + "drawbench/test.txt",
            sha256="9006b98feabb94b28a2bc0c88de42fd4f31a9ec3c2a19e308a02c5385b7172f0",
            count=200,
            licence="not stated by its authors (Imagen)",
            note="the file repeats every prompt five times; peers draw one image for each line",
        ),
        "geneval2": PromptSet(
            url=_GENEVAL2 + "geneval2_data.jsonl",
            sha256="09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43",
            count=800,
            licence="CC BY-NC 4.0",
            note="not for commercial use; every prompt carries the questions that GenEval2Reward asks",
        ),
        "partiprompts": PromptSet(
            url=_PARTI + "PartiPrompts.tsv",
            sha256="fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
            count=1_632,
            licence="Apache-2.0",
            note="twelve categories; a substitute for DrawBench with a clear licence",
        ),
    }
)
"""Name -> where it is. The hashes are of the files at those commits."""


def prompt_home() -> Path:
    """Folder of fetched prompt sets: $RLT2I_PROMPTS, or ~/.cache/rlt2i/prompts."""
    return Path(os.environ.get("RLT2I_PROMPTS", "~/.cache/rlt2i/prompts")).expanduser()


def fetch(url: str, sha256: str, *, instead: str = WITHOUT_A_NETWORK) -> Path:
    """The file at `url`, downloaded once; a file with another hash is never kept.

    Args:
        url: https, or file for tests and mirrors.
        sha256: 64 hexadecimal digits.
        instead: what to do without a network, but putting the file in its place.

    Returns:
        The verified file below `prompt_home()`.

    Raises:
        ValueError: on another scheme, a malformed hash, a file that cannot be fetched or is too large, or the wrong
            content.
    """
    if not url.startswith(("https://", "file://")):
        raise ValueError(f"fetch({url!r}): only https is fetched.")
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ValueError(f"fetch(sha256={sha256!r}): expected 64 lower-case hexadecimal digits.")
    target = prompt_home() / f"{sha256[:16]}-{url.rsplit('/', 1)[-1]}"
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return target
    content = download(url, largest=LARGEST, target=target, instead=instead)
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{url}: SHA-256 is {digest}, expected {sha256}. The file has changed or was tampered with; it is not used."
        )
    return keep(content, target, variable="RLT2I_PROMPTS")


def parse_prompts(path: Path) -> list[TaskPrompt]:
    """Distinct prompts of a .txt, .tsv or .jsonl file, in order."""
    text = read_text(path)
    if has_suffix(path, ".tsv"):
        rows = csv.DictReader(split_lines(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        prompts = [TaskPrompt(text=row["Prompt"].strip(), category=row["Category"].strip()) for row in rows]
    elif has_suffix(path, ".jsonl"):
        prompts = [_from_row(parse_json(line.text, line.where)) for line in numbered_lines(text, path)]
    else:
        prompts = [TaskPrompt(text=line.text) for line in numbered_lines(text, path)]
    return list({prompt.text: prompt for prompt in prompts}.values())


def _from_row(row: Any) -> TaskPrompt:
    """A row of GenEval 2: its categories are the numbers of atoms, 3 to 10."""
    return TaskPrompt(text=row["prompt"], metadata=row, category=f"{row['atom_count']} atoms")
