"""What random traffic needs of the machinery under it."""

from __future__ import annotations

import pytest

from hkv_jax.engine import prefill
from hkv_jax.kvcache import room


@pytest.fixture
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances that are small beside real prompts are small beside these too.

    Nobody is expected to draw many tokens, so that pools overflow and sequences must give way; and only the last blocks
    of a prompt are worth joining.
    """
    monkeypatch.setattr(room, "GROWTH_TOKENS", 0)
    monkeypatch.setattr(prefill, "BEFORE_END_TOKENS", 8)
