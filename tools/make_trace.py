"""Writes a seeded request trace, for tools/simulate_cache.py to replay.

    python tools/make_trace.py chat --seed 7 --output chat7.jsonl

    chat         conversations of several turns on shared system prompts; users think for 10 s on average
    docqa        short questions to documents of 16k to 64k tokens, popular documents more often
    mixed        requests that share nothing, one in ten of 8k to 64k tokens, the others short
    longctx      prompts of 8k to 128k tokens, all at once
    sharegpt     short requests, all at once
    alternating  chat and docqa by turns

The same seed gives the same trace; traces of different seeds share no token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.cache_simulation.generators import GENERATORS  # noqa: E402


def main() -> None:
    """Generates and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=GENERATORS)
    parser.add_argument("--seed", type=int, default=0, help="at least 0 (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: stdout")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    requests = GENERATORS[args.kind](args.seed)
    text = "".join(request.to_json() + "\n" for request in requests)
    if args.output is None:
        sys.stdout.write(text)
        return
    try:
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: {args.output}: cannot be written ({error.strerror})\n")
    tokens = sum(request.prompt_len for request in requests)
    print(f"{args.output}: {len(requests)} requests, {tokens} prompt tokens", file=sys.stderr)


if __name__ == "__main__":
    main()
