"""Where host and device meet: requests become plans, plans become batches, batches become tokens."""
