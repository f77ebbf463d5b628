"""What a client sees of the server itself: start, health, reflection, counts, end."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hkv_jax.engine.loop import EngineLoop, ServedModel
from hkv_jax.errors import ConfigError, EngineStoppedError
from hkv_jax.outputs import PrefixHit, Usage
from hkv_jax.testing.fake_engine import fake_engine
from hkv_jax.tokenizer import Tokenizer
from serving.client import AsyncInferenceClient
from serving.proto import hkv_inference_pb2_grpc as pb_grpc
from serving.server import SERVICE, InferenceServer
from serving.server_options import ServerOptions
from serving.testing import FOREVER, LIMITS, endless, fake_service, run


def test_metadata_comes_before_the_first_token(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it, grpc.aio.insecure_channel(it.address) as channel:
            blocker = it.client.generate_stream("the", FOREVER.replace(n=LIMITS.max_num_seqs))
            await anext(blocker)
            call = pb_grpc.InferenceStub(channel).GenerateStream(endless())
            await call.initial_metadata()
            await it.until(lambda: it.engine.stats().num_requests == 2)
            call.cancel()
            await blocker.aclose()

    run(body)


def test_health_follows_the_life_of_the_server(tokenizer: Tokenizer) -> None:
    status = health_pb2.HealthCheckResponse

    async def body() -> None:
        server = InferenceServer(ServerOptions(port=0))
        address = await server.start()
        async with grpc.aio.insecure_channel(address) as channel, AsyncInferenceClient(address) as client:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", SERVICE):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == status.NOT_SERVING
            with pytest.raises(EngineStoppedError, match="starting"):
                await client.generate("the")
            ready = asyncio.ensure_future(client.wait_ready())
            watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == status.NOT_SERVING
            assert not ready.done()
            with EngineLoop(fake_engine(LIMITS), ServedModel(tokenizer, (1,))) as engine:
                await server.serve("tiny", engine)
                assert (await watch.read()).status == status.SERVING
                await ready
                await client.generate("the", FOREVER.replace(max_tokens=1))
                # Anew: the oldest supported health service forgets a watcher when another one leaves.
                watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
                assert (await watch.read()).status == status.SERVING
                stopping = asyncio.ensure_future(server.stop())
                assert (await watch.read()).status == status.NOT_SERVING
                await stopping

    run(body)


def test_a_stopping_server_lets_the_living_end_and_takes_no_more(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it:
            stream = it.client.generate_stream("the", FOREVER.replace(max_tokens=1000))
            pieces = [await anext(stream)]
            stopping = asyncio.ensure_future(it.server.stop())
            await asyncio.sleep(0)
            with pytest.raises(EngineStoppedError):
                await it.client.generate("the", FOREVER.replace(max_tokens=1))
            pieces += [piece async for piece in stream]
            assert sum(len(piece.completion.token_ids) for piece in pieces) == 1000
            await stopping

    run(body)


async def to_the_end(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read():
        pass


def test_who_does_not_end_in_time_is_cut_off(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer, drain_seconds=0) as it, grpc.aio.insecure_channel(it.address) as channel:
            call = pb_grpc.InferenceStub(channel).GenerateStream(endless())
            await call.read()
            await it.server.stop()
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await to_the_end(call)
            assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
            await it.until(lambda: it.used_blocks == 0)

    run(body)


def test_reflection_names_the_services(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it, grpc.aio.insecure_channel(it.address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            answer = await call.read()
            names = {service.name for service in answer.list_services_response.service}
            assert {"hkv.v1.Inference", "grpc.health.v1.Health"} <= names
            await call.done_writing()
            call.cancel()

    run(body)


def test_server_info_tells_limits_and_pools(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it:
            await it.client.generate("the cat", FOREVER.replace(max_tokens=200))
            info = await it.client.server_info()
            assert (info.model, info.max_model_len, info.vocab_size) == ("tiny", 4096, 300)
            assert info.max_num_seqs == LIMITS.max_num_seqs
            pools = {pool.name: pool for pool in info.pools}
            assert pools["global"].released_early_blocks == 0
            assert pools["sliding"].released_early_blocks > 20
            assert pools["global"].peak_used_blocks > pools["sliding"].peak_used_blocks
            assert info.all_global_peak_bytes is not None
            assert info.all_global_peak_bytes > sum(pool.peak_bytes for pool in info.pools)

    run(body)


def test_a_prompt_sent_again_is_a_hit_in_usage_and_counts(tokenizer: Tokenizer) -> None:
    prompt = list(range(3, 53))
    params = FOREVER.replace(max_tokens=5)

    async def body() -> None:
        async with fake_service(tokenizer) as it:
            cold = await it.client.generate(prompt, params)
            warm = await it.client.generate(prompt, params)
            *_, last = [delta async for delta in it.client.generate_stream(prompt, params)]
            info = await it.client.server_info()
        assert cold.usage == Usage(50, 5, 0, PrefixHit.MISS, 0)
        assert warm.usage == last.usage == Usage(50, 5, 48, PrefixHit.RESIDENT, 0)
        assert warm.outputs == cold.outputs
        assert dict(info.prefix.hits) == dict.fromkeys(PrefixHit, 0) | {PrefixHit.MISS: 1, PrefixHit.RESIDENT: 2}
        assert (info.prefix.prompt_tokens, info.prefix.prefix_hit_tokens) == (150, 96)
        assert info.prefix.computed_prompt_tokens == 54
        for pool in info.pools:
            assert pool.used_blocks == 0
            assert pool.cached_blocks > 0

    run(body)


def test_memory_that_changes_hands_is_counted(tokenizer: Tokenizer) -> None:
    """The split is made for long sequences; many short ones need more windows than it has."""
    limits = dataclasses.replace(LIMITS, kv_cache_memory=2**16, max_model_len=400)

    async def body() -> None:
        async with fake_service(tokenizer, limits=limits) as it:
            await it.client.generate([5, 6, 7], FOREVER.replace(max_tokens=40, n=limits.max_num_seqs))
            assert (await it.client.server_info()).slabs_moved > 0

    run(body)


def test_two_servers_do_not_share_a_port() -> None:
    async def body() -> None:
        first = InferenceServer(ServerOptions(port=0))
        address = await first.start()
        second = InferenceServer(ServerOptions(port=int(address.rpartition(":")[2])))
        with pytest.raises(ConfigError, match="cannot be listened on"):
            await second.start()
        await second.stop()
        await first.stop()

    run(body)
