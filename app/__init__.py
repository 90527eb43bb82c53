"""Lightbox: the imaging adapter of an EHR."""

__version__ = "0.1.0"
