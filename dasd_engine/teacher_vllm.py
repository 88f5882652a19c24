"""The teacher `vllm`: vLLM's engine in this process, given token ids and asked for raw logprobs.

vLLM is not imported before it is asked for. Requests are handed to its engine as earlier ones finish, so that results
come one by one and a run may be stopped at any time. Seeds are a request's own; the rounding of vLLM's kernels, and so
now and then a token, depends on what else is in the batch.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dasd_engine.errors import InputError
from dasd_engine.teachers import (
    Failed,
    Prepared,
    Request,
    Sampled,
    TeacherChat,
    TeacherOptions,
    model_directory,
    name_and_revision,
)

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class VllmTeacher:
    """`batch_size` requests are advanced together; as many again wait inside the engine."""

    def __init__(self, options: TeacherOptions):
        model_directory(options.path)
        try:
            import vllm
        except ImportError as error:
            raise InputError(f"the teacher vllm needs the extra ({error}): pip install 'dasd-engine[vllm]'") from None
        self.name, self.revision = name_and_revision(options)
        self._chat = TeacherChat(options.path)
        self._batch_size = options.batch_size
        self._vllm: Any = vllm
        arguments: dict[str, Any] = {"dtype": _DTYPES.get(options.dtype, "auto")}
        if options.max_model_len:
            arguments["max_model_len"] = options.max_model_len
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = options.gpu_memory
        else:
            arguments["enforce_eager"] = True  # compiling takes minutes on a CPU
            arguments["enable_chunked_prefill"] = False  # vLLM 0.32 dies of a seeded request whose prompt is split
            if options.dtype == "auto":
                arguments["dtype"] = "float32"
        self._llm: Any = vllm.LLM(
            options.path, max_num_seqs=options.batch_size, logprobs_mode="raw_logprobs",
            tensor_parallel_size=options.tensor_parallel, **arguments,
        )  # fmt: skip
        self._engine = self._llm.llm_engine
        self._longest: int = self._engine.model_config.max_model_len

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Sampled | Failed]]:
        """A response is cut ("length") where prompt and response reach vLLM's longest model length too."""
        source = iter(requests)
        running: dict[str, tuple[Request, Prepared]] = {}
        number = 0
        more = True
        try:
            while more or running:
                while more and len(running) < 2 * self._batch_size:
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    refused = self._submit(str(number), request, running)
                    number += 1
                    if refused is not None:
                        yield request, refused
                if running:
                    for output in self._engine.step():
                        if output.finished:
                            yield self._result(*running.pop(output.request_id), output.outputs[0])
        finally:
            if running:  # stopped half way
                self._engine.abort_request(list(running))

    def _submit(self, name: str, request: Request, running: dict[str, tuple[Request, Prepared]]) -> Failed | None:
        try:
            prompt, most = self._chat.prompt_within(request, self._longest)
        except InputError as error:
            return Failed(str(error))
        parameters = self._vllm.SamplingParams(
            temperature=request.temperature, top_p=request.top_p, top_k=request.top_k, seed=request.seed,
            max_tokens=most, stop_token_ids=sorted(self._chat.stop_ids), logprobs=0,
            detokenize=False, skip_special_tokens=False,
        )  # fmt: skip
        self._engine.add_request(name, {"prompt_token_ids": prompt[0]}, parameters)
        running[name] = request, prompt
        return None

    def _result(self, request: Request, prompt: Prepared, output: Any) -> tuple[Request, Sampled | Failed]:
        ids = list(output.token_ids)
        if output.logprobs is None or len(output.logprobs) != len(ids):
            return request, Failed("vLLM gave no logprob for some tokens")
        logprobs = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
        return request, self._chat.response(prompt, request, ids, logprobs, output.finish_reason or "unknown")

    def close(self) -> None:
        shutdown = getattr(self._engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        del self._llm, self._engine
