"""`hkv-jax generate`: prompts in, completions out, no server.

Owns: the form of its output. On stdout there is nothing but completions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hkv_jax.errors import RequestError
from serving.commands.option_flags import add_engine_flags, given_engine_options
from serving.commands.sampling_flags import add_sampling_flags, sampling_params, token_ids
from serving.commands.terminal import Commands, show_layout, start_progress

if TYPE_CHECKING:
    from hkv_jax import LLM
    from hkv_jax.outputs import Completion, RequestOutput, TokenLogprob
    from hkv_jax.sampling_params import SamplingParams

_EPILOG = """\
examples:
  hkv-jax generate --prompt "The capital of France is" --max-tokens 8 --temperature 0
  hkv-jax generate --model models/gemma-3-270m --prompt "Once" --prompt "Twice" --json
  hkv-jax generate --prompt-token-ids 2,651,5134 --max-tokens 16 --logprobs 3 --json

Prompts run together, whatever their form; answers come in the order of the prompts. One prompt is shown as it is
generated. With --json each completion is one object on a line:
  {"index": 0, "sample": 0, "text": ..., "token_ids": [...], "logprobs": null, "finish_reason": "stop", ...}
"""


def add_parser(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = commands.add("generate", "continue prompts and print the completions", _EPILOG)
    parser.add_argument(
        "--prompt", dest="prompts", action="append", metavar="TEXT", help="text to continue; repeatable"
    )
    parser.add_argument(
        "--prompt-token-ids",
        dest="prompts",
        action="append",
        type=token_ids,
        metavar="ID,ID",
        help="token ids to continue; repeatable, also together with --prompt",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a completion")
    add_sampling_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run, quiet=True)


def run(args: argparse.Namespace) -> int:
    """Generates and prints; returns the exit code."""
    if not args.prompts:
        raise RequestError("nothing to continue: give --prompt TEXT or --prompt-token-ids 1,2,3")
    params = sampling_params(args)
    from hkv_jax import LLM

    with LLM(progress=start_progress(), **given_engine_options(args)) as llm:
        show_layout(llm.layout)
        if args.json:
            for line in json_lines(llm.generate(args.prompts, params)):
                print(line)
        elif len(args.prompts) == 1 and params.n == 1:
            _print_as_it_comes(llm, args.prompts[0], params)
        else:
            _print_all(llm, args.prompts, params)
    return 0


def json_lines(outputs: list[RequestOutput]) -> list[str]:
    """One JSON object a completion: by prompt, then by sample."""
    return [
        json.dumps(_as_json(index, output, completion), ensure_ascii=False)
        for index, output in enumerate(outputs)
        for completion in output.outputs
    ]


def _as_json(index: int, output: RequestOutput, completion: Completion) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "index": index,
        "sample": completion.sample,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "logprobs": _logprobs(completion.logprobs),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "usage": dataclasses.asdict(output.usage),
    }
    if output.prompt_logprobs is not None:
        shown["prompt_logprobs"] = _logprobs(output.prompt_logprobs)
    return shown


def _logprobs(entries: tuple[TokenLogprob, ...] | None) -> list[dict[str, Any]] | None:
    if entries is None:
        return None
    return [
        {
            "token_id": entry.token_id,
            "logprob": entry.logprob,
            "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in entry.top],
        }
        for entry in entries
    ]


def _print_as_it_comes(llm: LLM, prompt: str | list[int], params: SamplingParams) -> None:
    show = _shown_as(llm, params)
    for delta in llm.stream(prompt, params):
        print(show(delta.completion), end="", flush=True)
    print()


def _print_all(llm: LLM, prompts: list[str | list[int]], params: SamplingParams) -> None:
    show = _shown_as(llm, params)
    for index, output in enumerate(llm.generate(prompts, params)):
        for completion in output.outputs:
            print(f"--- prompt {index}, sample {completion.sample} ({completion.finish_reason})")
            print(show(completion))


def _shown_as(llm: LLM, params: SamplingParams) -> Callable[[Completion], str]:
    """How a completion, or a piece of one, is shown: its text, or without text its ids."""
    if llm.loop.model.resolve(params).detokenize:
        return lambda completion: completion.text
    return lambda completion: "".join(f"{token_id} " for token_id in completion.token_ids)
