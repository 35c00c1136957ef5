"""Train the demo checkpoint: a byte-level BPE tokenizer and a small Llama on licence texts.

The result is a folder in Hugging Face layout, small enough to keep in the repository, whose continuations read like
licence language. It exists to run the engine end to end on real input; it is no useful language model.

    nice -n 15 .venv/bin/python tools/train_demo_model.py --text-dir /usr/share/common-licenses --output models/demo

One thread, fixed seeds: two runs with the same texts, torch build and CPU type give the same weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS, IM_START, IM_END = "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [BOS, EOS, IM_START, IM_END]
VOCAB_SIZE = 2048
MAX_POSITIONS = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPTS = [
    "This program is free software",
    "The licenses for most software",
    "You may copy and distribute",
    "THERE IS NO WARRANTY",
]


def read_documents(text_dir: Path) -> dict[str, str]:
    """Texts by file name, links to the same file counted once, paragraphs unwrapped to one line each."""
    documents = {}
    for path in sorted(text_dir.iterdir()):
        if path.is_symlink() or not path.is_file():
            continue
        raw = path.read_text(encoding="utf-8", errors="replace").replace("\f", "\n")
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", raw)]
        documents[path.name] = "\n\n".join(p for p in paragraphs if p)
    if not documents:
        raise SystemExit(f"error: no text files in {text_dir}; name a folder of plain texts with --text-dir")
    return documents


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE over ``texts``; every string can be encoded, BOS is put in front of what is encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"error: the texts give {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}: use more text")
    return tokenizer


class Sampler:
    """Draws training rows, all starting with BOS as every prompt does at inference.

    Rows are cut at word starts of the raw text and encoded afresh, so that the first word is tokenized as in a prompt
    (without a space in front). A share of the short rows are dialogues: the user gives the beginning of a paragraph,
    the assistant continues it.
    """

    def __init__(self, tokenizer: Tokenizer, documents: dict[str, str], seed: int):
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.texts = list(documents.values())
        self.starts = [[m.start() for m in re.finditer(r"\S+", text)] for text in self.texts]
        self.paragraphs = [p for text in self.texts for p in text.split("\n\n") if len(p.split()) >= 12]
        self.bos, self.eos, self.im_start, self.im_end = (tokenizer.token_to_id(t) for t in SPECIAL)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _text_row(self, length: int) -> list[int]:
        doc = self.rng.choices(range(len(self.texts)), weights=[len(s) for s in self.starts])[0]
        text, starts = self.texts[doc], self.starts[doc]
        # One row in ten begins with the document, so that BOS alone starts a licence.
        start = 0 if self.rng.random() < 0.1 else self.rng.choice(starts)
        piece = text[start : start + 8 * length]
        row = [self.bos, *self._encode(piece)]
        if start + len(piece) == len(text):
            row.append(self.eos)
        return row

    def _chat_row(self, length: int) -> list[int]:
        row = [self.bos]
        while len(row) < length:
            words = self.rng.choice(self.paragraphs).split(" ")
            cut = self.rng.randint(3, min(12, len(words) - 4))
            for role, content in (("user", words[:cut]), ("assistant", words[cut:])):
                row += [self.im_start, *self._encode(f"{role}\n" + " ".join(content)), self.im_end, *self._encode("\n")]
        return row

    def batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels, int64 ``[rows, length]`` each with ``rows * length == tokens``; labels padded by -100."""
        length = self.rng.choices([256, 512, MAX_POSITIONS], weights=[0.75, 0.15, 0.1])[0]
        inputs = torch.full((tokens // length, length), self.eos)
        labels = torch.full_like(inputs, -100)
        for i in range(len(inputs)):
            chat = length == 256 and self.rng.random() < 0.3
            row = torch.tensor((self._chat_row if chat else self._text_row)(length)[:length])
            inputs[i, : len(row)] = row
            labels[i, : len(row)] = row
        return inputs, labels


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write the checkpoint (bf16) in Hugging Face layout; each file is replaced whole, so readers see no half file."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        tmp = Path(name)
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp)
        tokenizer.save(str(tmp / "tokenizer.json"))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_POSITIONS,
            "chat_template": CHAT_TEMPLATE,
        }
        (tmp / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        (tmp / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        for file in sorted(tmp.iterdir()):
            file.chmod(0o644)
            os.replace(file, output / file.name)


def transcript(model: LlamaForCausalLM, tokenizer: Tokenizer, tokens: int = 60) -> list[tuple[str, str]]:
    """Greedy continuations of `PROMPTS` by the bf16 model that was saved."""
    frozen = copy.deepcopy(model).to(torch.bfloat16).eval()
    pairs = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        with torch.no_grad():
            out = frozen.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        pairs.append((prompt, tokenizer.decode(out[0, ids.shape[1] :].tolist())))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text-dir", type=Path, default=Path("/usr/share/common-licenses"))
    parser.add_argument("--output", type=Path, default=Path("models/demo"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tokens-per-step", type=int, default=2048, help="a multiple of 1024")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3, help="peak; cosine to a twentieth of it")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    documents = read_documents(args.text_dir)
    tokenizer = train_tokenizer(list(documents.values()))
    bos, eos, _, im_end = (tokenizer.token_to_id(t) for t in SPECIAL)
    characters = sum(map(len, documents.values()))
    ids = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in documents.values())
    print(f"{len(documents)} documents, {characters} characters, {ids} tokens", flush=True)

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=[eos, im_end], pad_token_id=eos, do_sample=True, temperature=0.7, top_p=0.9
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters", flush=True)

    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    warmup = max(1, min(100, args.steps // 10))

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    sampler = Sampler(tokenizer, documents, args.seed)
    started, recent = time.monotonic(), []
    model.train()
    for step in range(1, args.steps + 1):
        inputs, labels = sampler.batch(args.tokens_per_step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        recent = [*recent[-49:], loss.item()]
        if step % 25 == 0 or step == args.steps:
            mean = sum(recent) / len(recent)
            print(f"step {step} loss {mean:.4f} after {time.monotonic() - started:.0f} s", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save(model, tokenizer, args.output)
    for prompt, text in transcript(model, tokenizer):
        print(f"--- {prompt!r}\n{text}", flush=True)


if __name__ == "__main__":
    main()
