"""From token ids back to characters: which token spells which part of a text."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_interp.core.tokens.generation import repeat_rows
from lightning_interp.errors import PositionError

if TYPE_CHECKING:
    from lightning_interp.core.tokens.step import StepContext

__all__ = [
    "PARTS",
    "find_mention",
    "find_occurrence",
    "ids_of",
    "is_whole",
    "mask_by_text",
    "template_mask",
    "token_spans",
]

PARTS = ("user", "assistant", "system", "template", "inserted", "generation_prompt")
"""What a token of a templated conversation can belong to; the last two are parts of those before."""

_UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
"""Thai, Tibetan, Burmese, Khmer, Chinese, Japanese; Korean, whose particles follow names without a space."""
_LETTER = rf"[^\W{_UNSPACED}\U00020000-\U0003ffff]"
_JOINED = re.compile(rf"(?:{_LETTER}|[\u0300-\u036f])(?:{_LETTER}|[\u0300-\u036f])")
_HALF = "\ufffd"  # a tokenizer's stand-in for the first bytes of an unfinished character


class Mark(NamedTuple):
    """How one role's turn opens and ends, the last by its ``tail``; one without a header comes after ``lead``."""

    role: str
    header: str
    end: str
    tail: str = ""
    lead: str = ""


_FOLDED = Mark("system", "", "")
"""Of a template that writes system text where the user's stands."""
_LAYOUTS: weakref.WeakKeyDictionary[Any, tuple[Any, list[Mark], str]] = weakref.WeakKeyDictionary()


def token_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Decoded text of a row's tokens, and the half-open span of characters of each; two may share a character."""

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text, spans = decode(ids), list[tuple[int, int]]()
    start, fresh = 0, 0  # a window of tokens is decoded: those before `fresh` for context, text[:done] is theirs
    done, begin, context, before = 0, 0, 0, ""
    for n in range(1, len(ids) + 1):
        window = decode(ids[start:n])
        new = window[context:]
        if new.endswith(_HALF) and new == before:
            spans.append((spans[-1][1] - 1, spans[-1][1]))  # one more byte of the character that is not finished
            continue
        same = next((i for i, one in enumerate(new) if one != text[done + i : done + i + 1]), len(new))
        spans.append((begin, done + same + (same < len(new))))
        begin, before = done + same, new
        if same == len(new) and not new.endswith(_HALF):
            start, fresh, done, before = fresh, n, begin, ""
            context = len(decode(ids[start:n]))
    return text, spans


def find_occurrence(text: str, part: str, which: str) -> list[tuple[int, int]]:
    """Half-open character spans of the ``first``, ``last`` or ``all`` mentions of ``part`` in ``text``."""
    starts, at = [], text.find(part)
    while at >= 0:
        starts.append(at)
        at = text.find(part, at + 1)
    return _chosen([(start, start + len(part)) for start in starts], which)


def find_mention(text: str, part: str, which: str) -> list[tuple[int, int]]:
    """The same for a name: mentions that are words of their own; without any, pieces (the ``Ann`` of ``Anna``)."""
    places = find_occurrence(text, part, "all")
    return _chosen([place for place in places if is_whole(text, *place)] or places, which)


def is_whole(text: str, begin: int, end: int) -> bool:
    """Whether no word goes on beyond a place; scripts that are written without spaces have no such bounds."""
    return not any(_JOINED.fullmatch(text[max(0, at - 1) : at + 1]) for at in (begin, end))


def _chosen(places: list[tuple[int, int]], which: str) -> list[tuple[int, int]]:
    return {"first": places[:1], "last": places[-1:], "all": places}[which]


def template_mask(tokenizer: Any, ids: Sequence[int], part: str) -> torch.Tensor:
    """Which tokens of a row belong to a part of a chat (see ``PARTS``), bool ``[T]``.

    Headers and ends of turns are read off the tokenizer's own template, and looked for in the decoded text.
    """
    if part not in PARTS:
        raise PositionError(f"Unknown part {part!r} of a chat template; expected one of {', '.join(PARTS)}.")
    if getattr(tokenizer, "chat_template", None) is None:
        raise PositionError(f"ChatTemplate({part!r}) needs a tokenizer with a chat template, but this one has none.")
    text, spans = token_spans(tokenizer, ids)
    try:
        marks, own = _layout(tokenizer)
    except Exception as error:
        raise PositionError(
            f"Cannot tell how this tokenizer's chat template lays out turns: {error!r}. Mark positions with FromBatch."
        ) from error
    if part == "system" and _FOLDED in marks:
        raise PositionError(
            "ChatTemplate('system'): this tokenizer's chat template writes the system text into the user's turn, so "
            "the two cannot be told apart. Mark positions with FromBatch, or name the text with Substring."
        )
    turns = _turns(text, marks)
    if part == "template":
        inside = [any(a >= begin and b <= end for _, begin, end in turns) for a, b in spans]
        return ~torch.tensor(inside, dtype=torch.bool)
    if part == "generation_prompt":
        start, stop = _answer_header(text, turns, marks)
        return torch.tensor([a < stop and b > start for a, b in spans], dtype=torch.bool)
    if part == "inserted":
        wanted = [(begin, end) for who, begin, end in turns if own and who == "system" and own == text[begin:end]]
    else:
        wanted = [(begin, end) for who, begin, end in turns if who == part]
    return torch.tensor([any(a >= begin and b <= end for begin, end in wanted) for a, b in spans], dtype=torch.bool)


def _layout(tokenizer: Any) -> tuple[list[Mark], str]:
    """A template's marks and own system text, rendered once for what it writes: it may write the day's date too."""
    state = (tokenizer.chat_template, getattr(tokenizer, "special_tokens_map", None), date.today())
    known = _LAYOUTS.get(tokenizer)
    if known is None or known[0] != state:
        marks = _marks(tokenizer)
        known = _LAYOUTS[tokenizer] = (state, marks, _own_system(tokenizer, marks))
    return known[1:]


def _own_system(tokenizer: Any, marks: Sequence[Mark]) -> str:
    """The system text that a template writes where none is given; empty without one."""
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": "@"}], tokenize=False))
    return next((text[begin:end] for role, begin, end in _turns(text, marks) if role == "system"), "")


def _answer_header(text: str, turns: Sequence[tuple[str, int, int]], marks: Sequence[Mark]) -> tuple[int, int]:
    """Where the header of the last answer stands; ``(0, 0)`` without an answer."""
    begin = next((begin for role, begin, _ in reversed(turns) if role == "assistant"), 0)
    headers = [mark.header for mark in marks if mark.role == "assistant" and text[:begin].endswith(mark.header)]
    return begin - max(map(len, headers), default=0), begin


def _marks(tokenizer: Any) -> list[Mark]:
    """How turns open and end: contents that are easy to find again are put through the tokenizer's own template."""

    def render(*roles: str, ask: bool = False) -> list[str]:
        chat = [{"role": role, "content": f"@{i}@"} for i, role in enumerate(roles)]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask))
        return [part for i in range(len(roles)) for part in _cut(text, i, len(roles))]

    before, user_end = render("user")
    _, to_assistant, to_user, _ = render("user", "assistant", "user")
    _, _, assistant_end = render("user", "assistant")
    user, assistant = _header(to_user, assistant_end), _header(to_assistant, user_end)
    ends = {"user": _end(user_end, to_assistant), "assistant": _end(assistant_end, to_user)}
    marks = [
        Mark("user", user, *ends["user"]),
        Mark("assistant", assistant, *ends["assistant"]),
        Mark("assistant", _header(render("user", ask=True)[1], user_end), *ends["assistant"]),
    ]
    try:
        opening, gap, _ = render("system", "user")
    except Exception:  # a template may refuse system turns with any error it likes
        return marks
    lead = before.removesuffix(user) if before.endswith(user) else ""
    header, ends_with_user = opening.removeprefix(lead), gap.endswith(user) and bool(user.strip())
    if not header.strip() or (not header.removesuffix(user).strip() and not ends_with_user):
        # Nothing stands before the system text, or what stands before any user's.
        return [*marks, Mark("system", "", gap, lead=opening) if ends_with_user else _FOLDED]
    if ends_with_user:
        return [*marks, Mark("system", header, *_end(gap.removesuffix(user), gap))]
    return [*marks, Mark("system", header, gap), Mark("user", gap, *ends["user"])]


def _cut(text: str, i: int, count: int) -> list[str]:
    """The text before the i-th content, and behind the last one."""
    start = text.index(f"@{i - 1}@") + len(f"@{i - 1}@") if i else 0
    here = text.index(f"@{i}@")
    return [text[start:here], text[here + len(f"@{i}@") :]] if i == count - 1 else [text[start:here]]


def _header(transition: str, end: str) -> str:
    """What opens a turn; where nothing but the end of the last turn does, that end."""
    rest = transition.removeprefix(end)
    return rest if rest.strip() else transition


def _end(end: str, transition: str) -> tuple[str, str]:
    """What ends a turn, and the last one: a blank end is none, as texts hold blanks, but for the next turn's header.

    Line breaks behind an end mark may be missing after the last turn.
    """
    return (end.rstrip("\n"), "") if end.strip() else (transition.rstrip(), end)


def _turns(text: str, marks: Sequence[Mark]) -> list[tuple[str, int, int]]:
    """(role, begin, end) of what each role said, by reading the text from left to right."""
    turns = list(_unannounced(text, marks))
    at = turns[-1][2] if turns else 0
    while True:
        found = [(text.find(mark.header, at), -len(mark.header), mark) for mark in marks if mark.header]
        found = [place for place in found if place[0] >= 0]
        if not found:
            return turns
        start, length, mark = min(found, key=lambda place: place[:2])
        begin = start - length
        end = text.find(mark.end, begin)
        end = max(begin, len(text) - len(mark.tail) * text.endswith(mark.tail)) if end < 0 else end
        turns.append((mark.role, begin, end))
        at = end


def _unannounced(text: str, marks: Sequence[Mark]) -> Iterator[tuple[str, int, int]]:
    """The system text that opens a conversation without a header."""
    for mark in marks:
        if mark.role == "system" and not mark.header and mark is not _FOLDED:
            begin = len(mark.lead) if text.startswith(mark.lead) else 0
            end = text.find(mark.end, begin)
            if end >= 0 and not any(text.startswith(other.header, begin) for other in marks if other.header):
                yield mark.role, begin, end


def mask_by_text(
    step: StepContext, selector: Hashable, choose: Callable[[Any, list[int], int], torch.Tensor]
) -> torch.Tensor:
    """A mask ``[B, T]`` that ``choose(tokenizer, ids, row)`` works out row by row in the prompt; once for all sites."""
    if selector not in step.cache:
        step.cache[selector] = step.window(_prompt_part(step, selector, choose))
    found: torch.Tensor = step.cache[selector]
    return found


def _prompt_part(
    step: StepContext, selector: Hashable, choose: Callable[[Any, list[int], int], torch.Tensor]
) -> torch.Tensor:
    """The same over the prompt's columns ``[B, P]``, once a call of ``generate``; ``[B, 0]`` where none is read."""
    told = step.generation
    step.check_text()
    notes, key = (step.cache, "prompt part") if told is None else (told.notes, step.batch_size)
    if (selector, key) not in notes:
        part = (
            told is None and step.known_prompt_lengths is not None and bool((step.lengths < step.prompt_lengths).any())
        )
        if told is not None and told.ids is not None:
            ids, valid = repeat_rows(told.ids, step.batch_size), step.prompt_mask[:, step.virtual :]
        elif step.past <= step.virtual and not part:
            ids, valid = ids_of(step, selector), step.valid
        elif step.length == 1 and told is None and not part:
            return step.valid[:, :0]
        else:
            raise PositionError(
                f"{selector} reads the prompt's text, but this pass of {step.length} columns after {step.past} holds a "
                "part of it. Call generate with the whole prompt as input_ids, or mark positions with FromBatch."
            )
        notes[selector, key] = _rows_by_text(step, selector, choose, ids.cpu(), valid.cpu())
    found: torch.Tensor = notes[selector, key]
    return found


def _rows_by_text(
    step: StepContext,
    selector: Hashable,
    choose: Callable[[Any, list[int], int], torch.Tensor],
    ids: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    tokenizer, chosen = _tokenizer(step, selector), torch.zeros(ids.shape, dtype=torch.bool)
    for row in range(step.batch_size):
        columns = valid[row].nonzero().flatten()
        chosen[row, columns] = choose(tokenizer, ids[row, columns].tolist(), row)
    return chosen.to(step.device)


def ids_of(step: StepContext, selector: object) -> torch.Tensor:
    """The token ids of a pass ``[B, T]``."""
    if step.input_ids is None:
        raise PositionError(f"{selector} reads token ids, but the model was called with inputs_embeds. Pass input_ids.")
    return step.input_ids


def _tokenizer(step: StepContext, selector: object) -> Any:
    tokenizer = step.find_tokenizer()
    if tokenizer is None:
        raise PositionError(f"{selector} reads text, which needs a tokenizer. Pass attach(model, tokenizer=...).")
    return tokenizer
