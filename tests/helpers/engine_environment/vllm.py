"""What Engine uses of vLLM, in a few lines: no model, and a core that dies or fails when told.

On the path of one process it makes that process an environment with a vLLM whose exceptions exist
nowhere else. A turn ends only when it is aborted, and an abort of a request that is not registered
yet does nothing, as with the real one.
"""

import asyncio
import sys
from types import SimpleNamespace

REGISTERING_S = 0.1  # the real one processes a raw prompt in a thread

for _name in (
    "config",
    "sampling_params",
    "v1",
    "v1.engine",
    "v1.engine.async_llm",
    "distributed",
    "distributed.weight_transfer",
    "distributed.weight_transfer.base",
):
    sys.modules[f"vllm.{_name}"] = sys.modules[__name__]

AsyncEngineArgs = SamplingParams = WeightTransferConfig = SimpleNamespace
RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")
WeightTransferInitRequest = WeightTransferUpdateRequest = lambda info: info


class OddError(Exception):
    __module__ = "vllm.only_here"


class EngineDeadError(Exception):
    __module__ = "vllm.only_here"

    def __init__(self):
        super().__init__("EngineCore encountered an issue.")


class AsyncLLM:
    def __init__(self):
        self.errored, self.failure = False, None
        self._registered: dict[str, asyncio.Event] = {}

    @classmethod
    def from_engine_args(cls, arguments):
        if arguments.max_model_len < 0:
            raise OddError("no such model")
        return cls()

    async def _call(self, *_, **__):
        if self.errored:
            raise EngineDeadError()
        if self.failure is not None:
            raise OddError(self.failure)

    get_weight_version = check_health = init_weight_transfer_engine = start_weight_update = _call

    async def pause_generation(self, mode):
        pass

    async def generate(self, prompt, params, request_id):
        await asyncio.sleep(REGISTERING_S)
        await self._call()
        aborted = self._registered[request_id] = asyncio.Event()
        await aborted.wait()
        turn = {"token_ids": [], "logprobs": [], "weight_versions": []}
        yield SimpleNamespace(outputs=[SimpleNamespace(**turn, finish_reason="abort")])

    async def abort(self, request_ids):
        for request_id in request_ids:
            if request_id in self._registered:
                self._registered.pop(request_id).set()
