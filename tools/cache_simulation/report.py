"""Results of replays as text.

Owns: the table of ``tools/simulate_cache.py``. Must never: compute a figure that ``Measurements`` does not report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.cache_simulation.measurements import HIT_KINDS, Measurements


def table(results: Sequence[tuple[str, Measurements]]) -> str:
    """One column a policy, one row a figure."""
    columns = [_figures(measured) for _, measured in results]
    names = list(dict.fromkeys(name for column in columns for name in column))
    cells = [["", *names]]
    for (policy, _), column in zip(results, columns, strict=True):
        cells.append([policy, *(column.get(name, "") for name in names)])
    widths = [max(map(len, column)) for column in cells]
    lines = []
    for first, *others in zip(*cells, strict=True):
        row = "".join(f"  {cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        lines.append(f"{first:<{widths[0]}}{row}".rstrip())
    return "\n".join(lines)


def _figures(measured: Measurements) -> Mapping[str, str]:
    values = measured.to_json()
    prompt, hit = measured.prompt_tokens, measured.prefix_hit_tokens
    ttfts = [values[f"ttft_{which}_s"] for which in ("p50", "p99", "mean")]
    figures = {
        "requests finished": f"{measured.finished} of {measured.requests}",
        "steps to drain": f"{measured.steps}",
        "virtual seconds": f"{measured.virtual_s:.1f}",
        "running, mean (peak)": f"{values['mean_running']:.1f} ({measured.peak_running})",
        "preemptions": f"{measured.preemptions}",
        "prompt tokens": f"{prompt}",
        "  reused": f"{hit} ({measured.hit_rate:.3f})",
        "  computed": f"{prompt - hit}",
        "  of them rebuilt": f"{measured.rebuilt_tokens}",
        "tokens computed again": f"{measured.recomputed_tokens}",
        "hits, " + " / ".join(HIT_KINDS): " / ".join(str(measured.hits[kind]) for kind in HIT_KINDS),
        "TTFT p50 / p99 / mean, s": " / ".join(f"{seconds:.2f}" for seconds in ttfts),
        "blocks released early": f"{measured.released_early_blocks}",
        "slabs moved": f"{measured.slabs_moved}",
        "bytes copied": f"{measured.copied_bytes}",
        "host us a scheduled request": f"{values['host_us_per_scheduled_request']:.2f}",
    }
    for name, pool in measured.pools.items():
        figures[f"{name} blocks held, peak (owned at the end)"] = f"{pool['peak_used_blocks']} ({pool['num_blocks']})"
    return figures
