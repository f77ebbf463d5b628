"""The Python face: a model in a variable, for scripts and notebooks.

Owns: prompts of every form, progress bars, Ctrl-C. Must never: need an event loop, or stand in the way of one (it is
threads only), or import jax before a model is opened.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import operator
import os
import queue
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from hkv_jax.config import DEMO_MODEL, EngineConfig
from hkv_jax.engine.loop import EngineLoop
from hkv_jax.engine.open_model import EngineFactory, OpenModel, Progress, open_model
from hkv_jax.engine.outbox import RequestStream
from hkv_jax.engine.stats import EngineStats
from hkv_jax.engine.stats_plot import plot_history
from hkv_jax.errors import RequestError
from hkv_jax.outputs import RequestOutput, StreamDelta
from hkv_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from hkv_jax.kvcache.layout import KVLayout
    from hkv_jax.spec import ModelSpec
    from hkv_jax.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""

Message = Mapping[str, Any]
"""One message of a conversation: ``role`` and ``content``."""

_REFRESH_SECONDS = 0.2


class LLM:
    """A model that is loaded and ready.

    ```
    with LLM("models/gemma-3-270m", max_model_len=4096) as llm:
        outputs = llm.generate("The capital of France is", SamplingParams(max_tokens=8, temperature=0))
        print(outputs[0].outputs[0].text)
    ```

    Every method may be called from any thread, and in a notebook's running event loop. Ctrl-C aborts the requests of
    the call it interrupts; the model stays usable. It is closed at the latest when the object is garbage.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        progress: bool | Progress | None = None,
        engine_factory: EngineFactory | None = None,
        **options: Any,
    ) -> None:
        """Opens the model in a folder: loads, compiles, warms up.

        Args:
            model: a checkpoint folder; the bundled demo model when left out, or when it is ``"demo"``.
            progress: show bars on stderr; when left out, if stderr is a terminal or a notebook. A function is told
                instead what was made ready, how many things are, and how many there are to be.
            engine_factory: makes the engine; the real one when left out, a fake in tests.
            options: fields of ``EngineConfig``: ``max_model_len``, ``kv_cache_memory``, ...

        Raises:
            ConfigError: an option, the environment or a file of the model is wrong.
            CheckpointError: the checkpoint is incomplete or broken.
        """
        config = EngineConfig.from_options({"model": model, **options})
        with _warm_up_bar(progress) as bar:
            self._model: OpenModel = open_model(config, progress=bar, engine_factory=engine_factory)
        self._progress = None if callable(progress) else progress
        # At the end of the program the threads must end before jax does: what is registered last runs first. Finalizers
        # run as if registered with the first of them, which may be before jax.
        atexit.register(self._model.loop.close)
        self._finalizer = weakref.finalize(self, _close, self._model.loop)
        self._finalizer.atexit = False

    @classmethod
    def demo(cls, **options: Any) -> Self:
        """Opens the bundled model, which answers questions about facts in a long text; ``options`` as the constructor.

        Raises:
            ConfigError: as the constructor.
        """
        return cls(DEMO_MODEL, **options)

    @property
    def config(self) -> EngineConfig:
        """What it was opened with."""
        return self._model.config

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        return self._model.spec

    @property
    def layout(self) -> KVLayout:
        """How the KV memory is split among the attention groups."""
        return self._model.layout

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._model.tokenizer

    @property
    def loop(self) -> EngineLoop:
        """The thread that runs the engine."""
        return self._model.loop

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt; all run together.

        Args:
            prompts: one prompt or several; each is text or a list of token ids.
            params: for all prompts, or one for each; unset fields take the model's values.
            progress: show a bar on stderr; when left out, as the constructor was told.

        Returns:
            One output a prompt, in their order.

        Raises:
            RequestError: a prompt or its parameters can never be served; none is run then.
            InternalError: a request was given up because of a defect; the log has its id.
            EngineStoppedError: the model was closed.
        """
        batch = _as_batch(prompts)
        streams: list[RequestStream] = []
        num_tokens_before = self.stats().num_output_tokens
        try:
            for index, (prompt, of_prompt) in enumerate(zip(batch, _params_of(params, len(batch)), strict=True)):
                with _naming_the_prompt(index, len(batch)):
                    streams.append(self.loop.submit(self._token_ids(prompt), of_prompt))
            console = _console(self._progress if progress is None else progress)
            _wait(streams, console, lambda: self.stats().num_output_tokens - num_tokens_before)
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.abort()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamDelta, None, None]:
        """Continues one prompt and gives what is new as it comes; the request starts with the first ``next``.

        Leaving the iteration aborts the request. Who iterates slowly gets fewer, larger deltas.

        Raises:
            RequestError, InternalError, EngineStoppedError: as ``generate``, while iterating.
        """
        stream = self.loop.submit(self._token_ids(prompt), params)
        try:
            yield from stream
        finally:
            stream.abort()

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **variables: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or several, by the model's own chat template.

        Args:
            messages: mappings with ``role`` and ``content``; or a list of such lists.
            params: as ``generate``.
            progress: as ``generate``.
            variables: further names for the template.

        Returns:
            One output a conversation.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages; and as ``generate``.
            InternalError, EngineStoppedError: as ``generate``.
        """
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [self.tokenizer.encode_chat(conversation, **variables) for conversation in conversations]
        return self.generate(prompts, params, progress=progress)

    def default_sampling_params(self, **fields: Any) -> SamplingParams:
        """The parameters a request with these ``fields`` runs with: the others have the model's values.

        Raises:
            RequestError: a value is out of range.
        """
        return self.loop.model.resolve(SamplingParams(**fields))

    def stats(self) -> EngineStats:
        """What the engine has done, and how full each pool is and has been."""
        return self.loop.stats()

    def plot(self) -> Figure:
        """Draws what the KV cache held since the model was opened, and how prompts were served; no request need live.

        In a notebook, as a cell's last line, it shows the figure; elsewhere: ``llm.plot().savefig("cache.png")``.

        Raises:
            ConfigError: matplotlib is not installed; the ``notebook`` extra brings it.
        """
        return plot_history(self.loop.history())

    def close(self) -> None:
        """Ends the engine and frees its memory; living requests end with ``EngineStoppedError``. Twice does no harm."""
        _close(self.loop)
        self._finalizer.detach()
        gc.collect()  # device arrays may hang on reference cycles

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            return [operator.index(token_id) for token_id in prompt]
        except TypeError as error:
            raise RequestError("a prompt that is not text must be a list of token ids, which are integers") from error


def _close(loop: EngineLoop) -> None:
    loop.close()
    atexit.unregister(loop.close)


def _wait(streams: Sequence[RequestStream], console: Console | None, num_tokens: Callable[[], int]) -> None:
    """Until all have ended; what they bring is merged meanwhile. With a ``console``, a bar shows how far they are."""
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()
    for stream in streams:
        stream.set_on_end(partial(ended.put, None))
    if console is None:
        for _ in streams:
            ended.get()
    elif streams:
        _show_requests(console, ended, len(streams), num_tokens)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whatever form they came in; a list of ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes):
        raise RequestError("a prompt is text or a list of token ids, not bytes")
    batch: list[Any] = list(prompts)
    if batch and all(hasattr(item, "__index__") and not hasattr(item, "__len__") for item in batch):
        return [batch]
    return batch


def _params_of(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"params has {len(params)} entries for {num_prompts} prompts; give one for all or one for each"
        )
    return params


@contextlib.contextmanager
def _naming_the_prompt(index: int, num_prompts: int) -> Iterator[None]:
    """Says which of several prompts an error is about."""
    try:
        yield
    except RequestError as error:
        if num_prompts == 1:
            raise
        raise RequestError(f"prompts[{index}]: {error}") from error


def _console(progress: bool | None) -> Console | None:
    """Where bars go, ``None`` for nowhere."""
    if progress is False:
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if progress or console.is_terminal or console.is_jupyter else None


def _show_requests(console: Console, ended: queue.SimpleQueue[None], total: int, num_tokens: Callable[[], int]) -> None:
    """Shows a bar until ``total`` requests have ended."""
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[tokens]} tokens"),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("generating", total=total, tokens=0)
        while not bar.finished:
            with contextlib.suppress(queue.Empty):
                ended.get(timeout=_REFRESH_SECONDS)
                bar.advance(task)
            bar.update(task, tokens=num_tokens())


@contextlib.contextmanager
def _warm_up_bar(progress: bool | Progress | None) -> Iterator[Progress | None]:
    """A bar that names what was just made ready."""
    if callable(progress):
        yield progress
        return
    console = _console(progress)
    if console is None:
        yield None
        return
    from rich import progress as rich_progress

    with rich_progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task("getting ready", total=None)

        def show(done: str, num_done: int, total: int) -> None:
            bar.update(task, description=done, completed=num_done, total=total)

        yield show
