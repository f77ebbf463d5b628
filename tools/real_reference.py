"""What transformers generates greedily, in float32 on the CPU. Runs where torch and transformers are installed.

    python tools/real_reference.py MODEL_FOLDER PROMPTS.json RESULT.json

PROMPTS.json: {"new_tokens": N, "prompts": [[id, ...], ...]}. RESULT.json: for each prompt the tokens, the logprob of
each, and by how much its logit led the second; ends of sequence do not stop it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


@torch.no_grad()
def continued(model: Any, prompt: list[int], new_tokens: int) -> dict[str, list[Any]]:
    """The greedy continuation of one prompt, with transformers' own cache."""
    given = torch.tensor([prompt])
    cache = None
    tokens: list[int] = []
    logprobs: list[float] = []
    margins: list[float] = []
    for _ in range(new_tokens):
        output = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits = output.logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        token = int(logits.argmax())
        tokens.append(token)
        logprobs.append(float(torch.log_softmax(logits, -1)[token]))
        margins.append(first - second)
        given = torch.tensor([[token]])
    return {"tokens": tokens, "logprobs": logprobs, "margins": margins}


def main() -> int:
    """Read the prompts, continue each, write the result."""
    folder, prompts_path, result_path = map(Path, sys.argv[1:])
    asked = json.loads(prompts_path.read_text(encoding="utf-8"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    results = []
    for prompt in asked["prompts"]:
        results.append(continued(model.eval(), prompt, asked["new_tokens"]))
        print(f"{folder.name}: transformers, prompt of {len(prompt)}: done", file=sys.stderr, flush=True)
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    unfinished = result_path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**asked, "versions": versions, "results": results}), encoding="utf-8")
    unfinished.replace(result_path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
