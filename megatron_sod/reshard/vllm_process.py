"""A vLLM engine in a process of its own, without Ray: for benchmarks of the transfer."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from pathlib import Path
from typing import Any

from megatron_sod.reshard.layouts import EngineLayout
from megatron_sod.reshard.memory import peak_mb, reset_peak
from megatron_sod.reshard.sync import EngineControl

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineProcess:
    """Starts with random weights; calls are answered one after the other."""

    def __init__(self, path: str | Path, *, tp: int, dtype: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._tp = tp
        self._process = context.Process(target=_serve, args=(theirs, str(path), tp, dtype))
        self._process.start()
        self.call("ready")

    def control(self) -> EngineControl:
        """What a weight transfer asks; scores nothing."""
        return EngineControl(
            layout=EngineLayout(self._tp, 1),
            hosts=lambda: [os.uname().nodename],
            connect=lambda info: self.call("connect", info),
            update=lambda info, _: self.call("update", info),
            score=lambda rows: [[[0.0] * (len(row) - 1) for row in rows]],
        )

    def call(self, name: str, argument: Any = None) -> Any:
        """The answer; raises RuntimeError with the engine's traceback."""
        self._pipe.send((name, argument))
        is_ok, answer = self._pipe.recv()
        if not is_ok:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        self._pipe.send(("stop", None))
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe, path: str, tp: int, dtype: Any) -> None:
    for name in list(os.environ):  # torchrun's, which vLLM would take for its own
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK") or (
            name.startswith(("MASTER_", "TORCHELASTIC_"))
        ):
            del os.environ[name]
    os.environ.update(_ENVIRONMENT)
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    llm = LLM(
        model=path,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=64,
        max_num_seqs=4,
        load_format="auto",  # a reload wants the format of the first load
        enforce_eager=True,
        tensor_parallel_size=tp,
        weight_transfer_config=WeightTransferConfig(backend="megatron_sod"),
    )

    def update(info: dict) -> None:
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", kwargs={"update_info": info})
        llm.collective_rpc("finish_weight_update")

    calls = {
        "ready": lambda _: None,
        "connect": lambda info: llm.collective_rpc(
            "init_weight_transfer_engine", kwargs={"init_info": {**info, "engine_index": 0}}
        ),
        "update": update,
        "reload": lambda folder: llm.collective_rpc(
            "reload_weights", kwargs={"weights_path": folder}
        ),
        "reset_peak": lambda _: reset_peak(),
        "peak_mb": lambda _: peak_mb(),
    }
    while True:
        name, argument = pipe.recv()
        if name == "stop":
            return
        try:
            answer = calls[name](argument)
            pipe.send((True, answer if isinstance(answer, float) else None))
        except Exception:
            pipe.send((False, traceback.format_exc()))
