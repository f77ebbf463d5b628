"""What is left of recall through the paged engine under each damage.

Owns: the list of damages to the engine. Must never: judge them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hkv_jax.families import read_model_spec
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.spec import ModelSpec
from hkv_jax.testing.probe import ProbeOptions
from tools.demo_training import damage
from tools.demo_training.damage import SpecChanges
from tools.demo_training.evaluation import Score
from tools.demo_training.paged import PagedRun, answer, num_right
from tools.demo_training.question_set import recall_questions
from tools.demo_training.questions import Question

CHUNK = 128
BLOCK_SIZE = 16
LENGTH = 1024
WRONG_ENTRY, EARLY_RELEASE = "one wrong block-table entry", "a sliding block released one step too early"


def options(folder: Path, changes: SpecChanges = ()) -> ProbeOptions:
    """The probe of all runs; ``changes`` make another of it."""
    return ProbeOptions(
        folder,
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        max_num_batched_tokens=CHUNK,
        max_model_len=LENGTH + 64,
        spec_changes=changes,
    )


def questions() -> list[Question]:
    """What the recall test asks, too."""
    return recall_questions(LENGTH, num_facts=12, num_copies=4)


def spec_damages(spec: ModelSpec) -> dict[str, SpecChanges]:
    """Damage to the description of the model."""
    width = next(layer.window for layer in spec.layers if layer.window is not None)
    global_layers = [index for index, layer in enumerate(spec.layers) if layer.window is None]
    changes = {f"window {size}": damage.window(spec, size) for size in (4, width // 2, width - 1, width + 1)}
    changes |= {f"global layer {layer} windowed": damage.windowed_global(spec, layer) for layer in global_layers}
    return changes | {"RoPE swapped": damage.swapped_rope(spec)}


def cache_damages() -> dict[str, Callable[[CacheManager, Sequence[Question]], None]]:
    """Damage to the cache of a run: of one question for the wrong entry, of several together for the early release."""
    return {
        WRONG_ENTRY: lambda cache, asked: damage.wrong_table_entry(cache, asked[0].told_at // BLOCK_SIZE),
        EARLY_RELEASE: lambda cache, asked: damage.early_release(cache, BLOCK_SIZE),
    }


def damaged_run(folder: Path, name: str) -> PagedRun:
    """The run of one of ``cache_damages``.

    A wrong entry is aimed at the fact that is asked for: one question at a time. A release is early by a step of one
    block, in pools so small that the block has a new owner at once.
    """
    if name == WRONG_ENTRY:
        return PagedRun(options(folder), CHUNK, together=False, damage=cache_damages()[name])
    return PagedRun(options(folder), BLOCK_SIZE, crowded=True, damage=cache_damages()[name])


def damage_scores(folder: Path) -> dict[str, Score]:
    """Right answers under each damage, the whole model first as "none"."""
    asked = questions()
    runs = {"none": PagedRun(options(folder), CHUNK)} | {name: damaged_run(folder, name) for name in cache_damages()}
    for name, changes in spec_damages(read_model_spec(folder)).items():
        runs[name] = PagedRun(options(folder, changes), CHUNK)
    return {name: Score(num_right(answer(run, asked).tokens, asked), len(asked)) for name, run in runs.items()}
