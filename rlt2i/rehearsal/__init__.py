"""Rehearsals: a recipe as it is, with its own settings, on a tiny model of the same classes.

What has not been rehearsed has never run: a dtype, an adapter or a map that breaks at the first checkpoint is found
here in seconds, without a GPU and without any download.
"""
