"""The version of the code, which fingerprints, run directories and the package itself name."""

__version__ = "0.1.0"
