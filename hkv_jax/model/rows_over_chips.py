"""Work on whole rows of the vocabulary, each chip taking some of the rows.

The product with the vocabulary leaves every chip a part of each row; what is done next (drawing, the most likely
tokens) needs whole rows, and none of them needs another. So they change hands once, all to all: every chip then holds
its share of the rows and works on them as one chip alone would.

Owns: that exchange. Must never: know what is done with the rows.

Axis letters: S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from hkv_jax.array_types import Logits
from hkv_jax.sharding import OVER_CHIPS, REPLICATED, named, vocabulary_partition

Result = TypeVar("Result")


def over_vocabulary(logits: Logits, mesh: Mesh) -> Logits:
    """Logits [S, V] as the product leaves them: said aloud, or the partitioner gathers the weights on every chip."""
    return lax.with_sharding_constraint(logits, named(mesh, vocabulary_partition(logits.shape[1], mesh)))


def by_rows(mesh: Mesh, function: Callable[..., Result], *arrays: Any) -> Result:
    """``function(*arrays)``, each chip computing a share of the rows.

    Args:
        mesh: the chips.
        function: of arrays with leading axis S to arrays with leading axis S; a row of its results may depend on no
            other row. It sees rows of zeros beside the true ones where the chips do not divide S.
        arrays: trees of arrays [S, ...].

    Returns:
        what ``function`` returns, the same on every chip.
    """
    num_rows = jax.tree.leaves(arrays)[0].shape[0]
    spare = -num_rows % mesh.size
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, spare), *((0, 0) for _ in x.shape[1:]))), arrays)
    # Whichever branch a chip takes inside: nothing there waits for another chip.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=OVER_CHIPS, out_specs=OVER_CHIPS, check_vma=False)
    replicated = named(mesh, REPLICATED)
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, replicated)[:num_rows], mapped(*padded))
