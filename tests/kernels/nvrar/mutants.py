"""Broken variants of the protocol: each changes one rule of the real source, and some test must notice.

``python -m tests.kernels.nvrar.mutants`` prints the table mutant -> test.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.nvrar.build import HEADERS, QUICK, THREAD, build, run


@dataclass(frozen=True)
class Mutant:
    """``edits`` are (file, old text, new text); the old text must occur once."""

    name: str
    breaks: str
    edits: Sequence[tuple[str, str, str]]
    program: str  # "explorer.cpp" or "host_driver.cpp"
    arguments: str
    sign: str  # what the output must contain
    flags: Sequence[str] = QUICK


_EXPLORER = "explorer.cpp"
_HOST = "host_driver.cpp"
_HANGS = "no end"

MUTANTS = (
    Mutant(
        "single_buffer",
        "I2",
        [("layout.h", "return epoch & 1u;", "return epoch & 0u;")],
        _EXPLORER,
        "",
        "unread cell would be overwritten",
    ),
    Mutant("wrap_parity", "I2", [("layout.h", "? 2u :", "? 1u :")], _EXPLORER, "", "would be"),
    Mutant(
        "epoch_zero",
        "I1",
        [("layout.h", "return epoch == 0xFFFFFFFFu ? 2u : epoch + 1u;", "return epoch + 1u;")],
        _EXPLORER,
        "",
        "stale cell would be believed",
    ),
    Mutant(
        "idle_advances",
        "I3",
        [
            (
                "protocol.h",
                "if (mine.length == 0) return true;",
                "if (mine.length == 0) { t_.set_epoch(block_, next_epoch(t_.epoch(block_))); return true; }",
            )
        ],
        _EXPLORER,
        "",
        "unread cell would be overwritten",
    ),
    Mutant(
        "idle_skips",
        "I3",
        [
            (
                "protocol.h",
                "if (mine.length == 0) return true;",
                "const uint32_t parts = static_cast<uint32_t>(top_.local), which = static_cast<uint32_t>(top_.index);"
                " if (share(mine.length, parts, which).length == 0) return true;",
            )
        ],
        _EXPLORER,
        "",
        "VIOLATION",
    ),
    Mutant(
        "early_bump",
        "I4",
        [
            (
                "protocol.h",
                "epoch_ = t_.epoch(block_);",
                "epoch_ = t_.epoch(block_); if (t_.thread() == 0) t_.set_epoch(block_, next_epoch(epoch_));",
            )
        ],
        _HOST,
        "direct-small 1 12 1",
        "",
    ),
    Mutant(
        "size_offsets",
        "I5",
        [
            (
                "protocol.h",
                "area_ = Format::kDense ? layout_.dense_area(block_, epoch_) : layout_.area(block_, epoch_);",
                "Layout sized = layout_; sized.slot_packs = (round_length_ + 31) / 32 * 32;"
                " area_ = Format::kDense ? layout_.dense_area(block_, epoch_) : sized.area(block_, epoch_);",
            )
        ],
        _HOST,
        "direct-small 1 12 1",
        "",
    ),
    Mutant(
        "no_sweep",
        "I6",
        [("protocol.h", "if (sweeps(epoch_)) sweep();", "")],
        _EXPLORER,
        "",
        "stale cell would be believed",
    ),
    Mutant(
        "no_sweep_threads",
        "I6",
        [("protocol.h", "if (sweeps(epoch_)) sweep();", "")],
        _HOST,
        "wrap 1 10",
        "WRONG",
    ),
    Mutant(
        "one_sweep",
        "I6",
        [("layout.h", "return (epoch & 0x7FFFFFFEu) == 0x7FFFFFFEu;", "return epoch >= 0xFFFFFFFEu;")],
        _HOST,
        "late-repeat 1 300",
        "WRONG",
    ),
    # Its other consequence, a cell overtaken by the rest of an older put, shows in `staged` in one run of four only.
    Mutant(
        "posts_more",
        "I14",
        [("protocol.h", "kDense ? packs : 2 * packs", "kDense ? packs : (2 * packs + 63) / 64 * 64")],
        _HOST,
        "staged-wrap 1 5",
        "WRONG",
    ),
    Mutant(
        "post_early",
        "settle",
        [("protocol.h", "return t_.all(ok);\n        } else {", "return ok;\n        } else {")],
        _HOST,
        "staged 1 6 5",
        "",
    ),
    Mutant(
        "no_wipe",
        "I12",
        [("protocol.h", "t_.wipe(area_ + at[k]);  // empty", "// empty")],
        _EXPLORER,
        "",
        "not emptied",
    ),
    Mutant(
        "same_memory",
        "I12",
        [
            (
                "layout.h",
                "return lines() + (static_cast<uint64_t>(block) * 2 + parity(epoch)) * slots * slot_packs;",
                "return (static_cast<uint64_t>(block) * 2 + parity(epoch)) * slots * slot_packs;",
            )
        ],
        _HOST,
        "direct-small 1 12 1",
        "",
    ),
    Mutant(
        "all_ones_sent",
        "I13",
        [("protocol.h", "return word == kEmpty ? kOtherNan : word;", "return word;")],
        _HOST,
        "direct-small 1 12 1",
        "GAVE UP",
    ),
    Mutant(
        "one_word",
        "I13",
        [
            (
                "protocol.h",
                "const bool whole = low[k].data0 != Format::kEmpty && low[k].flag0 != Format::kEmpty &&",
                "const bool whole = low[k].data0 != Format::kEmpty || low[k].flag0 != Format::kEmpty ||",
            )
        ],
        _HOST,
        "network-dense 1 6 5",
        "WRONG",
    ),
    Mutant(
        "thread_moves",
        "I7",
        [
            (
                "protocol.h",
                "for (uint32_t first = t_.thread(); first < part.length;",
                "for (uint32_t first = t_.threads() - 1 - t_.thread(); first < part.length;",
            )
        ],
        _HOST,
        "direct-small 1 12",
        "data race",
        THREAD,
    ),
    Mutant(
        "one_flag",
        "I8",
        [("protocol.h", "low[k].flag0 == epoch_ && low[k].flag1 == epoch_ &&", "low[k].flag0 == epoch_ &&")],
        _HOST,
        "network 1 6 5",
        "WRONG",
    ),
    Mutant(
        "keeps_other_than_sent",
        "I9",
        [
            (
                "protocol.h",
                "store(start + i, w);\n        forward(i, w, next);",
                "store(start + i, w); if (next.kind == Hop::kSend) w.w[0] ^= 1u; forward(i, w, next);",
            )
        ],
        _HOST,
        "bits 1 14",
        "bits differ",
    ),
    Mutant(
        "own_first",
        "I9",
        [
            (
                "protocol.h",
                "if (base + k == self) term = mine;",
                "if (base + k == 0) term = mine; else if (base + k == self) term = got[0];",
            )
        ],
        _HOST,
        "direct-small 1 12 1",
        "bits differ",
    ),
    Mutant(
        "tail_drop",
        "I10",
        [
            (
                "layout.h",
                "return {base * part + (part < rest ? part : rest), base + (part < rest ? 1 : 0)};",
                "return {base * part, base + (rest & 0)};",
            )
        ],
        _HOST,
        "direct-small 1 12 1",
        "WRONG",
    ),
    Mutant(
        "no_nan",
        "I11",
        [("protocol.h", "fill_nan({mine.start + done, mine.length - done});", "")],
        _HOST,
        "silent 1 2",
        "NaN 0",
    ),
    Mutant(
        "everybody_tells",
        "I11",
        [("protocol.h", "peer, block_}))\n            for", "peer, block_}), true)\n            for")],
        _HOST,
        "abort 1 3",
        "poisonings",
    ),
    Mutant(
        "no_deadline",
        "I11",
        [("protocol.h", "if (now - since_ < args_.deadline_ns) return true;", "if (now >= since_) return true;")],
        _HOST,
        "silent 1 2",
        _HANGS,
    ),
    Mutant(
        "poison_ignored",
        "I11",
        [
            ("protocol.h", "if (poisoned) {", "if (poisoned && epoch_ == 0) {"),
            ("protocol.h", "if (t_.poisoned()) {", "if (t_.poisoned() && epoch_ == 0) {"),
        ],
        _HOST,
        "silent 1 2",
        _HANGS,
    ),
)


def program_of(mutant: Mutant) -> Path:
    """The test program built against the broken headers."""
    with tempfile.TemporaryDirectory() as folder:
        headers = Path(folder) / "csrc"
        shutil.copytree(HEADERS, headers)
        for file, old, new in mutant.edits:
            text = (headers / file).read_text()
            assert text.count(old) == 1, f"{mutant.name}: {file} must hold once: {old}"
            (headers / file).write_text(text.replace(old, new))
        return build(mutant.program, mutant.flags, headers)


def caught(mutant: Mutant) -> tuple[bool, str]:
    """Whether the mutant's test fails in the expected way, and what it said."""
    status, output = run(program_of(mutant), mutant.arguments, timeout=3 if mutant.sign == _HANGS else 60)
    return status != 0 and mutant.sign in output, output


def _table() -> None:
    print("| mutant | breaks | caught by | which says |\n|---|---|---|---|")
    for mutant in MUTANTS:
        good, output = caught(mutant)
        lines = [
            x
            for x in output.splitlines()
            if any(w in x for w in ("WRONG", "GAVE UP", "VIOLATION", "data race", "no end"))
        ]
        command = f"{Path(mutant.program).stem} {mutant.arguments}".strip()
        said = lines[0].split(":")[0 if lines[0].startswith(("VIOLATION", "no end")) else -1].strip() if lines else "-"
        print(f"| `{mutant.name}` | {mutant.breaks} | `{command}` | {said if good else 'NOT CAUGHT: ' + output} |")


if __name__ == "__main__":
    _table()
