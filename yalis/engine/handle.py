"""One face for an engine wherever it runs: in this process, on the ranks of this launch, or in processes of its own."""

from __future__ import annotations

from typing import Protocol

from yalis.engine.engine import LLMEngine
from yalis.engine.messages import EngineStats, ProfileCommand, StepCommand
from yalis.engine.outputs import CompletionOutput, Prompt, RequestMetrics, RequestOutput, plain_prompt
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.start import StartedRank, engine_info
from yalis.engine.tokenizer import Tokenizer
from yalis.errors import RequestError

Info = dict[str, str | int | float]


class EngineHandle(Protocol):
    """What `yalis.LLM` needs of an engine."""

    info: Info
    tokenizer: Tokenizer | None

    def submit(self, request_id: str, prompt: Prompt, params: SamplingParams, *, stream: bool) -> None:
        """Queue a request. One that can never be served comes back from `poll` with ``error`` set.

        Args:
            stream: whether `poll` reports every step's progress, or only the end.
        """

    def abort(self, request_ids: list[str]) -> None:
        """End requests now; their last output comes back from `poll`."""

    def poll(self) -> list[RequestOutput]:
        """Requests that progressed. Call as long as requests are unfinished; may block for one step."""

    def settle(self) -> None:
        """See to it that ended requests give back their KV blocks though nobody may call `poll` for a while."""

    def stats(self, *, reset: bool = False) -> EngineStats:
        """Counters of rank 0; ``reset`` starts a new interval."""

    def profile(self, start: bool, folder: str) -> str:
        """Start the profilers of all ranks, or end them and write one trace each into ``folder`` on their hosts.

        Returns:
            path of rank 0's trace; empty after a start, or where it could not be written.
        """

    def close(self) -> None:
        """End the engine and everything that belongs to it. Idempotent."""


def failed_output(request_id: str, prompt: Prompt, message: str, arrival_s: float) -> RequestOutput:
    """The output of a request that was refused."""
    try:
        plain = plain_prompt(prompt)
    except RequestError:
        plain = []
    return RequestOutput(
        request_id=request_id,
        prompt=plain if isinstance(plain, str) else None,
        prompt_token_ids=[] if isinstance(plain, str) else plain,
        outputs=[CompletionOutput(0, finish_reason="error")],
        finished=True,
        metrics=RequestMetrics(arrival_s=arrival_s),
        error=message,
    )


class LocalEngine:
    """An engine whose rank 0 is this process."""

    def __init__(self, rank: StartedRank):
        self.info = engine_info(rank)
        self.tokenizer = rank.tokenizer
        self.ranks = rank.ranks
        self._rank = rank
        self.engine = LLMEngine(rank.core, rank.ranks, self.tokenizer, max_model_len=rank.max_model_len)
        self._refused: list[RequestOutput] = []

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        stream: bool,
        delta: bool = False,
        checked: bool = False,
    ) -> None:
        """See `EngineHandle.submit`, and `LLMEngine.add_request` for ``delta`` and ``checked``."""
        try:
            self.engine.add_request(request_id, prompt, params, stream=stream, delta=delta, checked=checked)
        except RequestError as error:
            self._refused.append(failed_output(request_id, prompt, str(error), self.engine.now()))

    def abort(self, request_ids: list[str]) -> None:
        """See `EngineHandle.abort`."""
        for request_id in request_ids:
            output = self.engine.abort_request(request_id)
            if output is not None:
                self._refused.append(output)

    def poll(self) -> list[RequestOutput]:
        """See `EngineHandle.poll`."""
        outputs, self._refused = self._refused, []
        if self.engine.has_unfinished_requests:
            outputs += self.engine.step()
        return outputs

    def settle(self) -> None:
        """See `EngineHandle.settle`: ends decided by rank 0 (aborts, stop texts) reach the schedulers with a step."""
        while self.engine.has_loose_ends:
            self._refused += self.engine.step()

    def stats(self, *, reset: bool = False) -> EngineStats:
        """See `EngineHandle.stats`."""
        return self.engine.stats(reset=reset)

    def profile(self, start: bool, folder: str) -> str:
        """See `EngineHandle.profile`."""
        self.engine.profile(ProfileCommand(start, folder))
        self._refused += self.engine.step()  # carries the command to every rank
        return "" if start else self.engine.core.profiler.last_trace

    def publish_results(self, outputs: list[RequestOutput]) -> None:
        """Give the other ranks of a joined launch the results of a collective call."""
        self.ranks.send_command(StepCommand(results=outputs))

    def close(self) -> None:
        """See `EngineHandle.close`."""
        self._rank.close()


def follow(rank: StartedRank) -> list[RequestOutput] | None:
    """Run the step loop on a rank other than 0 until rank 0 publishes results (returned) or ends the run (None)."""
    while True:
        command = rank.ranks.receive_command()
        if command.shutdown:
            return None
        if command.results is not None:
            return command.results
        rank.core.apply(command)
        if command.profile is not None:
            rank.ranks.meet("profile")
        rank.core.step()
