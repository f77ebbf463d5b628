"""`hkv-jax chat`: a conversation in the terminal, without a server.

Owns: the history, and what is typed. On stdout there is nothing but answers (and the prompt sign, in a terminal).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from hkv_jax.errors import RequestError
from serving.commands.option_flags import add_engine_flags, given_engine_options
from serving.commands.sampling_flags import add_sampling_flags, sampling_params
from serving.commands.terminal import Commands, say, show_layout, start_progress

if TYPE_CHECKING:
    from hkv_jax import LLM
    from hkv_jax.sampling_params import SamplingParams

_EPILOG = """\
examples:
  hkv-jax chat --model models/smollm2-135m
  hkv-jax chat --model models/smollm2-135m --message "What is the capital of France?" --temperature 0
  git diff | hkv-jax chat --model models/smollm2-135m --system "Write a commit message." --max-tokens 60

With --message, or when stdin is not a terminal, it answers and ends. Otherwise it is a conversation: Ctrl-C stops an
answer, /reset begins anew, /exit or Ctrl-D ends. The model needs a chat template. A conversation is one sequence, so
that --max-num-seqs is 1 unless it is given: programs for more need not be compiled.
"""


class Conversation:
    """The messages so far; the model sees all of them every time."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        """A conversation that begins with the message of the ``system``, if there is one."""
        self._llm = llm
        self._params = params
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._beginning)

    def reset(self) -> None:
        """Forgets everything but the beginning."""
        self._messages = list(self._beginning)

    def ask(self, text: str) -> None:
        """Prints the answer as it comes. What was printed is remembered, even if Ctrl-C cut it short.

        Raises:
            RequestError: the conversation has become too long, or the template refuses it; ``text`` is forgotten.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        prompt = self._llm.tokenizer.encode_chat(messages)
        with contextlib.closing(self._llm.stream(prompt, self._params)) as deltas:
            try:
                for delta in deltas:
                    pieces.append(delta.completion.text)
                    print(pieces[-1], end="", flush=True)
            finally:
                print(flush=True)
                if pieces:
                    self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def add_parser(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = commands.add("chat", "talk to a model in the terminal", _EPILOG)
    parser.add_argument(
        "--message",
        dest="messages",
        action="append",
        metavar="TEXT",
        help="ask this and end; repeatable, each after the answer to the one before",
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions the conversation begins with")
    add_sampling_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run, quiet=True)


def run(args: argparse.Namespace) -> int:
    """Talks; returns the exit code."""
    params = sampling_params(args)
    if params.n != 1 or not params.detokenize:
        raise RequestError("a conversation has one answer, as text; leave --n and --no-detokenize out")
    messages = args.messages
    if messages is None and not sys.stdin.isatty():
        messages = [sys.stdin.read().strip()]
        if not messages[0]:
            raise RequestError("stdin is empty; pipe a message, or give --message TEXT")
    elif messages is not None and not all(message.strip() for message in messages):
        raise RequestError("--message is empty; say what to ask")
    from hkv_jax import LLM

    with LLM(progress=start_progress(), **{"max_num_seqs": 1, **given_engine_options(args)}) as llm:
        # Said before the first question is typed: a base model cannot do this.
        llm.tokenizer.render_chat([{"role": "user", "content": "."}])
        show_layout(llm.layout)
        conversation = Conversation(llm, params, args.system)
        if messages is None:
            _talk(conversation)
        else:
            for message in messages:
                conversation.ask(message)
    return 0


def _talk(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited once it is loaded)
    say("/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            raise
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            say("(forgotten)")
        elif text.startswith("/"):
            say("commands are /reset and /exit")
        elif text:
            _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    try:
        conversation.ask(text)
    except KeyboardInterrupt:
        say("(stopped)")
    except RequestError as error:
        say(f"{error} (/reset begins anew)")
