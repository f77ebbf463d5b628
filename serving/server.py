"""The gRPC server: one port with inference, health and reflection.

Owns: the settings of the transport, and what a client can see of start and end. Must never: know signals or files.
"""

from __future__ import annotations

import logging

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hkv_jax.engine.loop import EngineLoop
from hkv_jax.errors import ConfigError
from serving.proto import hkv_inference_pb2 as pb
from serving.proto import hkv_inference_pb2_grpc as pb_grpc
from serving.server_options import ServerOptions
from serving.servicer import InferenceServicer

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name

_TRANSPORT = {
    # Two servers on one port would share it silently.
    "grpc.so_reuseport": 0,
    # A prompt of a million tokens; an answer has no limit but the client's own.
    "grpc.max_receive_message_length": 16 * 2**20,
    "grpc.max_send_message_length": -1,
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,
    # Gateways ping every 30 s; below the default minimum of five minutes they would be sent away.
    "grpc.http2.min_recv_ping_interval_without_data_ms": 10_000,
}
_LAST_WORDS_SECONDS = 0.5


class InferenceServer:
    """Listens from ``start`` on, serves from ``serve`` on, and takes its leave in ``stop``.

    Health is ``NOT_SERVING`` but between the last two, so that nobody sends requests to a server that warms up.
    """

    def __init__(self, options: ServerOptions) -> None:
        """To be made inside a running event loop."""
        self._options = options
        self._servicer = InferenceServicer()
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=list(_TRANSPORT.items()))
        pb_grpc.add_InferenceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> str:
        """Opens the port and returns the address, ``host:port``.

        Raises:
            ConfigError: the port cannot be opened.
        """
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        try:
            port = self._server.add_insecure_port(f"{host}:{self._options.port}")
        except RuntimeError as error:
            raise ConfigError(
                f"host {host}, port {self._options.port} cannot be listened on (is it in use?); choose another --port, "
                f"or 0 for any that is free"
            ) from error
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        return f"{host}:{port}"

    async def serve(self, model: str, engine: EngineLoop) -> None:
        """Takes requests from now on."""
        self._servicer.attach(model, engine)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Takes no new requests, lets living ones end within ``drain_seconds``, ends the others, closes the port."""
        self._servicer.detach()
        await self._health.enter_graceful_shutdown()
        if not await self._servicer.drain(self._options.drain_seconds):
            logger.warning("requests still lived after %d s; they are cut off", self._options.drain_seconds)
        # Who watches the health never hangs up, so this is no time to wait for everybody.
        await self._server.stop(_LAST_WORDS_SECONDS)

    async def cut_off(self) -> None:
        """Ends every call now; a ``stop`` that is waiting for them goes on."""
        await self._server.stop(None)

    async def _set_health(self, status: int) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)
