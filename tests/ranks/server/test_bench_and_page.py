"""The load generator, the page and the dashboard with the real server; short runs of the soak and the fuzz."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.browser import browser, needs_chromium
from tests.support.checkpoints import DEMO
from tests.support.ranks import ROOT
from tests.support.server import Server
from yalis.cli.main import main


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def generated(server: Server) -> float:
    families = text_string_to_metric_families(server.get("/metrics").body.decode())
    samples = (sample for family in families for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == "vllm:generation_tokens_total")


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_bench_serve(two: Server, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = generated(two)
    options = ["--base-url", url(two), "--backend", backend, "--tokenizer", str(DEMO), "--num-prompts", "12"]
    options += ["--input-len", "20", "--output-len", "9", "--request-rate", "60", "--max-concurrency", "6"]
    options += ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    assert main(["bench", "serve", *options]) == 0, capsys.readouterr()
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["failed"], result["model_id"]) == (12, 0, "demo")
    assert result["output_lens"] == [9] * 12
    assert generated(two) - before == 13 * 9  # and the test request in front
    if backend == "openai":
        assert result["input_lens"] == [20] * 12
    # One event per token, and no token before its time.
    assert [len(gaps) for gaps in result["itls"]] == [8] * 12
    assert result["yalis"]["requests_with_fewer_events_than_tokens"] == 0
    for ttft, gaps, latency in zip(result["ttfts"], result["itls"], result["latencies"], strict=True):
        assert 0 < ttft < latency == pytest.approx(ttft + sum(gaps))


@needs_chromium
def test_page_of_the_real_server(two: Server) -> None:
    async def steps() -> None:
        async with browser() as tab:
            await tab.look(1280, 800)
            await tab.open(url(two) + "/")
            await tab.until("document.getElementById('status').textContent === 'ready'")
            await tab.until("document.querySelectorAll('#ranks th').length === 2")
            assert "TP 2" in await tab.text("engine")
            await tab.evaluate("document.getElementById('message').focus()")
            for field, value in (("max-tokens", 150), ("temperature", 0), ("mode", "'completion'")):
                await tab.evaluate(f"document.getElementById('{field}').value = {value}")
            await tab.type("This program is free software")
            await tab.press("Enter", 13)
            await tab.until("document.querySelector('.facts')?.textContent.includes('tokens/s')")
            await tab.until("!document.getElementById('send').disabled")
            assert "failed" not in await tab.evaluate("document.querySelector('.facts').textContent")
            assert len(await tab.evaluate("[...document.querySelectorAll('.said')].at(-1).lastChild.data")) > 20
            await tab.until("document.querySelectorAll('#step-list li').length >= 2")
            assert tab.problems == []

    asyncio.run(asyncio.wait_for(steps(), 60))


def test_dashboard_of_the_real_server(two: Server) -> None:
    two.complete("x", max_tokens=3)
    text = two.get("/metrics").body.decode()
    exported = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    asked = set(re.findall(r"(?:vllm|yalis):\w+", (ROOT / "deploy" / "grafana" / "yalis.json").read_text()))
    asked.discard("yalis:request_failure_total")  # has a series once a request failed
    assert sorted(asked - exported) == []


def script(name: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / name), "--model", str(DEMO), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_soak_for_seconds() -> None:
    out = script("serve_soak.py", "--clients", "16", "--seconds", "2", "--tasks", "12", "--cpu-threads", "1")
    assert "soak: ok" in out and "wrong_answers: 0" in out
    assert re.search(r"sigterm: \{'exit_code': 0, .*'answers_finished_after': [1-9].*'refused_with_503': [1-9]", out)


def test_fuzz_with_hundreds() -> None:
    out = script("serve_fuzz.py", "--requests", "200", "--seed", "1", "--cpu-threads", "1")
    assert "fuzz: ok" in out
