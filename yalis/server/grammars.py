"""Grammars are tried before the engine hears of a request: rank 0 steps for everybody, and must not wait for one."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Collection

from yalis.engine.guided import GuideCompiler
from yalis.engine.sampling_params import GuidedParams
from yalis.engine.tokenizer import Tokenizer
from yalis.errors import RequestError
from yalis.server.errors import ApiError, refused

_REMEMBERED = 256
# One takes seconds at worst, see `yalis.engine.guided_check`, and they are tried one after the other.
_MOST_WAITING = 16


class Grammars:
    """Tries the grammars of requests beside the event loop, one at a time, and remembers the verdicts.

    Args:
        tokenizer, vocab_size, eos_token_ids: of the model, see `yalis.engine.guided.GuideCompiler`.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compiler: GuideCompiler | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    async def check(self, guided: GuidedParams) -> None:
        """Wait for the verdict.

        Raises:
            ApiError: 400, the grammar cannot be used; 429, too many others wait for theirs.
        """
        key = hashlib.sha256(repr(guided).encode(errors="surrogatepass")).digest()
        if key not in self._verdicts:
            if self._num_waiting >= _MOST_WAITING:
                raise ApiError(
                    429,
                    f"{self._num_waiting} grammars wait to be compiled, at most {_MOST_WAITING} may; try again later",
                    code="queue_full",
                    retry_after_s=5,
                )
            self._num_waiting += 1
            try:
                async with self._turn:
                    if key not in self._verdicts:  # the one before may have been the same
                        self._verdicts[key] = await asyncio.to_thread(self._try, guided)
            finally:
                self._num_waiting -= 1
        verdict = self._verdicts[key]
        self._verdicts.move_to_end(key)
        while len(self._verdicts) > _REMEMBERED:
            self._verdicts.popitem(last=False)
        if verdict:
            raise refused(verdict)

    def _try(self, guided: GuidedParams) -> str:
        try:
            if self._compiler is None:
                self._compiler = GuideCompiler(self._tokenizer, self._vocab_size, self._eos_token_ids)
            self._compiler.check(guided)
        except RequestError as error:
            return str(error)
        return ""
