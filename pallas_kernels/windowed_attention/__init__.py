"""Sliding-window attention over short tables of pages."""
