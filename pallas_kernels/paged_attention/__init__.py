"""Attention over any number of pages, a tile of them at a time."""
