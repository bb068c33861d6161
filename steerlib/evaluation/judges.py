"""Judges: functions of requests and of what answers them that give a score for each; one that asks an endpoint."""

import base64
import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from inspect import signature
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ..bank.concepts import printable
from ..errors import BadEdit, NoScore
from ..text import progress

Judge = Callable[..., Any]
"""`judge(requests, answers)` gives a number for each answer, the more the better. Answers are texts; or pictures, bytes
`[B, H, W, 3]`, with their prompts as requests. A judge with a parameter `concept` is given the name of the concept."""
RUBRIC = 'How much does the answer show this: "{concept}"?'
TRIES = 5
PAUSE, LONGEST = 1.0, 60.0
"""Seconds before a second try, doubled before each further one, and seconds at most."""
AGAIN = (408, 409, 425, 429)
"""Answers of a server, beside 500 and above, after which it is asked again."""
SHOWN = 200
SCORE = re.compile(r"[^\w-]*(?:score|rating)?[^\w-]*(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?\W*", re.IGNORECASE)
THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


def is_told(judge: Judge) -> bool:
    """Whether a judge is given the name of the concept."""
    try:
        return "concept" in signature(judge).parameters
    except ValueError:  # of a function that is not written in Python
        return False


def judged(judge: Judge, requests: Sequence[str], answers: Any, concept: str) -> Float[np.ndarray, " answers"]:
    """The scores of a judge; raises `NoScore` unless it gives a finite number for each answer."""
    given = {"concept": concept} if is_told(judge) else {}
    said = judge(requests, answers, **given)
    try:
        found = np.asarray(said, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (len(requests),) or not np.isfinite(found).all():
        raise NoScore(f"expected a finite number from judge= for each of {len(requests)} answers, got {said!r:.80}")
    return found


def trained(judge: Any) -> Judge:
    """A judge that learned from texts (`evaluation.text.Judge`), as one of requests and answers."""

    def score(requests: Sequence[str], answers: Sequence[str], concept: str) -> Any:  # noqa: ARG001
        return judge(answers)[:, judge.names.index(concept)]

    return score


class Cost(NamedTuple):
    """What an endpoint was asked: requests that it answered, answers that were kept from before, tokens that it says it read
    and wrote, and answers of which it does not say how many."""

    asked: int = 0
    kept: int = 0
    read: int = 0
    written: int = 0
    unsaid: int = 0

    def __str__(self) -> str:
        unsaid = f", {self.unsaid} answers without a count of tokens" if self.unsaid else ""
        return f"{self.asked} asked, {self.kept} kept from before, {self.read} tokens read, {self.written} written{unsaid}"


class Endpoint:
    """A judge that asks a language model behind any address that speaks the OpenAI protocol for a number.

    It shows the model a request and an answer, text or picture. What does not answer in time, is busy (429), fails (500 and
    above) or gives no number is asked again, after a pause that doubles; other refusals end it. Scores are kept in a file, if
    one is named, so that the same answer is paid for once. Printing it shows what was asked and how many tokens that took.

    Args:
        url: the address before `/chat/completions`, such as `http://localhost:8000/v1`.
        model: its name there.
        rubric: what the number says; `{concept}` in it stands for the concept's name.
        scale: the least and the highest number.
        key: name of the environment variable that holds the key, which is read when it is needed and kept nowhere. Without such
            a variable, none is sent.
        cache: file that keeps scores, as JSON lines.
        timeout: seconds to wait for an answer.
        at_once: requests under way at the same time.
        options: further fields of the request, such as `max_tokens=8`. Default: `temperature=0`.

    Raises `NoScore` where no number was had after several tries.

    >>> judge = sl.Endpoint("http://localhost:8000/v1", "my-model", rubric="How polite is the answer?")
    >>> judge
    Endpoint('http://localhost:8000/v1', 'my-model'): 0 asked, 0 kept from before, 0 tokens read, 0 written
    >>> table = sl.sweep(model, bank, {"polite": [0, 1, 2]}, prompts=prompts, judge=judge)           # doctest: +SKIP
    """

    def __init__(
        self, url: str, model: str, *, rubric: str = RUBRIC, scale: tuple[float, float] = (0, 10), key: str = "OPENAI_API_KEY",
        cache: str | os.PathLike[str] | None = None, timeout: float = 60.0, at_once: int = 4, **options: Any,
    ):  # fmt: skip
        if not re.match(r"https?://", url):
            raise BadEdit(f"expected the address of an endpoint, such as http://localhost:8000/v1, got {url!r:.80}")
        if not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise BadEdit("expected key= as the name of an environment variable that holds the key, not the key itself")
        self.url, self.model, self.rubric, self.scale, self.key = url.rstrip("/"), model, rubric, scale, key
        self.timeout, self.at_once, self.options = timeout, at_once, {"temperature": 0.0, **options}
        self.cache, self.cost = None if cache is None else Path(cache), Cost()
        self._lock, self._kept = Lock(), _read(self.cache)

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r}): {self.cost}"

    def __call__(self, requests: Sequence[str], answers: Any, concept: str = "") -> list[float]:
        bodies = [self._body(*both, concept) for both in zip(requests, answers, strict=True)]
        keys = [hashlib.sha256(f"{self.url} {json.dumps(body, sort_keys=True)}".encode()).hexdigest() for body in bodies]
        wanted = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._kept}
        self.cost = self.cost._replace(kept=self.cost.kept + len(keys) - len(wanted))
        with ThreadPoolExecutor(self.at_once) as pool:
            jobs = [pool.submit(self._ask, key, body) for key, body in wanted.items()]
            try:
                bar = progress(as_completed(jobs), f"{self.model} judges", total=len(jobs))
                for job in bar:
                    job.result()
                    bar.set_postfix_str(str(self.cost), refresh=False)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self._kept[key] for key in keys]

    def _body(self, request: str, answer: Any, concept: str) -> dict[str, Any]:
        low, high = self.scale
        rubric = (
            f"{self.rubric.replace('{concept}', concept)}\nReply with one number from {low:g} to {high:g} and nothing else."
        )
        shown: Any = f"<request>\n{request}\n</request>\n\n<answer>\n{answer if isinstance(answer, str) else ''}\n</answer>"
        if not isinstance(answer, str):
            text = f"<request>\n{request}\n</request>\n\nThe answer is this picture."
            shown = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": _data_url(answer)}}]
        said = [{"role": "system", "content": rubric}, {"role": "user", "content": shown}]
        return {"model": self.model, "messages": said, **self.options}

    def _ask(self, key: str, body: Mapping[str, Any]) -> None:
        """Ask until there is a number, and keep it."""
        for k in range(TRIES):
            try:
                reply = self._sent(body)
                score, used = self._score(reply), reply.get("usage") or {}
                break
            except _Again as again:
                if k + 1 == TRIES:
                    raise NoScore(f"{self.url} gave no score after {TRIES} tries: {again}") from None
                time.sleep(min(LONGEST, max(again.wait, PAUSE * 2**k)))
        with self._lock:
            asked, kept, read, written, unsaid = self.cost
            tokens = [used.get(name) for name in ("prompt_tokens", "completion_tokens")]
            read, written = (sum(filter(None, both)) for both in zip((read, written), tokens, strict=True))
            self.cost, self._kept[key] = Cost(asked + 1, kept, read, written, unsaid + (None in tokens)), score
            if self.cache is not None:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps({"key": key, "score": score}))  # after a line that was cut off, too

    def _sent(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request; raises `_Again` where it may be asked again, `NoScore` where that is of no use."""
        secret = os.environ.get(self.key, "")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as answered:
                return dict(json.loads(answered.read()))
        except urllib.error.HTTPError as error:
            text = printable(error.read(4 * SHOWN).decode(errors="replace"), SHOWN)
            said = f"{error.code} {text.replace(secret, '…') if secret else text}"
            if error.code in AGAIN or error.code >= 500:
                raise _Again(said, _seconds(error.headers.get("Retry-After"))) from None
            key = f"; set the environment variable {self.key} to a key that is valid there" * (error.code in (401, 403))
            raise NoScore(f"{self.url} refused: {said}{key}") from None
        except TimeoutError:
            raise _Again(f"no answer within {self.timeout:g} s") from None
        except (OSError, HTTPException, ValueError, TypeError) as error:  # not reached, cut off, or no JSON
            raise _Again(f"{type(error).__name__}: {error!s:.{SHOWN}}") from None

    def _score(self, reply: Mapping[str, Any]) -> float:
        """The number of a reply."""
        try:
            choice = reply["choices"][0]
            text, ended = choice["message"]["content"], choice.get("finish_reason")
            found = SCORE.fullmatch(THOUGHT.sub("", text))
        except (LookupError, TypeError, AttributeError):
            raise _Again(f"expected choices with a message in its reply, got {reply!r:.{SHOWN}}") from None
        low, high = self.scale
        if ended == "length":
            raise _Again(f"its reply was cut off: {text!r:.{SHOWN}}; give more max_tokens")
        if found is None or not low <= (score := float(found[1])) <= high or float(found[2] or high) != high:
            raise _Again(f"expected a number from {low:g} to {high:g}, got {text!r:.{SHOWN}}")
        return score


class _Again(Exception):  # noqa: N818 - a signal
    """The endpoint may be asked again, after some seconds."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is sent to nobody but the address that was given."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _seconds(text: str | None) -> float:
    """What `Retry-After` says; a date counts as nothing said."""
    return float(text) if text is not None and re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def _data_url(picture: Any) -> str:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(np.asarray(picture)).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _read(path: Path | None) -> dict[str, float]:
    """Scores that a file keeps; a last line that was cut off counts for nothing."""
    if path is None or not path.is_file():
        return {}
    found: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            kept = json.loads(line)
            found[kept["key"]] = float(kept["score"])
        except (ValueError, TypeError, LookupError):
            continue
    return found
