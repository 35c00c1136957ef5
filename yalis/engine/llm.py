"""`LLM`: the offline interface, with vLLM's names."""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any

from yalis.config import EngineConfig
from yalis.engine.client import EngineClient
from yalis.engine.handle import EngineHandle, Info, LocalEngine, follow
from yalis.engine.messages import EngineStats
from yalis.engine.outputs import Prompt, RequestOutput
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.start import StartedRank, start_rank
from yalis.engine.tokenizer import Tokenizer, generation_config, load_tokenizer
from yalis.errors import ConfigError, EngineDeadError
from yalis.launch import is_launched
from yalis.utils.logging import setup_logging
from yalis.utils.progress import count_progress
from yalis.weights.hub import resolve_model_path


class LLM:
    """A model, loaded and ready to generate.

    With one rank the engine runs in this process. With more, it starts its own processes; inside a launch (torchrun,
    srun, mpirun) this process is one of the ranks, every rank makes the same calls, and rank 0's prompts count.

    Args:
        model: folder in Hugging Face layout, or a hub id.
        options: the other fields of `EngineConfig`, such as ``tensor_parallel_size=2``.

    Raises:
        ConfigError, CheckpointError: the model or an option is impossible.
        EngineDeadError: the ranks did not come up.

    Example:
        >>> llm = LLM("models/demo", tensor_parallel_size=2)
        >>> [out] = llm.generate("This program is free software", SamplingParams(max_tokens=8))
        >>> out.outputs[0].text
    """

    def __init__(self, model: str, **options: Any):
        setup_logging()
        self.config = EngineConfig.from_mapping({"model": model, **options})
        self._ids = itertools.count()
        # Where the outputs of each unfinished request go: one list per `generate` or `stream` in progress.
        self._boxes: dict[str, list[RequestOutput]] = {}
        self._closed = False
        self._handle: EngineHandle | None = None
        self._follower: StartedRank | None = None
        if self.config.world_size > 1 and not is_launched(os.environ):
            self._handle = EngineClient(self.config)
            return
        rank = start_rank(self.config)
        if rank.ranks.is_root:
            self._handle = LocalEngine(rank)
        else:
            self._follower = rank

    @property
    def is_root(self) -> bool:
        """Whether this process gives the prompts: always, except on ranks other than 0 of a launch."""
        return self._follower is None

    @property
    def info(self) -> Info:
        """What the engine is made of: resolved choices. Empty on ranks other than 0 of a launch."""
        return self._handle.info if self._handle is not None else {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ConfigError: the model has dummy weights and no tokenizer.
        """
        if self._handle is not None:
            tokenizer = self._handle.tokenizer
        else:
            assert self._follower is not None
            tokenizer = load_tokenizer(self._follower.resolved.tokenizer_path, self.config)
        if tokenizer is None:
            raise ConfigError(f"{self.config.model} has no tokenizer; give token ids, or name one (tokenizer=...)")
        return tokenizer

    @property
    def default_sampling_params(self) -> SamplingParams:
        """Defaults of this checkpoint: its generation config over the library's."""
        return SamplingParams.resolve({}, generation_config(resolve_model_path(self.config.model)))

    def sampling_params(self, explicit: Mapping[str, Any]) -> SamplingParams:
        """Parameters by precedence: ``explicit``, then the checkpoint's generation config, then the defaults."""
        return SamplingParams.resolve(explicit, generation_config(resolve_model_path(self.config.model)))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue prompts.

        Args:
            prompts: one prompt or several; text or token ids.
            sampling_params: one for all, or one for each; default the checkpoint's.
            use_tqdm: show a progress bar on a terminal.

        Returns:
            one output per prompt, in order. A prompt that cannot be served has ``error`` set; the others are served.

        Raises:
            ConfigError: as many parameters as prompts were expected, or something else than parameters was given.
            EngineDeadError, PeerLostError: a rank was lost.
        """
        listed = _as_list(prompts)
        params = self._params_for(listed, sampling_params)
        if self._follower is not None:
            return self._follow()
        order = self._submit(listed, params, stream=False)
        done: dict[str, RequestOutput] = {}
        with count_progress("generating", len(order), enabled=use_tqdm) as on_progress:
            for output in self._finish(order):
                if output.finished:
                    done[output.request_id] = output
                    if on_progress is not None:
                        on_progress(1)
        results = [done[request_id] for request_id in order]
        self._publish(results)
        return results

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Continue one prompt, yielding its state whenever it has grown; the last one is ``finished``.

        Leaving the loop early aborts the request. On ranks other than 0 of a launch only the last state is yielded.
        """
        if self._follower is not None:
            yield from self._follow()
            return
        [request_id] = self._submit([prompt], self._params_for([prompt], sampling_params), stream=True)
        last: list[RequestOutput] = []
        try:
            with closing(self._finish([request_id])) as outputs:
                for output in outputs:
                    last = [output]
                    yield output
        finally:
            self._publish(last)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """`generate` for conversations, rendered with the checkpoint's chat template.

        Args:
            messages: one conversation (a list of ``{"role": ..., "content": ...}``) or several.
            template_options: passed to the template, such as ``tools``.
        """
        many: Any = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        return self.generate([self.render_chat(m, **template_options) for m in many], sampling_params)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_options: Any) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template, ready for the assistant's turn."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **template_options)
        # The template writes the special tokens itself.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stats(self, *, reset: bool = False) -> EngineStats:
        """Where the time went on rank 0 since the last reset, and counters. Not collective."""
        if self._handle is None:
            raise ConfigError("stats() is known on rank 0 only")
        return self._handle.stats(reset=reset)

    def start_profile(self, folder: str | os.PathLike[str]) -> None:
        """Begin to record every rank's steps. Collective in a launch; stop it within a few hundred steps."""
        self._profile(True, os.fspath(folder))

    def stop_profile(self) -> str:
        """End the recording: every rank writes a trace (Chrome's format) into the folder. Collective in a launch.

        Returns:
            path of rank 0's trace; empty on the other ranks of a launch, or where it could not be written (logged).
        """
        return self._profile(False, "")

    def _profile(self, start: bool, folder: str) -> str:
        if self._handle is None:
            self._follow()
            return ""
        path = self._handle.profile(start, folder)
        self._publish([])
        return path

    def close(self) -> None:
        """End the engine and its processes. Idempotent; also done by ``with LLM(...) as llm``."""
        self._closed = True
        if self._handle is not None:
            self._handle.close()
        if self._follower is not None:
            self._follower.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ---- inside -----------------------------------------------------------------------------------------------

    def _submit(self, prompts: list[Prompt], params: list[SamplingParams], *, stream: bool) -> list[str]:
        """Queue all requests, or none; their ids."""
        assert self._handle is not None
        request_ids = [str(next(self._ids)) for _ in prompts]
        try:
            for request_id, prompt, p in zip(request_ids, prompts, params, strict=True):
                self._handle.submit(request_id, prompt, p, stream=stream)
        except EngineDeadError:
            raise
        except BaseException:  # nobody would take the outputs of those before it
            self._handle.abort(request_ids)
            self._handle.settle()
            raise
        return request_ids

    def _finish(self, request_ids: list[str]) -> Generator[RequestOutput]:
        """Outputs of these requests until all have finished; aborts what is left if the caller stops early.

        Other streams may be in progress: whoever polls puts their outputs where they will look.
        """
        assert self._handle is not None
        open_ids = set(request_ids)
        box: list[RequestOutput] = []
        self._boxes.update(dict.fromkeys(request_ids, box))
        failed = False
        try:
            while open_ids:
                if not box:
                    for output in self._handle.poll():
                        if output.request_id in self._boxes:
                            self._boxes[output.request_id].append(output)
                arrived, box[:] = list(box), []
                for output in arrived:
                    if output.finished:
                        open_ids.discard(output.request_id)
                    yield output
        except Exception:
            failed = True  # the engine itself: there is nothing left to abort
            raise
        finally:
            for request_id in request_ids:
                del self._boxes[request_id]
            if not failed and not self._closed:
                if open_ids:
                    self._handle.abort(sorted(open_ids))
                self._handle.settle()

    def _follow(self) -> list[RequestOutput]:
        assert self._follower is not None
        results = follow(self._follower)
        if results is None:
            raise EngineDeadError("rank 0 ended the run")
        return results

    def _publish(self, results: list[RequestOutput]) -> None:
        if isinstance(self._handle, LocalEngine):
            self._handle.publish_results(results)

    def _params_for(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None:
            params = self.default_sampling_params
        listed: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(listed) != len(prompts):
            raise ConfigError(f"{len(listed)} sampling params for {len(prompts)} prompts; give one, or one for each")
        for given in listed:
            if not isinstance(given, SamplingParams):
                raise ConfigError(
                    f"sampling_params holds {given!r:.80}: must be SamplingParams; make them with SamplingParams(...) "
                    "or LLM.sampling_params({...})"
                )
        return listed


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed
