"""Pipelines of a few thousand random weights, in diffusers' own classes: what tests and rehearsals run on.

    folder = save_tiny("FluxPipeline", Path("tiny-flux"))
    Flux(path=str(folder)).load()

Everything but the size is real: classes, layers, files, tokenizers. A pipeline is named by its class in diffusers.
"""

from rlt2i.policies.tiny.pipelines import TINY, save_tiny

__all__ = ["TINY", "save_tiny"]
