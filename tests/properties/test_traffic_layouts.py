"""The same random traffic over other layers and blocks."""

from __future__ import annotations

import pytest

from tests.properties.prefix_traffic_cases import LAYOUTS, run_ten_thousand_steps

pytestmark = pytest.mark.usefixtures("short_prompts")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_ten_thousand_steps(name: str) -> None:
    run_ten_thousand_steps(name)
