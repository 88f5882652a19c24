"""The teacher `local`: the engine's own decoder and generator, on the model of a directory."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch

from dasd_engine.draw import SamplingParams
from dasd_engine.errors import InputError
from dasd_engine.generate import Generation, Prompt, generate_stream
from dasd_engine.hf import DTYPES, load_model
from dasd_engine.model import Decoder
from dasd_engine.teachers import Failed, Prepared, Request, Sampled, TeacherChat, TeacherOptions, name_and_revision


class LocalTeacher:
    """The same request gets the same response in any batch; `batch_size` of them run together."""

    def __init__(self, options: TeacherOptions, model: Decoder | None = None):
        """`model`: in place of the directory's weights; it is asked where it lies, in its own dtype."""
        if options.batch_size < 1:
            raise InputError(f"batch_size = {options.batch_size}: must be at least 1")
        if options.threads < 0:
            raise InputError(f"threads = {options.threads}: must be at least 0")
        if options.threads:
            torch.set_num_threads(options.threads)
        self.name, self.revision = name_and_revision(options)
        self._chat = TeacherChat(options.path)
        self._batch_size = options.batch_size
        if model is None:
            device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = options.dtype if options.dtype != "auto" else "fp32" if device == "cpu" else "bf16"
            model = load_model(options.path, dtype=DTYPES[dtype], device=device)
        self._model = model
        self._longest = self._model.config.max_position_embeddings

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Sampled | Failed]]:
        """A response is cut ("length") where prompt and response reach the model's longest position too."""
        running: dict[int, tuple[Request, Prepared]] = {}
        refused: deque[tuple[Request, Failed]] = deque()
        prompts = self._prompts(requests, running, refused)
        responses = generate_stream(self._model, prompts, stop_ids=self._chat.stop_ids, batch_size=self._batch_size)
        for index, generation in responses:
            yield from _drain(refused)
            request, prompt = running.pop(index)
            yield request, self._response(request, prompt, generation)
        yield from _drain(refused)

    def _prompts(
        self,
        requests: Iterable[Request],
        running: dict[int, tuple[Request, Prepared]],
        refused: deque[tuple[Request, Failed]],
    ) -> Iterator[Prompt]:
        index = 0
        for request in requests:
            try:
                prompt, most = self._chat.prompt_within(request, self._longest)
            except InputError as error:
                refused.append((request, Failed(str(error))))
                continue
            params = SamplingParams(request.temperature, request.top_p, request.top_k, request.seed)
            running[index] = request, prompt
            index += 1
            yield Prompt(prompt[0], most, params)

    def _response(self, request: Request, prompt: Prepared, out: Generation) -> Sampled | Failed:
        return self._chat.response(prompt, request, out.tokens, out.logprobs, out.finish_reason)

    def close(self) -> None:
        del self._model


def _drain(queue: deque[tuple[Request, Failed]]) -> Iterator[tuple[Request, Failed]]:
    while queue:
        yield queue.popleft()
