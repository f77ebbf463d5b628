"""Writes of new keys and values into blocks of the pool, for rows of more than one token."""
