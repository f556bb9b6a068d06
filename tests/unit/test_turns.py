"""Who is asked what in which order, and what is said of it; the servers are doubles."""

import contextlib

import pytest

from cxr_triton.errors import InternalError
from cxr_triton.perf import turns
from cxr_triton.perf.reuse import ASKED
from cxr_triton.perf.turns import measure

pytestmark = pytest.mark.quick
FIRST_S = {ASKED[0]: 4.0, ASKED[1]: 1.0, ASKED[2]: 2.0}


class Servers:
    """Two servers that answer at once; what was asked of them, and how many were up."""

    def __init__(self):
        self.asked, self.up, self.most_up, self.pictures = [], 0, 0, []

    def opened(self, name):
        @contextlib.contextmanager
        def server(pictures):
            self.up += 1
            self.most_up = max(self.up, self.most_up)
            self.pictures.append(tuple(pictures))

            def ask(picture, request):
                self.asked.append((name, picture, request))
                said = {"text": f"{name} of {picture}", "tokens": 5, "prompt_tokens": 7}
                said["prompt"] = f"{request['prompt']} Step by step."
                return {**said, "first_s": FIRST_S[request["prompt"]], "seconds": 9.0}

            yield ask
            self.up -= 1

        return server


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Pictures that are drawn at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "ROWS", 250)
        patch.setattr(turns, "COLUMNS", 204)
        yield


@pytest.fixture(scope="module")
def run(_small):
    servers = Servers()
    given = {name: servers.opened(name) for name in ("a", "b")}
    return servers, measure(given, streams=(1, 2), rounds=2, tokens=5, say=lambda line: None)


def test_a_follow_up_goes_on_after_the_servers_own_answer_and_another_task_begins_anew(run):
    servers, _ = run
    counted = [request for name, picture, request in servers.asked if (name, picture) == ("b", 2)][:3]
    assert [request["prompt"] for request in counted] == list(ASKED)
    assert [request.get("history") for request in counted] == [
        None,
        [
            {"role": "user", "content": f"{ASKED[0]} Step by step."},  # as the model got it, to be found again
            {"role": "assistant", "content": "b of 2"},
        ],
        None,
    ]


def test_servers_are_up_one_at_a_time_and_get_the_same_new_pictures_in_each_round(run):
    servers, found = run
    assert servers.most_up == 1 and servers.up == 0
    first, second = servers.pictures[::2], servers.pictures[1::2]
    assert first == second
    each = [picture for pictures in first for picture in pictures]
    assert len(each) == len(set(each)) == 2 * 4
    assert all(len(of["load_s"]) == 2 for of in found.values())


def test_what_there_is_after_each_round_is_kept_and_an_answer_without_text_ends_it():
    servers, kept = Servers(), []

    def keep(found):
        kept.append(len(found["a"]["streams_1"]["rounds"]))
        FIRST_S.update(dict.fromkeys(FIRST_S))  # nobody says anything any more

    before = dict(FIRST_S)
    try:
        with pytest.raises(InternalError, match="no answer"):
            measure({"a": servers.opened("a")}, streams=(1,), rounds=3, tokens=5, say=lambda line: None, keep=keep)
    finally:
        FIRST_S.update(before)
    assert kept == [1]


def test_each_conversation_has_a_picture_of_its_own(run):
    servers, _ = run
    counted = [picture for name, picture, request in servers.asked[:12] if request["max_new_tokens"] == 5]
    assert sorted(counted) == sorted([1, 2, 3] * 3) and {name for name, *_ in servers.asked[:12]} == {"a"}


def test_first_words_are_told_as_shares_of_the_first_turns(run):
    _, found = run
    of = found["a"]["streams_2"]
    assert of["share_of_first_turn"] == {"follow_up": 0.25, "other_task": 0.5}
    assert of["median"]["first"]["tokens"] == 10 and len(of["rounds"]) == 2
