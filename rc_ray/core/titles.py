"""Titles as the model will read them: one printable line, free of chat control tokens."""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

# Control characters, soft hyphens, zero-width spaces, bidirectional marks and overrides, byte order
# marks, private use and noncharacters. The joiners U+200C and U+200D stay: scripts need them.
_UNPRINTABLE_RANGES = (
    (0x00, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x200B, 0x200B), (0x200E, 0x200F),
    (0x2028, 0x202E), (0x2060, 0x206F), (0xFDD0, 0xFDEF), (0xE000, 0xF8FF), (0xFEFF, 0xFEFF),
    (0xFFF0, 0xFFFB), (0xFFFE, 0xFFFF),
)  # fmt: skip
# What Python's `str.split` takes for white space and is not among the above.
_SPACES = (
    (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x202F, 0x202F),
    (0x205F, 0x205F), (0x3000, 0x3000),
)  # fmt: skip

# How chat models of today spell their control tokens: <|im_start|>, <s>, [INST], <<SYS>>,
# <start_of_turn>, <tool_call> ... A tokenizer's own list is applied again by core/prompts.py.
_CONTROL = (
    r"([<\[])("
    r"[|｜][^<>|｜]{1,60}[|｜]>"
    r"|/?(?:s|bos|eos|pad|unk|mask|cls|sep|BOS|EOS|PAD|UNK|MASK|CLS|SEP)[>\]]"
    r"|/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|gMASK|sop|eop)[\]>]"
    r"|</?SYS>>"
    r"|/?(?:think|tool_call|tool_response|tools|im_start|im_end|endoftext)>"
    r"|(?:start|end|begin)_of_[a-z_]{1,30}>"
    r"|(?:start|end)_header_id>"
    r"|(?:extra_id_|unused|reserved_)[0-9]{1,5}>"
    r")"
)
_CONTROL_TOKEN = re.compile(_CONTROL)


def _character_class(ranges: tuple[tuple[int, int], ...], form: str) -> str:
    return "[" + "".join(f"{form % low}-{form % high}" for low, high in ranges) + "]+"


_UNPRINTABLE = re.compile(_character_class(_UNPRINTABLE_RANGES, r"\u%04x"))
_GAP_RE2 = _character_class(_UNPRINTABLE_RANGES + _SPACES, r"\x{%04x}")


@dataclass(frozen=True)
class CleanTitles:
    titles: pa.Array
    """(N,) text, empty where nothing was left."""
    num_with_control_tokens: int
    num_cut: int


def clean_title(title: str | None, max_characters: int) -> str:
    """Printable text on one line, at most `max_characters` long; empty when nothing is left.

    Control tokens of chat models are broken apart by a space after their first character.
    """
    if not title:
        return ""
    text = title
    for _ in range(2):  # shops export titles escaped twice: "&amp;amp;"
        text = html.unescape(text)
    text = _UNPRINTABLE.sub(" ", unicodedata.normalize("NFC", text))
    text = " ".join(text.split())
    while _CONTROL_TOKEN.search(text):  # one token may stand inside another
        text = _CONTROL_TOKEN.sub(r"\1 \2", text)
    return text[:max_characters].rstrip()


def clean_titles(titles: pa.Array, max_characters: int) -> CleanTitles:
    """`clean_title` of every title at once.

    Args:
        titles: (N,) strings, nulls allowed.
        max_characters: where longer titles are cut.
    """
    text = pc.fill_null(titles, "")
    escaped = pc.match_substring(text, "&")
    if pc.any(escaped).as_py():
        plain = [html.unescape(html.unescape(one)) for one in text.filter(escaped).to_pylist()]
        text = pc.replace_with_mask(text, escaped, pa.array(plain, pa.string()))
    text = pc.utf8_normalize(text, form="NFC")
    text = pc.replace_substring_regex(text, pattern=_GAP_RE2, replacement=" ")
    text = pc.utf8_trim_whitespace(text)
    broken = text
    while pc.any(pc.match_substring_regex(broken, _CONTROL)).as_py():
        broken = pc.replace_substring_regex(broken, pattern=_CONTROL, replacement=r"\1 \2")
    num_controlled = pc.sum(pc.not_equal(broken, text)).as_py() or 0
    num_cut = pc.sum(pc.greater(pc.utf8_length(broken), max_characters)).as_py() or 0
    cut = pc.utf8_slice_codeunits(broken, 0, max_characters)
    return CleanTitles(pc.utf8_rtrim_whitespace(cut), num_controlled, num_cut)
