"""A second embedded world: a grid of cells with independent contents, of which the prompt names one or two.

Only what is named is judged, so the judged area is known, exactly and before the first step of sampling.
"""
