"""What every test here needs: a compiler for a TPU that is not there."""

from __future__ import annotations

import importlib.util

import pytest

NEEDS_LIBTPU = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="NOT CHECKED FOR TPU: libtpu, which compiles for an absent TPU, is not installed (extra `dev`)",
    ),
]
