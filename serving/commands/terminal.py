"""What the commands share in talking to people: how a command is declared, and what goes to stderr.

Owns: stderr. Must never: write to stdout, or import jax.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hkv_jax.kvcache.layout import KVLayout

_SECONDS_BETWEEN_LINES = 1.0


class Commands:
    """The subcommands of a parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(self, name: str, purpose: str, epilog: str) -> argparse.ArgumentParser:
        """A new command; ``epilog`` is shown as it is, below its flags."""
        parser = self._subparsers.add_parser(
            name,
            usage=f"hkv-jax {name} [OPTIONS]",
            help=purpose,
            description=purpose[0].upper() + purpose[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--verbose", action="store_true", help="log more to stderr, tracebacks included")
        return parser


def say(text: str) -> None:
    """Tells the user something that is no result."""
    print(text, file=sys.stderr, flush=True)


def start_logging(*, verbose: bool, quiet: bool) -> None:
    """Sends the log to stderr: everything when ``verbose``, only warnings when ``quiet``."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    for package in ("hkv_jax", "serving"):
        logging.getLogger(package).setLevel(level)


def show_layout(layout: KVLayout) -> None:
    """Tells how the KV memory is split: a line for each pool, and how many sequences that is."""
    say(f"KV cache: {layout.total_bytes / 2**20:.1f} MiB per device, {layout.partition} split")
    rows = [["pool", "blocks", "block size", "tokens", "bytes", "MiB"]]
    for row, block_size in zip(layout.describe(), layout.block_sizes, strict=True):
        counts = (row.num_blocks, block_size, row.num_tokens, row.num_bytes)
        rows.append([row.name, *map(str, counts), f"{row.mebibytes:.1f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *numbers in rows:
        columns = "  ".join(f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        say(f"  {name:<{widths[0]}}  {columns}")
    count, length = layout.max_num_sequences_of_expected, layout.expected_seq_length
    say(f"  fits {count} sequences of {length} tokens; one sequence has at most {layout.max_model_len}")


class ProgressLine:
    """Says what a long start is doing: in a terminal a line that changes, else a line now and then."""

    def __init__(self) -> None:
        self._changes = sys.stderr.isatty()
        self._last = -math.inf

    def __call__(self, what: str, num_done: int, total: int) -> None:
        """``num_done`` of ``total`` things are done, ``what`` being the last."""
        text = f"{what} ({num_done}/{total})"
        if self._changes:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif num_done == total or time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            say(text)

    def end(self) -> None:
        """Clears the line that changes."""
        if self._changes:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def start_progress() -> ProgressLine | None:
    """What tells of the start where no bar can be drawn: a log without a line looks like a hang."""
    return None if sys.stderr.isatty() else ProgressLine()
