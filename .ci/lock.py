"""Writes the SHA-256 of every file of every pinned version into requirements.lock, as the package index states them.

python .ci/lock.py

pip then refuses a file that is not one of these. Files for other systems than Linux and macOS, and for other Pythons
than 3.11 to 3.13, are left out.
"""

from __future__ import annotations

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
INDEX = "https://pypi.org/simple/{name}/"
PYTHONS = re.compile(r"-(?:py3|py2\.py3|cp3(?:[2-9]|10|11)-abi3|cp3(?:11|12|13)-(?:cp3\d+|none))-", re.I)
SYSTEMS = re.compile(r"(?:any|linux[^-]*(?:x86_64|aarch64)|macosx[^-]*)\.whl$")


def pins(text: str) -> list[tuple[str, str, str]]:
    """(name, version, rest of the line without hashes) of every pinned requirement."""
    joined = text.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        plain = re.sub(r"\s*--hash=\S+", "", line).strip()
        if match := re.match(r"([\w.-]+)==([^\s;]+)(.*)$", plain):
            found.append((match[1], match[2], match[3].strip()))
    return found


def hashes(name: str, version: str) -> list[str]:
    """SHA-256 of the files of one version that could be installed here."""
    canonical = re.sub(r"[-_.]+", "-", name).lower()
    request = urllib.request.Request(
        INDEX.format(name=canonical), headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    spelled = "[-_.]+".join(map(re.escape, canonical.split("-")))
    start = re.compile(rf"{spelled}-{re.escape(version)}(?:-|\.tar\.gz$|\.zip$)", re.I)
    mine = [file for file in files if start.match(file["filename"])]
    wheels = [f for f in mine if PYTHONS.search(f["filename"]) and SYSTEMS.search(f["filename"])]
    sources = [f for f in mine if f["filename"].endswith((".tar.gz", ".zip"))]
    chosen = wheels + sources
    if not chosen:
        raise SystemExit(f"{name}=={version}: the index lists no file that could be installed")
    return sorted({file["hashes"]["sha256"] for file in chosen})


def main() -> None:
    """Rewrite the lock."""
    text = LOCK.read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    pinned = pins(text)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pin: hashes(pin[0], pin[1]), pinned))
    lines = head
    for (name, version, rest), digests in zip(pinned, found, strict=True):
        marker = f" {rest}" if rest else ""
        lines.append(" \\\n    ".join([f"{name}=={version}{marker}", *(f"--hash=sha256:{d}" for d in digests)]))
    LOCK.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(pinned)} pins, {sum(map(len, found))} hashes")


if __name__ == "__main__":
    main()
