"""The exceptions hkv-jax raises on purpose.

```
HkvError
├── ConfigError           model, mesh, environment or file is wrong      exit 2 at start
├── CheckpointError       missing, misshapen or truncated parameter      exit 2 at start
├── RequestError          this request can never be served               INVALID_ARGUMENT
├── OverloadedError       the queue is full; a retry may succeed         RESOURCE_EXHAUSTED
├── EngineStoppedError    the engine thread has ended                    UNAVAILABLE
└── InternalError         a defect, or a failing device                  INTERNAL
```

A shortage of blocks is a return value, never an exception; misuse of an internal interface is a plain Python
exception; a broken invariant is an ``AssertionError``. Messages name the field, the value, the limit and the remedy;
they never contain prompt text or token ids.
"""


class HkvError(Exception):
    """Base of every error hkv-jax raises on purpose."""


class ConfigError(HkvError):
    """The model, the mesh, the environment or a configuration file is wrong; nothing was started."""


class CheckpointError(HkvError):
    """A checkpoint lacks a tensor, or holds one that is misshapen, unexpected or truncated."""


class RequestError(HkvError):
    """A request that could never be served, however long it waited."""


class OverloadedError(HkvError):
    """The queue is full; the same request may succeed later."""


class EngineStoppedError(HkvError):
    """The engine thread has ended; no request can be served by it any more."""


class InternalError(HkvError):
    """A request was given up because of a defect or a failing device; the log has the details under ``error_id``.

    A client learns the id, never the cause: that may hold what is none of its business.
    """

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}")
        self.error_id = error_id
