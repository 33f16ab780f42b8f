"""`rlt2i check policy SPEC` and `rlt2i check RECIPE`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlt2i.config.naming import named_part
from rlt2i.config.references import is_reference, read_yaml
from rlt2i.conformance.laws import check_policy, table
from rlt2i.conformance.recipe import check_recipe
from rlt2i.inputs.textfiles import has_suffix, user_path
from rlt2i.interfaces import PolicySpec
from rlt2i.policies.pretrained import PretrainedSpec
from rlt2i.policies.pretrained.loading import quietly
from rlt2i.recipes.parts import PARTS
from rlt2i.recipes.recipe import load_recipe
from rlt2i.rehearsal.replacing import make_small, small_policy
from rlt2i.types import ImageSize, image_size


def named_policy(name: str, fields: Sequence[str] = ()) -> PolicySpec:
    """The policy that a name and some fields describe.

    Args:
        name: a short name, `module:Class`, `file.py:Class`, a YAML file with a policy or a recipe, or whatever else
            names a recipe.
        fields: `field=value`.

    Raises:
        ConfigError: naming what is wrong.
    """
    file = has_suffix(name, ".yaml", ".yml") and user_path(name).is_file()
    of_recipe = file and {"policy", "extends"} & set(read_yaml(user_path(name)))
    if of_recipe or not (file or is_reference(name) or name in PARTS["PolicySpec"] or has_suffix(name, ".yaml")):
        return load_recipe(name, [f"policy.{field}" for field in fields]).policy
    return named_part(PolicySpec, name, fields, key="policy", parts=PARTS)  # type: ignore[type-abstract]


def parse_size(text: str) -> ImageSize:
    """ "64" or "64x96", height first.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ValueError(f"--size {text}: write a number of pixels, or height x width such as 512x768.")
    height = int(match[1])
    size: ImageSize = image_size((height, int(match[2] or height)))
    return size


def main(name: str, fields: Sequence[str], *, size: str | None, device: str, tiny: bool) -> int:
    """Examine a policy and print what came out; 0 when every law is kept, 1 when not.

    Raises:
        ValueError: for `--tiny` with a policy that is no diffusers pipeline.
    """
    spec = named_policy(name, fields)
    wanted = parse_size(size) if size else None
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rlt2i-check-") as folder, quietly():
        if tiny:
            if not isinstance(spec, PretrainedSpec):
                raise ValueError(f"check policy {name} --tiny: {type(spec).__name__} is no diffusers pipeline.")
            spec, usual = small_policy(spec, Path(folder), 0, compile_blocks=True, said=said)
            wanted = wanted or usual or None
        for line in said:
            print(f"replaced  {line}")
        findings = check_policy(spec, size=wanted, device=device)
    print(table(findings))
    return int(any(finding.mistake is not None for finding in findings))


def main_of_recipe(name: str, overrides: Sequence[str], *, device: str, world_size: int, tiny: bool) -> int:
    """Examine a recipe on its own weights and print what came out; 0 when every law is kept, 1 when not."""
    recipe, leave_out = load_recipe(name, overrides), []
    with tempfile.TemporaryDirectory(prefix="rlt2i-check-") as folder, quietly():
        if tiny:
            small = make_small(recipe, Path(folder), compile_blocks=False)
            recipe = small.recipe
            leave_out = ["reward_tells_good_from_bad"] if recipe.reward != load_recipe(name, overrides).reward else []
            for line in small.replaced:
                print(f"replaced  {line}")
        findings = check_recipe(recipe, device=device, world_size=world_size, leave_out=leave_out)
    print(table(findings))
    return int(any(finding.mistake is not None for finding in findings))
