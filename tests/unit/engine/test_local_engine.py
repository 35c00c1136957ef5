"""What an engine reports of a request while it runs, and what only at its end."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from yalis.config import EngineConfig
from yalis.engine.handle import LocalEngine
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.start import start_rank

MODEL = str(Path(__file__).parents[3] / "models" / "demo")


@pytest.mark.parametrize("samples", [1, 2])
def test_streamed_requests_report_each_step_and_others_only_their_end(samples):
    engine = LocalEngine(start_rank(EngineConfig(MODEL, dtype="float32", max_model_len=128)))
    params = SamplingParams(temperature=1.0, seed=5, n=samples, max_tokens=6, ignore_eos=True)
    engine.submit("streamed", "You may copy", params, stream=True)
    engine.submit("whole", "You may copy", params, stream=False)
    seen: dict[str, list[int]] = {"streamed": [], "whole": []}
    last = {}
    while engine.engine.has_unfinished_requests:
        for output in engine.poll():
            seen[output.request_id].append(len(output.outputs[0].token_ids))
            last[output.request_id] = output
    engine.close()
    assert seen == {"streamed": [1, 2, 3, 4, 5, 6], "whole": [6]}
    assert [o.text for o in last["whole"].outputs] == [o.text for o in last["streamed"].outputs]
    assert last["whole"].metrics.ttft_s is not None
    assert last["whole"].metrics.ttft_s <= last["whole"].metrics.e2e_s


def test_a_prompt_is_sent_once_however_many_samples_it_has(monkeypatch):
    engine = LocalEngine(start_rank(EngineConfig(MODEL, dtype="float32", max_model_len=256)))
    sent = []
    monkeypatch.setattr(engine.ranks, "send_command", lambda command: sent.append(msgspec.msgpack.encode(command)))
    params = SamplingParams(temperature=1.0, seed=5, n=16, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    engine.submit("many", [7] * 200, params, stream=False)
    outputs = []
    while engine.engine.has_unfinished_requests:
        outputs += engine.poll()
    [output] = outputs
    engine.close()
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 200
    assert sent[0].count(b"\x07" * 200) == 1
