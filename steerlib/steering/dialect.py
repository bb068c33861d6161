"""Parts of a text that its chat template or delimiters tell apart: what a user said, an answer, thinking, code.

A part lies between delimiters. It is told by the text as it is read, character by character, so that a token's share depends on
what came before it alone: cached, uncached and streamed runs agree. A token that has a character of a part lies in it, and so
does one that completes its opening delimiter or has characters of its closing one. A new turn of the chat ends every part.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os.path import commonprefix
from typing import Any

ROLES = ("system", "user", "assistant")
DELIMITERS: dict[str, dict[str, tuple[str, ...]]] = {
    "thinking": {
        "<think>": ("</think>", "<|tool_calls_section_begin|>"),
        "[THINK]": ("[/THINK]",),
        "◁think▷": ("◁/think▷",),
        "<seed:think>": ("</seed:think>",),
        "<|START_THINKING|>": ("<|END_THINKING|>",),
        "<|channel>": ("<channel|>",),
        "<|channel|>analysis<|message|>": ("<|end|>",),
    },
    "tool-call": {
        "<tool_call>": ("</tool_call>",),
        "<|tool_call>": ("<tool_call|>",),
        "<seed:tool_call>": ("</seed:tool_call>",),
        "<minimax:tool_call>": ("</minimax:tool_call>",),
        "[TOOL_CALLS]": ("</s>",),
        "<start_function_call>": ("<end_function_call>",),
        "<|python_tag|>": ("<|eom_id|>", "<|eot_id|>"),
        "<|START_ACTION|>": ("<|END_ACTION|>",),
        "<|tool_calls_section_begin|>": ("<|tool_calls_section_end|>",),
        "<｜tool▁calls▁begin｜>": ("<｜tool▁calls▁end｜>",),
        "<|channel|>commentary": ("<|call|>", "<|end|>"),
    },
}
"""Opening delimiters of families of models, and what closes each; a model has those that its tokens or its template name.
Compared with the parsers of vLLM and with published outputs of Qwen, DeepSeek, Mistral, Kimi, Seed-OSS, MiniMax, Command A,
Gemma 4, Llama 3 and gpt-oss (whose commentary may also be said to the user)."""
WORDS = (*ROLES, "answer", *DELIMITERS, "code", "json")
"""Parts by name; `not-` before one means all but it, and two delimiters around `...` what is between them."""
State = Any


class Part(ABC):
    """Tells where a part of a text is. `start` is what it knows before the first character."""

    start: State
    lasts: bool = False
    """Whether a new turn of a chat does not end it by itself."""

    @abstractmethod
    def read(self, state: State, text: str) -> tuple[bool, State]:
        """Whether some of the text that comes next lies in it, and what it knows then."""


@dataclass(frozen=True)
class Between(Part):
    """What lies between texts that open it and texts that close it, these included."""

    opens: tuple[str, ...]
    closes: tuple[str, ...]
    lasts: bool = False
    start: State = (False, "")

    def read(self, state: State, text: str) -> tuple[bool, State]:
        inside, tail = state
        touched, rest = inside, tail + text
        while (end := _end(rest, self.closes if inside else self.opens)) is not None:
            inside, touched, rest = not inside, True, rest[end:]
        return touched, (inside, rest[-self.reach :])

    @cached_property
    def reach(self) -> int:
        """Characters that may belong to a delimiter which is not complete yet."""
        return max(map(len, (*self.opens, *self.closes)))


class Braces(Part):
    """JSON that begins a line: from a `{`, or what follows a `[` in JSON, to where all brackets are closed again."""

    start = (0, "", "")

    def read(self, state: State, text: str) -> tuple[bool, State]:
        depth, quote, line = state
        touched = depth > 0
        for char in text:
            if not depth:
                if line == "[" and char in '"{[]-0123456789':
                    depth = 1
                elif line or char != "{":
                    opens, blank = not line and char == "[", char.isspace() and (char != "\n" or line == "[")
                    line = line if blank else "" if char == "\n" else "[" if opens else "prose"
                    continue
                line = "json"
            depth, quote = _nested(depth, quote, char)
            touched = True
        return touched, (depth, quote, line)


def _nested(depth: int, quote: str, char: str) -> tuple[int, str]:
    """How many brackets are open after a character, and whether it leaves a string open, or escapes what follows there."""
    if quote:
        return depth, '"' if quote == "\\" else "\\" if char == "\\" else "" if char == '"' else quote
    return depth + (char in "{[") - (char in "}]"), '"' if char == '"' else ""


def _end(text: str, delimiters: Iterable[str]) -> int | None:
    """Where the first of some delimiters is complete."""
    return min((at + len(one) for one in delimiters if (at := text.find(one)) >= 0), default=None)


class Dialect:
    """How one tokenizer writes: the text of a token, and what delimits parts of a text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self._texts = tokenizer, {-1: ""}
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        """A token in front, without which some tokenizers leave out a space."""

    def text(self, token: int) -> str:
        """What a token adds to a text."""
        if (known := self._texts.get(token)) is None:
            before, both = (self._decoded(ids) for ids in (self._before, [*self._before, token]))
            known = self._texts[token] = both[len(before) :] if both.startswith(before) else self._decoded([token])
        return known

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def turns(self) -> dict[str, tuple[str, str]]:
        """What opens and what closes the turn of each role, learned from chats that the template writes; empty where it does
        not tell them apart."""
        whole = self._pieces("system", "user", "assistant", "user")
        roles = ROLES if whole else ROLES[1:]
        whole, answered, asked = whole or self._pieces(*roles, "user"), self._pieces(*roles), self._pieces(*roles[:-1])
        if not (whole and answered and asked):
            return {}
        *first, answers, asks, _ = whole
        ends = {"user": commonprefix([asked[-1], answers]), "assistant": commonprefix([answered[-1], asks])}
        opens = {"user": _without(asks, ends["assistant"]), "assistant": _without(answers, ends["user"])}
        if len(first) == 2 and first[1].endswith(opens["user"]):
            alike = opens["user"].replace("user", "system")
            opens["system"] = alike if alike in first[0] else first[0].lstrip()
            ends["system"] = first[1].removesuffix(opens["user"])
        found = {role: (opens[role], ends[role].rstrip()) for role in ROLES if opens.get(role)}
        return found if self._tells(found, roles, whole) else {}

    def _pieces(self, *roles: str) -> list[str]:
        """What a template writes before, between and after what is said in a chat; empty where it does not write that chat."""
        chat = [{"role": role, "content": said} for role, said in zip(roles, SAID, strict=False)]
        try:
            rest = self.tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception:  # there is no template, or it raises whatever it likes where it has no such role
            return []
        pieces = []
        for message in chat:
            before, found, rest = rest.partition(message["content"])
            if not found:
                return []
            pieces.append(before)
        return [*pieces, rest]

    def _tells(self, turns: dict[str, tuple[str, str]], roles: Sequence[str], pieces: Sequence[str]) -> bool:
        """Whether each message of a chat would be found in the turn of its role alone."""
        for name in turns:
            part = _turn(name, turns)
            state = part.start
            for role, before, said in zip((*roles, "user"), pieces, SAID, strict=False):
                _, state = part.read(state, before)
                touched, state = part.read(state, said)
                if touched != (role == name):
                    return False
        return True

    @lru_cache(maxsize=64)  # noqa: B019 - a tokenizer has one
    def parts(self, name: str) -> tuple[Part, ...]:
        """What tells where the part of this name is; none where this tokenizer cannot tell."""
        if name in ROLES:
            return (_turn(name, self.turns),) if name in self.turns else ()
        if name == "code":
            return (Between(("```",), ("```",)),)
        if name == "json":
            return (Braces(),)
        if (given := between(name)) is not None:
            return (Between(given[:1], given[1:]),)
        known, written = self.tokenizer.get_vocab(), str(getattr(self.tokenizer, "chat_template", None))
        pairs = DELIMITERS[name].items()
        return tuple(Between((one,), closes) for one, closes in pairs if one in known or one in written)

    def step(self, parts: Sequence[Part], state: State, text: str) -> tuple[bool, State]:
        """Whether some of the text that comes next lies in one of some parts, and what they know then."""
        tail, states = state
        openers = [opener for opener, _ in self.turns.values()]
        touched, most = False, max(map(len, openers), default=0)
        while True:
            end = _end(tail + text, openers)
            until = None if end is None else end - len(tail)
            read = [part.read(state, text[:until]) for part, state in zip(parts, states, strict=True)]
            touched = touched or any(one for one, _ in read)
            states = tuple(after for _, after in read)
            if until is None:
                return touched, ((tail + text)[-most:] if most else "", states)
            states = tuple(after if part.lasts else part.start for part, after in zip(parts, states, strict=True))
            tail, text = "", text[until:]

    def begin(self, parts: Sequence[Part]) -> State:
        """What some parts know before the first token."""
        return "", tuple(part.start for part in parts)


SAID = ("alpha", "bravo", "charlie", "delta")
"""Messages of the chats that a template is learned from."""


def _without(text: str, front: str) -> str:
    """A delimiter behind what closes the turn before; both where they are one."""
    return text.removeprefix(front).lstrip() or text.lstrip()


def _turn(role: str, turns: dict[str, tuple[str, str]]) -> Between:
    """The turns of one role, which those of others close, too."""
    others = (opener for other, (opener, _) in turns.items() if other != role)
    return Between(turns[role][:1], tuple(filter(None, (turns[role][1], *others))), lasts=True)


def is_word(word: str) -> bool:
    """Whether it names a part of a text, or all but one."""
    return (part := word.removeprefix("not-")) in WORDS or between(part) is not None


def between(name: str) -> tuple[str, str] | None:
    """The two delimiters of a part that was named by them, as `<a>...</a>`."""
    opener, dots, closer = name.partition("...")
    return (opener, closer) if dots and opener and closer else None


@lru_cache(maxsize=16)
def dialect(tokenizer: Any) -> Dialect:
    """The one dialect of a tokenizer."""
    return Dialect(tokenizer)
