"""What every backbone with a diffusers pipeline shares; a backbone writes only what is its own.

A backbone is two small classes. The spec says which pipeline it is and how its adapter is called:

    @attrs.frozen(kw_only=True)
    class Mine(PretrainedSpec):
        pipeline, policy = "MinePipeline", MinePolicy
        targets: ClassVar = ("attn.to_q", ...)

and the policy says where its blocks are (`blocks`), its schedule (`sigmas`), its text (`encode_text`), what its
network predicts (`predict`), and where image and words are among the tokens (`order`, or `where`).
"""

from pathlib import Path

from rlt2i.policies.pretrained.policy import PretrainedPolicy
from rlt2i.policies.pretrained.spec import PretrainedSpec
from rlt2i.policies.pretrained.text import in_template

DATA = Path(__file__).resolve().parents[1] / "data"
"""Configurations of published pipelines, so that their cost is known without a download."""

__all__ = ["DATA", "PretrainedPolicy", "PretrainedSpec", "in_template"]
