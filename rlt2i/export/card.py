"""The model card of an export: what it was trained from and with, how to load it, and what was measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import torch

from rlt2i.config.secrets import redacted_text
from rlt2i.config.version import __version__
from rlt2i.interfaces import Policy
from rlt2i.policies.guidance import Guided, LinearGuidance
from rlt2i.policies.pretrained import PretrainedPolicy, PretrainedSpec
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.metrics import read_metrics
from rlt2i.types import height_and_width

CARD = "README.md"
_LOG = logging.getLogger(__name__)
Form = Literal["adapter", "network", "pipeline", "comfyui", "kohya", "peft"]
"""What a folder holds: a LoRA file of diffusers, one network, a whole pipeline, or a file of another tool."""
_ADAPTER = ("adapter", "comfyui", "kohya", "peft")
_PROMPT = "a photograph of a cat beside a sign that reads open"

LICENCES: Mapping[str, str] = {
    "stabilityai/stable-diffusion-3-medium": "Stability AI Community License",
    "stabilityai/stable-diffusion-3.5-medium": "Stability AI Community License",
    "stabilityai/stable-diffusion-3.5-large": "Stability AI Community License",
    "black-forest-labs/FLUX.1-dev": "FLUX.1 [dev] Non-Commercial License",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "black-forest-labs/FLUX.2-dev": "FLUX [dev] Non-Commercial License",
    "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
    "Qwen/Qwen-Image": "apache-2.0",
    "Tongyi-MAI/Z-Image": "apache-2.0",
    "Tongyi-MAI/Z-Image-Turbo": "apache-2.0",
    "Alpha-VLLM/Lumina-Image-2.0": "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
"""Of the base weights, by repository. An export is a derivative, so the same licence holds for it."""


@attrs.frozen(kw_only=True)
class Card:
    """What a card is made of.

    Attributes:
        recipe: of the run.
        policy: with the weights that are exported.
        form: of the folder.
        iteration: of the weights.
        run_dir: whose evaluations are shown; None where there is none.
    """

    recipe: Recipe
    policy: PretrainedPolicy
    form: Form
    iteration: int
    run_dir: Path | None = None

    @property
    def spec(self) -> PretrainedSpec:
        return self.policy.spec

    @property
    def licence(self) -> str:
        return LICENCES.get(self.spec.path, "that of the base model")

    def settings(self) -> dict[str, Any]:
        """Arguments with which the stock pipeline draws what `rlt2i sample` draws."""
        height, width = height_and_width(self.recipe.train.image_size)
        steps = self.recipe.train.eval_steps
        return {
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            **self.spec.stock_call(),
            **({"sigmas": sigmas} if (sigmas := self._own_sigmas(steps)) else {}),
        }

    def _own_sigmas(self, steps: int) -> list[float] | None:
        """The schedule, in the stock pipeline's terms, where its scheduler would take another one by itself."""
        scheduler = type(self.policy.pipe.scheduler).from_config(self.policy.pipe.scheduler.config)
        config = scheduler.config
        if not hasattr(scheduler, "sigmas") or config.get("use_dynamic_shifting", False) or "shift" not in config:
            return None
        wanted = self.policy.sigmas(steps, self.recipe.train.image_size).double()
        scheduler.set_timesteps(steps)
        if torch.allclose(scheduler.sigmas.double(), wanted, atol=1e-6):
            return None
        shift = float(config.shift)
        before = wanted[:-1] / (shift - (shift - 1) * wanted[:-1])
        given = [round(float(sigma), 9) for sigma in before]
        scheduler.set_timesteps(sigmas=np.array(given))
        return given if torch.allclose(scheduler.sigmas.double(), wanted, atol=1e-6) else None

    def notes(self) -> list[str]:
        """In what the stock pipeline differs from the policy that was trained."""
        spec, notes = self.spec, []
        if spec.guided and not isinstance(spec.guidance, LinearGuidance):
            notes.append(f"It was trained under {type(spec.guidance).__name__}, which the stock pipeline may not have.")
        if type(self.policy.pipe.scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
            notes.append("`rlt2i sample` takes Euler steps of the flow; other schedulers give other images.")
        return notes

    # ------------------------------------------------------------------------------------------------------- snippets

    def snippet(self) -> str:
        """Python that loads the folder it lies in and draws an image with the stock pipeline."""
        spec, network = self.spec, self.spec.network
        dtype = str(spec.compute_dtype)
        optional = type(self.policy.pipe)._optional_components
        absent = [name for name, part in spec.components().items() if part is None and name not in optional]
        left_out = "".join(f", {name}=None" for name in absent)
        base = f"{spec.pipeline}.from_pretrained({self._base()}"
        options = f"{left_out}, dtype={dtype})"
        names, load = [spec.pipeline], f"pipe = {base}{options}"
        if self.form == "pipeline":
            load = f'pipe = {spec.pipeline}.from_pretrained("."{options}'
        elif self.form == "network":
            kind = type(getattr(self.policy.pipe, network)).__name__
            names.append(kind)
            load = (
                f'{network} = {kind}.from_pretrained(".", subfolder="{network}", dtype={dtype})\n'
                f"pipe = {base}, {network}={network}{options}"
            )
        elif self.form == "adapter":
            load += '\npipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")'
        elif self.form == "peft":
            load += f'\npipe.{network} = PeftModel.from_pretrained(pipe.{network}, ".").merge_and_unload()'
        lines = ["from importlib.resources import files\n"] if spec.path.startswith("embedded:") else []
        lines += ["import torch", f"from diffusers import {', '.join(sorted(names))}"]
        lines += ["from peft import PeftModel"] if self.form == "peft" else []
        settings = "".join(f"    {name}={value!r},\n" for name, value in self.settings().items())
        return (
            "\n".join(lines)
            + f"\n\n{load}\nsettings = dict(\n{settings})\n"
            + f"image = pipe(prompt={json.dumps(self._prompt(), ensure_ascii=False)}, "
            + "generator=torch.Generator().manual_seed(0), **settings).images[0]\n"
            + 'image.save("image.png")\n'
        )

    def _prompt(self) -> str:
        """One that the base can draw: an embedded pipeline knows the words of its own world alone."""
        if not self.spec.path.startswith("embedded:"):
            return _PROMPT
        return self.recipe.task.train_prompts(seed=0, start=0, count=1)[0].text

    def _base(self) -> str:
        """Python for the base as others may load it."""
        if self.spec.path.startswith("embedded:"):
            return f'files("rlt2i") / "tasks/{self.spec.path.removeprefix("embedded:")}/pipeline"'
        return json.dumps(self.spec.path)

    def usage(self) -> str:
        """How to use the folder, in Markdown."""
        if self.form == "comfyui":
            return (
                "Put `comfyui_lora.safetensors` into `ComfyUI/models/loras` and load it with the node "
                "**LoraLoaderModelOnly** on the base model, strength 1. Sampler `euler`, settings as above.\n"
            )
        if self.form == "kohya":
            return (
                "`kohya_lora.safetensors` is read by sd-scripts and musubi-tuner (`--network_weights`, their scripts "
                "that generate and merge) and by the interfaces that read their files; strength 1, settings as above.\n"
            )
        return f"Run this in the folder of this file:\n\n```python\n{self.snippet()}```\n"

    # ------------------------------------------------------------------------------------------------------------ text

    def text(self) -> str:
        """The card."""
        spec, recipe, train = self.spec, self.recipe, self.recipe.train
        steps = (
            f"after iteration {self.iteration} of {train.iterations}" if self.iteration is not None else "base weights"
        )
        kind = f"LoRA of rank {spec.lora_rank}" if spec.lora_rank is not None else "full fine-tune"
        rows = {
            "base": f"`{spec.path}`" + (f" at `{spec.revision}`" if spec.revision else ""),
            "licence": f"{self.licence}; what it says of derivatives holds for this folder",
            "weights": f"{kind}, {steps}; {'merged into the network' if self._merged else self.form}",
            "recipe": f"`{recipe.name}`, hash `{recipe.hash}`",
            "trained for": redacted_text(recipe.about) or recipe.name,
            "reward": type(recipe.reward).__name__,
            "made with": f"rlt2i {__version__}",
            **{name.replace("_", " "): json.dumps(value) for name, value in self.settings().items()},
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        parts = [
            self._front_matter(),
            f"# {recipe.name}\n",
            f"| | |\n|---|---|\n{table}\n",
            f"## Use\n\n{self.usage()}",
            *(f"{note}\n" for note in self.notes()),
            self._curve(),
        ]
        return "\n".join(part for part in parts if part)

    @property
    def _merged(self) -> bool:
        return self.form in ("network", "pipeline") and self.spec.lora_rank is not None

    def _front_matter(self) -> str:
        on_hub = isinstance(self.spec.source, str)
        lines = ["library_name: diffusers", "pipeline_tag: text-to-image"]
        lines += [f"base_model: {self.spec.path}"] if on_hub else []
        lines += [f"base_model_relation: {'adapter' if self.form in _ADAPTER else 'finetune'}"] if on_hub else []
        plain = " " not in self.licence
        lines += [f"license: {self.licence}"] if plain else ["license: other", f"license_name: {self.licence}"]
        return "---\n" + "\n".join([*lines, "tags: [rlt2i, reinforcement-learning]"]) + "\n---\n"

    def _curve(self) -> str:
        lines: Sequence[Mapping[str, Any]] = []
        if self.run_dir is not None and (self.run_dir / "metrics.jsonl").is_file():
            lines = [line for line in read_metrics(self.run_dir, "eval") if line["step"] <= self.iteration]
        shown = ("eval/reward", "eval/strict", "eval/strict_gain", "eval/reward_gain")
        names = [name for name in shown if any(name in line for line in lines)]
        if not names:
            return ""
        rows = [
            f"| {line['step']} | " + " | ".join(f"{line[name]:.4f}" if name in line else "" for name in names) + " |"
            for line in lines
        ]
        head = "| iteration | " + " | ".join(name.removeprefix("eval/").replace("_", " ") for name in names) + " |"
        return "\n".join(["## Evaluations on held-out prompts\n", head, "|---" * (len(names) + 1) + "|", *rows, ""])


def write_card(folder: Path, card: Card) -> None:
    """README.md of an export."""
    (folder / CARD).write_text(card.text(), encoding="utf-8")


def write_card_of_checkpoint(folder: Path, recipe: Recipe, policy: Policy, *, iteration: int, run_dir: Path) -> None:
    """README.md of what a checkpoint exports, whichever form that has; nothing for a policy that is no pipeline.

    A card that cannot be written is said and costs no checkpoint.
    """
    inner = policy.policy if isinstance(policy, Guided) else policy
    if not isinstance(inner, PretrainedPolicy):
        return
    whole = (folder / "model_index.json").is_file()
    form: Form = "adapter" if inner.spec.lora_rank is not None else "pipeline" if whole else "network"
    try:
        write_card(folder, Card(recipe=recipe, policy=inner, form=form, iteration=iteration, run_dir=run_dir))
    except OSError:
        raise  # the disk is full, or gone: the checkpoint is not whole
    except Exception as error:
        _LOG.warning("no model card beside the export: %s: %s", type(error).__name__, error)
