"""Judges, and the one that asks an endpoint: against a real HTTP server on this machine, with all that goes wrong there."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

import steerlib as sl
from steerlib.errors import BadEdit, BadRecipe, NoScore
from steerlib.evaluation import judges
from steerlib.evaluation.score import scored
from steerlib.evaluation.text import counting, judge_for, trust
from steerlib.training.entries import ConceptRecipe
from steerlib.training.recipe import DirectionRecipe

KEY = "sk-secret-0123"


class Server(ThreadingHTTPServer):
    """Answers each request by the next of its `plan`, then by the number of letters of the answer it is shown."""

    daemon_threads = True

    def __init__(self, *plan: Any):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.seen, self.lock = list(plan), [], threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((time.monotonic(), self.path, self.headers.get("Authorization"), body))
            act = self.server.plan.pop(0) if self.server.plan else None
        if callable(act):
            return act(self)
        if act is None:
            shown = body["messages"][1]["content"].partition("<answer>\n")[2].partition("\n</answer>")[0]
            act = reply(str(len(shown)))
        return send(self, *(act if isinstance(act, tuple) else (200, act)))

    def log_message(self, *_):
        pass


def send(handler, code, body, **headers):
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    handler.send_response(code)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def reply(text, ended="stop", used=True):
    usage = {"usage": {"prompt_tokens": 30, "completion_tokens": 2}} if used else {}
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": ended}], **usage}


def half(handler):
    """Promises more than it sends, and ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def late(handler):
    time.sleep(1.0)
    handler.close_connection = True


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(judges, "PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers: list[Server] = []

    def start(*plan, **options):
        servers.append(Server(*plan))
        return servers[-1], sl.Endpoint(servers[-1].url, "m", **options)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_every_answer_gets_the_number_that_was_replied_to_it_in_order(serve):
    server, judge = serve(at_once=3)
    assert judge(["a?"] * 5, ["x" * k for k in (3, 1, 4, 2, 5)], "politeness") == [3, 1, 4, 2, 5]
    bodies = [body for *_, body in server.seen]
    assert all('"politeness"' in body["messages"][0]["content"] and body["temperature"] == 0 for body in bodies)
    assert all("from 0 to 10" in body["messages"][0]["content"] and "a?" in body["messages"][1]["content"] for body in bodies)
    assert judge.cost == judges.Cost(asked=5, read=150, written=10)
    assert "5 asked, 0 kept from before, 150 tokens read, 10 written" in repr(judge)


@pytest.mark.parametrize("failure", [
    (429, {"error": "slow down"}), (500, "oops"), (503, ""), "no json", [], {"choices": []}, reply("It is quite polite."),
    reply("11"), reply("7/5"), reply("1", ended="length"), reply(None), half, late,
])  # fmt: skip
def test_what_may_pass_is_asked_again_until_it_ends(serve, failure):
    server, judge = serve(failure, timeout=0.4)
    assert judge(["a?"], ["xyz"]) == [3] and len(server.seen) == 2 and judge.cost.asked == 1
    server, judge = serve(*[failure] * judges.TRIES, timeout=0.1)
    with pytest.raises(NoScore, match=rf"{server.url} gave no score after {judges.TRIES} tries: \S"):
        judge(["a?"], ["xyz"])
    assert len(server.seen) == judges.TRIES and judge.cost.asked == 0


def test_pauses_double_and_are_as_long_as_the_server_asks(serve, monkeypatch):
    waited = []
    monkeypatch.setattr(judges.time, "sleep", waited.append)
    monkeypatch.setattr(judges, "PAUSE", 1.0)
    asked_to_wait = lambda handler: send(handler, 429, "", Retry_After="7")  # noqa: E731
    _, judge = serve((500, ""), (500, ""), asked_to_wait, lambda handler: send(handler, 429, "", Retry_After="900"))
    judge(["a?"], ["xyz"])
    assert waited == [1.0, 2.0, 7.0, judges.LONGEST]


@pytest.mark.parametrize(("said", "score"), [
    ("7", 7), (" 7.5\n", 7.5), ("Score: 8/10", 8), ("**9**", 9), ("3 out of 10.", 3), ("<think>is it 2?</think>6", 6), ("0", 0),
])  # fmt: skip
def test_numbers_are_read_as_models_write_them(serve, said, score):
    assert serve(reply(said))[1](["a?"], ["x"]) == [score]


def test_a_scale_may_begin_below_zero(serve):
    assert serve(reply("-3"), scale=(-5, 5))[1](["a?"], ["x"]) == [-3]


@pytest.mark.parametrize("code", [400, 401, 404, 302])
def test_a_refusal_ends_it_at_once_and_no_key_is_shown_stored_or_carried_elsewhere(serve, monkeypatch, tmp_path, code):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    other, _ = serve()
    where = {"Location": other.url}
    refuse = lambda handler: send(handler, code, {"error": f"wrong key {KEY}"}, **where)  # noqa: E731
    server, judge = serve(None, refuse, cache=tmp_path / "scores.jsonl", at_once=1)
    with pytest.raises(NoScore, match=f"refused: {code}.*wrong key …") as error:
        judge(["a?", "b?"], ["x", "y"])
    assert ("OPENAI_API_KEY" in str(error.value)) is (code == 401)
    assert [auth for _, _, auth, _ in server.seen] == [f"Bearer {KEY}"] * 2 and other.seen == []
    shown = [str(error.value), repr(judge), repr(vars(judge)), (tmp_path / "scores.jsonl").read_text()]
    assert not any(KEY in text for text in shown)


def test_a_key_in_place_of_its_name_is_refused_without_showing_it():
    with pytest.raises(BadEdit, match="name of an environment variable") as error:
        sl.Endpoint("http://localhost/v1", "m", key=KEY)
    assert KEY not in str(error.value)
    with pytest.raises(BadEdit, match="expected the address"):
        sl.Endpoint("localhost:8000", "m")


def test_scores_are_kept_on_disk_also_after_a_line_that_was_cut_off(serve, tmp_path):
    file = tmp_path / "new" / "scores.jsonl"
    server, judge = serve(cache=file)
    assert judge(["a?", "a?"], ["xyz", "xyz"]) == [3, 3] and len(server.seen) == 1  # the same question is asked once
    file.write_text(file.read_text() + '\n{"key": "ab')
    again = sl.Endpoint(server.url, "m", cache=file)
    assert again(["a?", "b?"], ["xyz", "xyz"]) == [3, 3] and len(server.seen) == 2
    assert again.cost == judges.Cost(asked=1, kept=1, read=30, written=2)
    third = sl.Endpoint(server.url, "m", cache=file)
    assert third(["a?", "b?"], ["xyz", "xyz"]) == [3, 3] and len(server.seen) == 2
    other = sl.Endpoint(server.url, "m", cache=file, rubric="How short is it?")
    assert other(["a?"], ["xyz"]) == [3] and len(server.seen) == 3  # another rubric is another question


def test_tokens_that_are_not_counted_are_said(serve):
    _, judge = serve(reply("4", used=False))
    judge(["a?"], ["x"])
    assert judge.cost.unsaid == 1 and "1 answers without a count of tokens" in repr(judge)


def test_pictures_are_sent_as_pictures(serve):
    server, judge = serve(reply("6"))
    assert judge(["a hill"], np.zeros((1, 4, 5, 3), np.uint8), "snow") == [6]
    text, picture = server.seen[0][3]["messages"][1]["content"]
    assert "a hill" in text["text"] and picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_an_endpoint_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(judges, "PAUSE", 0.0)
    with pytest.raises(NoScore, match="refused|URLError"):
        sl.Endpoint("http://127.0.0.1:9/v1", "m")(["a?"], ["x"])


# -- in a recipe -------------------------------------------------------------------------------------------------


def test_a_recipe_names_an_endpoint_as_the_scorer_of_a_concept(serve):
    """Which is shown each answer behind its request, as `sl.sweep` and `sl.calibrate` show them."""
    server, _ = serve()
    spec = {"endpoint": server.url, "model": "m", "rubric": "How much of {concept}?"}
    concept = ConceptRecipe(name="tea", label="hot drinks", positive=("a", "b"), negative=("c", "d"), scorer=spec)
    recipe = DirectionRecipe(name="r", base="b", source="s", concepts=(concept,))
    texts, scores = [[["xyz", "x"]], [["xy", "xyzxyz"]]], judge_for(recipe.scorers)
    found = scored(texts, np.zeros((2, 1, 2)), ["why?", "now?"], scores)
    assert found.concepts[..., 0].tolist() == [[[3, 1]], [[2, 6]]]
    shown = {body["messages"][1]["content"].split("\n")[1::4][0] for *_, body in server.seen}
    assert shown == {"why?", "now?"} and "How much of hot drinks?" in server.seen[0][3]["messages"][0]["content"]
    assert trust(recipe.scorers, [], []) == "tea: scored by m."
    for wrong in ({**spec, "timeout": 3}, {**spec, "model": 3}):
        with pytest.raises(BadRecipe, match="expected a scorer with endpoint and model"):
            counting(wrong)


# -- the protocol ------------------------------------------------------------------------------------------------


def test_a_judge_is_told_the_concept_where_it_asks_for_it():
    assert judges.judged(lambda requests, answers: [len(a) for a in answers], ["q"], ["ab"], "c").tolist() == [2]
    assert judges.judged(lambda requests, answers, concept: [len(concept)], ["q"], ["ab"], "tea").tolist() == [3]


@pytest.mark.parametrize("said", [1.0, [1.0], [1.0, float("nan")], ["a", "b"], None, [[1.0], [2.0]]])
def test_what_is_no_number_for_each_answer_is_refused(said):
    with pytest.raises(NoScore, match="a finite number from judge= for each of 2 answers"):
        judges.judged(lambda requests, answers: said, ["q", "r"], ["a", "b"], "c")  # noqa: ARG005
