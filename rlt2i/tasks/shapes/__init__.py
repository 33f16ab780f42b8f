"""An embedded world of coloured shapes: prompts, a renderer, an exact verifier, and a tiny SD3 pipeline.

It is a laboratory: small enough for a laptop CPU, exact enough that every claim about it can be checked.
Nothing measured here says anything about a large model.
"""
