"""The one place for the version: setup.py and dafl_fast.__version__ read it here."""

__version__ = "0.1.0"
