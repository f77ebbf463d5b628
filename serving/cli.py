"""The command `hkv-jax`.

Owns: the exit codes (0, 1 unexpected, 2 configuration, environment, checkpoint or request, 130 Ctrl-C), and that an
error is one line on stderr. Must never: import jax or grpc before a command runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from hkv_jax import __version__
from hkv_jax.errors import CheckpointError, ConfigError, HkvError, RequestError
from serving.commands import chat, generate, serve
from serving.commands.terminal import Commands, say, start_logging

logger = logging.getLogger(__name__)

EXIT_UNEXPECTED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_EPILOG = """\
start with:
  hkv-jax chat --message "The key of Ada's box is 4713. What is the key of Ada's box?"    ask the bundled demo model
  hkv-jax chat --model models/smollm2-135m                talk to a model
  hkv-jax serve --port 50051                              serve it over gRPC (hkv.v1.Inference)
  hkv-jax COMMAND --help                                  all flags of a command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; argparse itself exits for --help and for flags it refuses."""
    _be_utf8(sys.stdout)
    args = _parser().parse_args(arguments)
    start_logging(verbose=args.verbose, quiet=args.quiet)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except (ConfigError, CheckpointError, RequestError) as error:
        return _failed(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return _failed("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has left; the interpreter must not try to flush it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except HkvError as error:
        return _failed(str(error), EXIT_UNEXPECTED)
    except Exception as error:  # the edge: people get a line, those who want more ask for it
        hint = "" if args.verbose else " (--verbose shows where)"
        return _failed(f"unexpected {type(error).__name__}: {error}{hint}", EXIT_UNEXPECTED)
    return code


def _failed(message: str, code: int) -> int:
    logger.debug("exit code %d", code, exc_info=True)
    say(f"hkv-jax: {' '.join(message.split())}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hkv-jax",
        description="Run language models that mix global and sliding-window attention, with a KV cache of two pools.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = Commands(parser)
    for command in (generate, chat, serve):
        command.add_parser(commands)
    return parser


class _Version(argparse.Action):
    """Prints the versions that matter in a report of a problem, without importing anything."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        python = ".".join(map(str, sys.version_info[:3]))
        print(f"hkv-jax {__version__} (jax {importlib.metadata.version('jax')}, Python {python})")
        parser.exit()


def _be_utf8(stream: TextIO) -> None:
    """Completions are text in any script, whatever the locale says."""
    reconfigure = getattr(stream, "reconfigure", None)  # a stream that replaces stdout need not have it
    if reconfigure is not None:
        reconfigure(encoding="utf-8")
