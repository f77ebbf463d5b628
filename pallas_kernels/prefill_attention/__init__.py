"""Attention of rows with more than one query, over the pool and, where a window slides, the step's own keys."""
