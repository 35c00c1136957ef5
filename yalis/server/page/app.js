// The page at /: a conversation over /v1/chat/completions, and the live state of the server from /state.
// Text of models and of the server only ever becomes textContent.

const STATE_EVERY_MS = 500;
const STATE_TIMEOUT_MS = 3000;
const SILENT_S = 5; // ranks beat at least once a second
const HISTORY = 120;
// The verdict on a lost rank; the ranks' last status may be from just before it.
const VERDICT = /\brank (\d+) on \S+(?: \(pid \d+\))? was lost/;
const PARTS = [
  ["compute", "compute"],
  ["intra", "all-reduce in node"],
  ["inter", "all-reduce between nodes"],
  ["flat", "all-reduce"],
  ["pipeline", "pipeline stages"],
  ["host", "host"],
];

const $ = (id) => document.getElementById(id);
const history = [];
let conversation = [];
let model = null;
let trouble = null; // what was wrong when the server was last heard
let running = null; // AbortController of the answer that is being received
let key = sessionStorage.getItem("yalis-key") || "";

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

function headers(more) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : { ...more };
}

function number(value, digits = 0) {
  return Number.isFinite(value) ? value.toLocaleString("en", { maximumFractionDigits: digits }) : "–";
}

// The same text again would make a screen reader say it again.
function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

// ---- state of the server --------------------------------------------------------------------------------------

async function pollState() {
  try {
    const response = await fetch("state", {
      headers: headers(),
      cache: "no-store",
      signal: AbortSignal.timeout(STATE_TIMEOUT_MS),
    });
    if (response.status === 401) {
      $("key-form").hidden = false;
      showStatus("needs a key", "");
      alarm(key ? "The server does not accept this API key." : null);
      $("live").classList.add("stale");
      return;
    }
    if (!response.ok) throw new Error(`/state answers ${response.status}`);
    $("key-form").hidden = true;
    showState(await response.json());
    $("live").classList.remove("stale");
  } catch (error) {
    showStatus("unreachable", "bad");
    const known = trouble ? `${trouble} ` : "";
    alarm(`${known}The server does not answer (${error.message}); what is shown here is the last that was heard.`);
    $("live").classList.add("stale");
  }
}

async function pollForEver() {
  for (;;) {
    if (!document.hidden) await pollState();
    await new Promise((resolve) => setTimeout(resolve, STATE_EVERY_MS));
  }
}

function showStatus(word, tone) {
  say("status", word);
  $("status").dataset.tone = tone;
}

function alarm(text) {
  say("alarm", text || "");
  $("alarm").hidden = !text;
}

function showState(state) {
  model = state.model;
  say("model", state.model || "");
  document.title = `${state.model || "model"} · yalis`;
  const named = state.status === "ready" ? null : VERDICT.exec(state.message || "");
  const ranks = (state.ranks || []).map((rank) =>
    named && rank.rank === Number(named[1]) ? { ...rank, state: "lost" } : rank,
  );
  const lost = ranks.filter((rank) => rank.state === "lost");
  const bad = state.status === "dead" || lost.length > 0;
  showStatus(state.status, bad ? "bad" : state.status === "ready" ? "good" : "");
  const names = lost.map((rank) => `rank ${rank.rank} on ${rank.host}`).join(", ");
  trouble = state.message || (lost.length ? `Lost: ${names}.` : null);
  alarm(trouble);

  const speed = state.tokens_per_s || {};
  say("generation", number(speed.generation, speed.generation < 100 ? 1 : 0));
  say("prompt", number(speed.prompt, speed.prompt < 100 ? 1 : 0));
  say("running", number(state.running));
  say("waiting", number(state.waiting));
  showHistory(speed.generation || 0);

  const usage = (state.kv || {}).usage;
  $("kv").value = usage || 0;
  const blocks = (state.kv || {}).num_blocks;
  say("kv-text", Number.isFinite(usage) ? `${number(100 * usage, 1)}% of ${number(blocks)} blocks` : "–");

  showStep(state.step_ms || {});
  showRanks(ranks);
  showEngine(state);
}

function showHistory(value) {
  history.push(value);
  if (history.length > HISTORY) history.shift();
  const peak = Math.max(...history);
  const points = history.map((v, i) => `${i + HISTORY - history.length},${29 - (peak ? (27 * v) / peak : 0)}`);
  $("history").firstElementChild.setAttribute("points", points.join(" "));
  say("peak", number(peak, peak < 100 ? 1 : 0));
}

function showStep(step) {
  const total = step.total || 0;
  say(
    "step-text",
    total && step.steps
      ? `${number(total, 2)} ms, the mean of the last ${number(step.steps)} steps`
      : "No step in the last second.",
  );
  const bar = $("step-bar");
  const list = $("step-list");
  bar.replaceChildren();
  list.replaceChildren();
  let at = 0;
  for (const [part, label] of PARTS) {
    const ms = step[part] || 0;
    if (!total || ms <= 0) continue;
    const width = (100 * ms) / total;
    bar.append(drawn("rect", { x: at, y: 0, width, height: 10, class: part }));
    at += width;
    const item = element("li");
    const mark = drawn("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" });
    mark.append(drawn("rect", { width: 10, height: 10, rx: 2, class: part }));
    item.append(mark, element("span", "", label), element("span", "ms", `${number(ms, 2)} ms`));
    list.append(item);
  }
}

function troubleOf(rank) {
  if (rank.state === "lost") return "lost";
  return rank.state !== "left" && rank.beat_age_s > SILENT_S ? "silent" : "";
}

// Whoever is in trouble comes first: of many ranks only some are in sight.
function showRanks(ranks) {
  const order = ["lost", "silent", ""];
  const sorted = [...ranks].sort(
    (a, b) => order.indexOf(troubleOf(a)) - order.indexOf(troubleOf(b)) || a.rank - b.rank,
  );
  const rows = sorted.map((rank) => {
    const trouble = troubleOf(rank);
    const row = element("tr", trouble);
    const name = element("th", "", String(rank.rank));
    name.scope = "row";
    const words = { lost: "✕ lost", silent: `⚠ silent: ${rank.state}` }[trouble] || rank.state;
    const state = element("td", "state", words);
    state.title = rank.state;
    const beat = Number.isFinite(rank.beat_age_s) ? `${number(rank.beat_age_s, 1)} s` : "–";
    row.append(name, state);
    for (const text of [number(rank.step), beat, rank.host ?? "–", String(rank.pid ?? "–")]) {
      row.append(element("td", "", text));
    }
    return row;
  });
  if (!rows.length) {
    const cell = element("td", "quiet", "The ranks have not met yet.");
    cell.colSpan = 6;
    rows.push(element("tr"));
    rows[0].append(cell);
  }
  $("ranks").replaceChildren(...rows);
}

function showEngine(state) {
  const engine = state.engine || {};
  const words = [`yalis ${state.version || ""}`];
  if (engine.tensor_parallel_size) {
    words.push(`TP ${engine.tensor_parallel_size} × PP ${engine.pipeline_parallel_size || 1}`);
  }
  for (const name of ["architecture", "dtype", "device", "attention_backend"]) {
    if (engine[name]) words.push(String(engine[name]));
  }
  if (engine.max_model_len) words.push(`context ${number(engine.max_model_len)} tokens`);
  words.push(`up ${number(state.uptime_s)} s`);
  if (state.restarts) words.push(`${number(state.restarts)} restarts`);
  say("engine", words.join(" · "));
}

// ---- conversation ---------------------------------------------------------------------------------------------

function bubble(role, text) {
  $("empty").hidden = true;
  const made = element("div", `said ${role}`);
  made.append(element("span", "who", role === "user" ? "You" : "Model"), document.createTextNode(text));
  $("log").append(made);
  scrollDown();
  return made;
}

function scrollDown() {
  $("log").scrollTop = $("log").scrollHeight;
}

// Yields the data of the events of a stream; half an event at its end is none.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield data.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}

function requestFor(text) {
  const settings = {
    model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
  };
  const limit = Number($("max-tokens").value);
  if ($("mode").value === "chat") {
    return ["v1/chat/completions", { ...settings, messages: conversation, max_completion_tokens: limit }];
  }
  return ["v1/completions", { ...settings, prompt: text, max_tokens: limit }];
}

async function ask(text) {
  const chat = $("mode").value === "chat";
  bubble("user", text);
  if (chat) conversation.push({ role: "user", content: text });
  const [path, body] = requestFor(text);
  const answer = bubble("assistant", "");
  answer.setAttribute("aria-busy", "true");
  const words = answer.lastChild;
  const facts = element("p", "facts", "waiting for the first token");
  $("log").append(facts);
  running = new AbortController();
  const stop = running.signal;
  setBusy(true);
  const sent = performance.now();
  let first = null;
  let last = sent;
  let count = 0;
  let reason = null;
  let failure = null;
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify(body),
      signal: stop,
    });
    if (!response.ok) throw new Error(await errorOf(response));
    for await (const data of events(response.body)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message || "the server failed");
      if (event.usage) count = event.usage.completion_tokens ?? count;
      const choice = (event.choices || [])[0];
      if (!choice) continue;
      reason = choice.finish_reason || reason;
      const piece = chat ? (choice.delta || {}).content : choice.text;
      if (piece === undefined || piece === null || (chat && piece === "" && !choice.finish_reason)) continue;
      last = performance.now();
      if (first === null) {
        first = last;
        say("ttft", number(first - sent));
      }
      count += 1;
      const atEnd = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
      words.data += piece;
      facts.textContent = speedOf(count, first - sent, last - first);
      if (atEnd) scrollDown();
    }
    if (reason === null) throw new Error("the answer ended early");
  } catch (error) {
    if (!stop.aborted) failure = error.message;
  }
  running = null;
  answer.removeAttribute("aria-busy");
  let end = reason === "length" ? "at the token limit" : "";
  if (stop.aborted) end = "stopped";
  if (failure !== null) end = `failed: ${failure}`;
  const speed = first === null ? "" : speedOf(count, first - sent, last - first);
  facts.textContent = [speed, end].filter(Boolean).join(" · ");
  if (failure !== null) {
    answer.classList.add("failed");
    facts.classList.add("failed");
  }
  if (!words.data) answer.remove();
  if (chat && words.data) conversation.push({ role: "assistant", content: words.data });
  if (chat && !words.data) conversation.pop(); // unanswered: asking again must not send the question twice
  scrollDown();
  setBusy(false);
}

async function errorOf(response) {
  const body = await response.text();
  try {
    return JSON.parse(body).error.message || `status ${response.status}`;
  } catch {
    return `status ${response.status} ${response.statusText}`;
  }
}

function speedOf(count, ttft, rest) {
  const words = [`first token ${number(ttft)} ms`, `${number(count)} tokens`];
  if (count > 1 && rest > 0) words.push(`${number((1000 * (count - 1)) / rest, 1)} tokens/s`);
  return words.join(" · ");
}

function setBusy(busy) {
  $("send").disabled = busy;
  $("clear").disabled = busy;
  const stopped = document.activeElement === $("stop");
  $("stop").disabled = !busy;
  if (!busy && (stopped || document.activeElement === document.body)) $("message").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value.trim();
  if (running || !text) return;
  $("message").value = "";
  ask(text);
});

$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});

$("stop").addEventListener("click", () => running && running.abort());

$("clear").addEventListener("click", () => {
  conversation = [];
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("message").focus();
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("yalis-key", key);
  pollState();
});

pollForEver();
