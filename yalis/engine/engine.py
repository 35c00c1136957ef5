"""Rank 0's engine: requests in, outputs out. Tokenizes, validates, drives the step loop of all ranks, detokenizes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from yalis.engine.core import EngineCore, FinishedStep
from yalis.engine.detokenizer import IncrementalDetokenizer
from yalis.engine.messages import EndSequence, EngineStats, NewRequest, ProfileCommand, StepCommand
from yalis.engine.outputs import CompletionOutput, Logprob, Prompt, RequestMetrics, RequestOutput, plain_prompt
from yalis.engine.random import request_seed
from yalis.engine.ranks import RankContext
from yalis.engine.request import FinishReason
from yalis.engine.results import PromptScores
from yalis.engine.sampler import SamplerOutput
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.tokenizer import Tokenizer
from yalis.errors import RequestError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(slots=True)
class _Sample:
    """One of a request's ``n`` continuations."""

    seq_id: int
    output: CompletionOutput
    detokenizer: IncrementalDetokenizer | None
    # How much of the output the user has got, where outputs are deltas.
    sent_tokens: int = 0
    sent_characters: int = 0
    last_token_s: float | None = None

    def state(self) -> CompletionOutput:
        """The whole output so far, apart from what will still change."""
        return msgspec.structs.replace(self.output, token_ids=list(self.output.token_ids))

    def delta(self) -> CompletionOutput:
        """What is new since the last call."""
        output = self.output
        logprobs = None if output.logprobs is None else output.logprobs[self.sent_tokens :]
        new = msgspec.structs.replace(
            output,
            text=output.text[self.sent_characters :],
            token_ids=output.token_ids[self.sent_tokens :],
            logprobs=logprobs,
        )
        self.sent_tokens, self.sent_characters = len(output.token_ids), len(output.text)
        output.gaps_s = []
        return new


@dataclass(slots=True)
class _Request:
    """A request from arrival to its last output."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    stream: bool
    delta: bool
    samples: list[_Sample] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    scores_sent: bool = False

    def snapshot(self) -> RequestOutput:
        """The request's state, or what is new in it, as a user sees it; shares nothing that will change."""
        scores = self.prompt_logprobs
        if self.delta and scores is not None:
            # They go out once, as soon as they are complete.
            if self.scores_sent or len(scores) < len(self.prompt_token_ids):
                scores = None
            else:
                self.scores_sent = True
        return RequestOutput(
            request_id=self.request_id,
            prompt=None if self.delta else self.prompt,
            prompt_token_ids=[] if self.delta else self.prompt_token_ids,
            outputs=[s.delta() if self.delta else s.state() for s in self.samples],
            finished=all(s.output.finished for s in self.samples),
            metrics=msgspec.structs.replace(self.metrics),
            prompt_logprobs=scores,
        )


class LLMEngine:
    """Front of the engine on rank 0.

    Args:
        core: this rank's scheduler and runner.
        ranks: the other ranks.
        tokenizer: of the model; None where dummy weights come without one, then requests are token ids in and out.
        max_model_len: most tokens in a sequence, KV capacity taken into account.
    """

    def __init__(self, core: EngineCore, ranks: RankContext, tokenizer: Tokenizer | None, *, max_model_len: int):
        self.core = core
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._ranks = ranks
        self._vocab_size = core.runner.resolved.model.vocab_size
        self._engine_seed = core.runner.resolved.user.seed
        self._requests: dict[str, _Request] = {}
        self._owner: dict[int, tuple[_Request, _Sample]] = {}
        self._new: list[NewRequest] = []
        self._ended: list[EndSequence] = []
        self._profile: ProfileCommand | None = None
        self._next_seq_id = 0
        self._num_requests = 0

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` still has something to do."""
        return bool(self._new or self._ended or self._profile or self.core.has_work)

    @property
    def has_loose_ends(self) -> bool:
        """Whether `step` still has to end sequences whose requests are over."""
        return bool(self._ended or (not self._requests and self.core.has_work))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        stream: bool = True,
        delta: bool = False,
        checked: bool = False,
    ) -> None:
        """Queue a request; it starts with the next `step`.

        Args:
            request_id: any name that no unfinished request has.
            prompt: text, or token ids as they are.
            params: how to continue it.
            stream: whether `step` returns every progress of it, or only its end.
            delta: outputs hold what is new since the one before, not the whole state.
            checked: whoever sends this has found the grammar usable (`GuideCompiler.check`), which can take seconds.

        Raises:
            RequestError: the request can never be served; nothing else is affected.
        """
        arrival = self.now()
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is taken by an unfinished request; use another")
        token_ids = self._tokenize(prompt)
        params.check_vocabulary(self._vocab_size)
        if params.guided is not None:
            self._need_tokenizer()
            if not checked:
                self.core.runner.guides.check(params.guided)
        room = self.max_model_len - len(token_ids)
        request = _Request(
            request_id,
            prompt if isinstance(prompt, str) else None,
            token_ids,
            params,
            RequestMetrics(arrival_s=arrival),
            stream,
            delta,
        )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        for index in range(params.n):
            detokenizer = IncrementalDetokenizer(self._need_tokenizer(), params) if params.detokenize else None
            sample = _Sample(self._next_seq_id, CompletionOutput(index), detokenizer)
            if params.logprobs is not None:
                sample.output.logprobs = []
                sample.output.cumulative_logprob = 0.0
            request.samples.append(sample)
            self._owner[sample.seq_id] = (request, sample)
            self._next_seq_id += 1
        self._new.append(
            NewRequest(
                seq_ids=[sample.seq_id for sample in request.samples],
                seeds=[request_seed(self._engine_seed, self._num_requests, i, params.seed) for i in range(params.n)],
                token_ids=token_ids,
                params=params,
                max_tokens=min(params.max_tokens or room, room),
            )
        )
        self._num_requests += 1
        self._requests[request_id] = request

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request now; its partial output is returned. An unknown id is ignored: it has just finished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sample in request.samples:
            if not sample.output.finished:
                self._end_sample(request, sample, FinishReason.ABORT, None, tell_scheduler=True)
        return self._emit(request)

    def step(self) -> list[RequestOutput]:
        """Run one step on all ranks; returns the requests that progressed."""
        command = StepCommand(self._new, self._ended, self._profile)
        self._new, self._ended, self._profile = [], [], None
        self._ranks.send_command(command)
        self.core.apply(command)
        if command.profile is not None:
            self._ranks.meet("profile")  # all traces are written when the answer goes out
        finished = self.core.step()
        return self._process(finished) if finished is not None else []

    def profile(self, command: ProfileCommand) -> None:
        """Start or end the profilers of all ranks with the next `step`; see `EngineCore.profiler`.

        Raises:
            RequestError: they run already, or do not.
        """
        if not command.start and self.core.profiler.take_end():
            return
        if command.start == self.core.profiler.running:
            raise RequestError("the profiler is on already" if command.start else "the profiler is not on")
        self._profile = command

    def stats(self, *, reset: bool = False) -> EngineStats:
        """Counters of this rank; ``reset`` starts a new interval for the step times."""
        core = self.core
        times, decode_times = core.step_times(reset=reset)
        return EngineStats(
            times=times,
            num_preemptions=core.scheduler.num_preemptions,
            prefix_queries=core.blocks.prefix_queries,
            prefix_hits=core.blocks.prefix_hits,
            kv_usage=core.blocks.usage,
            num_running=len(core.scheduler.running),
            num_waiting=len(core.scheduler.waiting),
            decode_times=decode_times,
        )

    @staticmethod
    def now() -> float:
        """The clock of `RequestMetrics`, in seconds."""
        return time.monotonic()

    # ---- requests in ------------------------------------------------------------------------------------------

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("the model has no tokenizer: give token ids and detokenize=False, or name a tokenizer")
        return self.tokenizer

    def _tokenize(self, prompt: Prompt) -> list[int]:
        prompt = plain_prompt(prompt)
        token_ids = self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
        if not token_ids:
            raise RequestError("the prompt is empty: it must hold at least one token")
        limit = self.max_model_len
        if len(token_ids) >= limit:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, the limit is {limit - 1} (max_model_len={limit}, one token "
                "is needed for output); shorten the prompt, or raise max_model_len and the KV cache if the model allows"
            )
        for token in token_ids:
            if not 0 <= token < self._vocab_size:
                raise RequestError(
                    f"prompt token {token} is no token of the model: ids go from 0 to {self._vocab_size - 1}"
                )
        return token_ids

    # ---- outputs out ------------------------------------------------------------------------------------------

    def _process(self, finished: FinishedStep) -> list[RequestOutput]:
        now = self.now()
        progressed: dict[str, _Request] = {}
        for scores in finished.result.sampled.prompt_scores:
            self._take_prompt_scores(scores)
        row = 0
        rows: dict[int, int] = {}
        for item in finished.step.items:
            if item.samples:
                rows[item.seq.seq_id] = row
                row += 1
        for update in finished.updates:
            owner = self._owner.get(update.seq.seq_id)
            if owner is None:
                continue  # its stop string was found one step ago
            request, sample = owner
            metrics = request.metrics
            if metrics.first_scheduled_s is None:
                metrics.first_scheduled_s = finished.started_s
                metrics.num_cached_tokens = update.seq.num_cached_tokens
            metrics.num_preemptions = max(metrics.num_preemptions, update.seq.num_preemptions)
            if update.token_id is None and not update.seq.finished:
                continue
            if update.token_id is not None:
                if metrics.first_token_s is None:
                    metrics.first_token_s = now
                if request.delta:
                    if sample.last_token_s is not None:
                        sample.output.gaps_s.append(now - sample.last_token_s)
                    sample.last_token_s = now
                self._take_token(request, sample, update.token_id, finished, rows[update.seq.seq_id])
            if update.seq.finished and not sample.output.finished:
                assert update.seq.finish_reason is not None
                self._end_sample(
                    request, sample, update.seq.finish_reason, update.seq.stop_reason, tell_scheduler=False
                )
            if request.stream or all(s.output.finished for s in request.samples):
                progressed[request.request_id] = request
        return [self._emit(request) for request in progressed.values()]

    def _take_token(self, request: _Request, sample: _Sample, token: int, finished: FinishedStep, row: int) -> None:
        output, params = sample.output, request.params
        output.token_ids.append(token)
        request.metrics.num_output_tokens = max(request.metrics.num_output_tokens, len(output.token_ids))
        if output.logprobs is not None:
            rows = finished.result.sampled.output
            assert rows is not None and params.logprobs is not None
            entry = self._logprobs(rows, row, token, params.logprobs, params.detokenize)
            output.logprobs.append(entry)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + entry[token].logprob
        if sample.detokenizer is None:
            return
        output.text += sample.detokenizer.add(token)
        if sample.detokenizer.stop_reason is not None:
            self._end_sample(request, sample, FinishReason.STOP, sample.detokenizer.stop_reason, tell_scheduler=True)

    def _end_sample(
        self,
        request: _Request,
        sample: _Sample,
        reason: FinishReason,
        stop_reason: int | str | None,
        *,
        tell_scheduler: bool,
    ) -> None:
        output = sample.output
        if sample.detokenizer is not None and sample.detokenizer.stop_reason is None:
            output.text += sample.detokenizer.finish()
        output.finish_reason = reason.value
        output.stop_reason = stop_reason
        del self._owner[sample.seq_id]
        if tell_scheduler:
            self._ended.append(EndSequence(sample.seq_id, reason.value, stop_reason))

    def _emit(self, request: _Request) -> RequestOutput:
        if all(sample.output.finished for sample in request.samples):
            request.metrics.finished_s = self.now()
            del self._requests[request.request_id]
        return request.snapshot()

    def _take_prompt_scores(self, scores: PromptScores) -> None:
        seq = scores.rows.item.seq
        owner = self._owner.get(seq.seq_id)
        if owner is None:
            return
        request, _ = owner
        listed, k = request.prompt_logprobs, request.params.prompt_logprobs
        assert listed is not None and k is not None
        for row, target in enumerate(scores.rows.targets):
            # A preempted sequence scores its prompt again, in other chunks perhaps: what is known already stays.
            if scores.rows.item.start + row + 1 == len(listed):
                listed.append(self._logprobs(scores.output, row, target, k, request.params.detokenize))

    def _logprobs(self, output: SamplerOutput, row: int, token: int, k: int, with_text: bool) -> dict[int, Logprob]:
        """The ``k`` likeliest tokens of a row, and the row's own token."""
        assert output.logprobs is not None and output.ranks is not None
        assert output.top_token_ids is not None and output.top_logprobs is not None

        def text(token_id: int) -> str | None:
            return self._decode_token(token_id) if with_text else None

        entry = {token: Logprob(float(output.logprobs[row]), int(output.ranks[row]), text(token))}
        top = zip(output.top_token_ids[row, :k].tolist(), output.top_logprobs[row, :k].tolist(), strict=True)
        for rank, (token_id, logprob) in enumerate(top, start=1):
            entry.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
        return entry

    def _decode_token(self, token_id: int) -> str:
        return self._need_tokenizer().decode([token_id], skip_special_tokens=False)
