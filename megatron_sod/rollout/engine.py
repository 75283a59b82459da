"""A vLLM engine in a Ray actor: token ids in, token ids and logprobs out.

The only module of this package that drives vLLM. Weights arrive through vLLM's weight-transfer
interface (megatron_sod/reshard).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from megatron_sod.errors import EngineLost, RolloutError, SodError, WeightTransferError
from megatron_sod.rollout.agent_loop import SampledTurn, Sampling

PauseMode = Literal["wait", "keep"]
_TRANSFER_ENGINES = {"vllm_nccl": "nccl", "vllm_ipc": "ipc"}
_HEALTH_INTERVAL_S = 1.0
_ABORT_INTERVAL_S = 0.05


@dataclass(frozen=True)
class EngineWeights:
    """What a new engine needs to hold the weights that the others hold."""

    connect_info: dict[str, Any]
    update_info: dict[str, Any] | None = None  # None: connected, nothing received yet
    policy_version: int = -1
    canaries: list[list[int]] = field(default_factory=list)
    canary_logprobs: list[list[float]] = field(default_factory=list)  # of an engine that passed

    @property
    def is_kept(self) -> bool:
        """Whether what was sent can still be read by engines that come later."""
        return bool(self.connect_info.get("setup", {}).get("is_kept"))


def engine_environment(kv_cache_gb: float) -> dict[str, str]:
    """Environment of an engine process, set before vLLM is imported."""
    return {
        "OMP_NUM_THREADS": os.environ.get("SOD_ENGINE_THREADS", "1"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # On CPU: keeps the worker inside the engine core's process at tensor_parallel_size 1.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(kv_cache_gb))),
        "VLLM_LOGGING_LEVEL": os.environ.get("SOD_ENGINE_LOG_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


_Class = TypeVar("_Class", bound=type)


def _raises_our_errors(cls: _Class) -> _Class:
    """Every public coroutine raises children of SodError only. Those who call may live in an
    environment without vLLM, where its exceptions cannot be unpickled."""
    for name, method in list(vars(cls).items()):
        if inspect.iscoroutinefunction(method) and not name.startswith("_"):
            setattr(cls, name, _in_our_words(method))
    return cls


def _in_our_words(method: Callable) -> Callable:
    @functools.wraps(method)
    async def call(self, *arguments, **named):
        try:
            return await method(self, *arguments, **named)
        except SodError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            if self._llm.errored:
                raise EngineLost(f"vLLM's core is dead: {what}") from error
            raise RolloutError(f"the engine failed: {what}") from error

    return call


@_raises_our_errors
class Engine:
    """Wraps AsyncLLM. Methods are coroutines, so a Ray actor of it serves many calls at once.

    Each raises EngineLost when vLLM's core is dead.
    """

    def __init__(self, options: dict[str, Any]):
        """`options`: model, dtype, max_model_len, tensor_parallel_size, max_num_seqs, load_format,
        gpu_memory_utilization, seed, transfer_backend, vocab_size (None: the model's own).

        Raises:
            RolloutError: vLLM does not start with them.
        """
        try:
            from vllm.v1.engine.async_llm import AsyncLLM

            self._llm = AsyncLLM.from_engine_args(_vllm_arguments(options))
        except Exception as error:
            raise RolloutError(
                f"an engine with {options['model']}: vLLM does not start "
                f"({type(error).__name__}: {error})"
            ) from error
        self._requests = itertools.count()
        self._interruptible: set[str] = set()
        self._is_interrupting = False
        self._tensor_parallel_size = options["tensor_parallel_size"]
        self._broken: str | None = None  # why this engine must not serve

    async def ready(self) -> bool:
        """True when vLLM's core answers, which it does between two forward passes."""
        await self._llm.get_weight_version()
        return True

    async def generate(self, token_ids: list[int], sampling: Sampling) -> SampledTurn:
        """Sample one turn; ends at a stop token (kept) or at max_tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            seed=sampling.seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if self._is_interrupting:
            return SampledTurn([], [], [], is_interrupted=True)
        request_id = str(next(self._requests))
        self._interruptible.add(request_id)
        try:
            output = (await self._final(token_ids, params, request_id)).outputs[0]
        finally:
            self._interruptible.discard(request_id)
        sampled = list(output.token_ids)
        logprobs = [
            entry[token].logprob for entry, token in zip(output.logprobs, sampled, strict=True)
        ]
        versions = _policy_versions(output.weight_versions, sampled)
        return SampledTurn(sampled, logprobs, versions, output.finish_reason == "abort")

    async def set_interrupting(self, is_interrupting: bool) -> None:
        """True: refuse new turns and end those being sampled, which is waited for; what there is
        of a turn is returned, marked as interrupted. False: serve again."""
        self._is_interrupting = is_interrupting
        # vLLM processes a prompt before it registers the request, and until then ignores an abort.
        while self._is_interrupting and self._interruptible:
            await self._llm.abort(list(self._interruptible))
            await asyncio.sleep(_ABORT_INTERVAL_S)

    async def lifeline(self) -> None:
        """Never returns while vLLM's core lives."""
        while True:
            await self._llm.check_health()
            await asyncio.sleep(_HEALTH_INTERVAL_S)

    async def join(self, weights: EngineWeights | None, index: int) -> list[list[float]]:
        """Get the weights the other engines hold; logprobs of the canaries that prove it."""
        await self.ready()
        if weights is None:
            return []
        await self.connect_weights(weights.connect_info, index)
        if weights.update_info is not None:
            await self.update_weights(weights.update_info, weights.policy_version)
        return [await self.score(ids) for ids in weights.canaries]

    async def score(self, token_ids: list[int]) -> list[float]:
        """Logprob of each token but the first, given those before it."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = await self._final(token_ids, params, str(next(self._requests)))
        entries = output.prompt_logprobs[1:]
        return [entry[token].logprob for entry, token in zip(entries, token_ids[1:], strict=True)]

    async def _final(self, token_ids: list[int], params, request_id: str):
        self._check_whole()
        final: Any = None
        async for output in self._llm.generate({"prompt_token_ids": token_ids}, params, request_id):
            final = output
        self._check_whole()  # it may have been ended by a failed transfer
        return final

    async def connect_weights(self, init_info: dict[str, Any], index: int) -> None:
        """Give the weight-transfer engine what it needs once; this is engine `index`."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        if "setup" in init_info:
            init_info = {**init_info, "engine_index": index}
        elif "rank_offset" in init_info:  # vLLM's nccl: one group over the workers of all engines
            offset = init_info["rank_offset"] + index * self._tensor_parallel_size
            init_info = {**init_info, "rank_offset": offset}
        request = WeightTransferInitRequest(init_info)
        await self._llm.init_weight_transfer_engine(request)

    async def update_weights(
        self, update_info: dict[str, Any], policy_version: int, pause: PauseMode = "wait"
    ) -> None:
        """Pause, receive, resume. Every cached key and value of the old weights is dropped.

        Args:
            pause: what happens to sequences in flight: "wait" finishes them first; "keep" freezes
                them, and they go on with the new weights after their prefix has been recomputed.
        Raises:
            WeightTransferError: the engine may hold half a model now; it serves nothing until a
                later transfer succeeds.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.pause_generation(mode=pause)
        try:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info))
            await self._llm.finish_weight_update(weight_version=str(policy_version))
        except BaseException as error:
            self._broken = f"the transfer of version {policy_version} failed: {error}"
            with contextlib.suppress(Exception):  # the engine's process may be gone
                await self._llm.pause_generation(mode="abort")  # sequences that were kept end here
            raise WeightTransferError(self._broken) from None
        self._broken = None
        await self._llm.resume_generation()

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise WeightTransferError(
                f"this engine may hold half a model and serves nothing: {self._broken}"
            )

    async def host(self) -> str:
        return socket.gethostname()

    async def close(self) -> None:
        self._llm.shutdown()


def _vllm_arguments(options: dict[str, Any]):
    """`options` as Engine's, in vLLM's words."""
    import torch
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig

    on_gpu = torch.cuda.is_available()
    return AsyncEngineArgs(
        model=options["model"],
        skip_tokenizer_init=True,
        dtype=options["dtype"],
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
        tensor_parallel_size=options["tensor_parallel_size"],
        distributed_executor_backend="mp" if options["tensor_parallel_size"] > 1 else "uni",
        load_format=options["load_format"],
        hf_overrides={"vocab_size": size} if (size := options["vocab_size"]) else {},
        gpu_memory_utilization=options["gpu_memory_utilization"],
        enforce_eager=not on_gpu,
        # Seeded requests rewind their generator after a partial prefill, which CPU generators
        # cannot do: prompts are prefilled whole there.
        enable_chunked_prefill=on_gpu,
        max_num_batched_tokens=None if on_gpu else max(8192, options["max_model_len"]),
        logprobs_mode="processed_logprobs",  # after temperature: what was sampled from
        weight_transfer_config=WeightTransferConfig(
            backend=_TRANSFER_ENGINES.get(options["transfer_backend"], "megatron_sod")
        ),
        generation_config="vllm",  # nothing from the model's own generation_config.json
        disable_log_stats=True,
        seed=options["seed"],
    )


def _policy_versions(spans, sampled: list[int]) -> list[int]:
    """The version of the weights that sampled each token, from vLLM's spans; -1 before any
    transfer. A sequence kept through a transfer has one version before it and one after."""
    versions: list[int] = []
    for span in spans or []:
        version = int(span.version) if span.version.isdigit() else -1
        versions += [version] * (span.end - span.start)
    assert len(versions) == len(sampled) and versions == sorted(versions), (
        f"vLLM reports weight versions {spans} for {len(sampled)} tokens"
    )
    return versions
