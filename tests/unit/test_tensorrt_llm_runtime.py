"""Streams over an engine that batches by itself: a scripted backend in its place, and its gRPC client by itself."""

import dataclasses
import queue
import threading
from concurrent import futures

import grpc
import numpy as np
import pytest
from fake_session import EOS, VOCAB, Letters, Receiver, generation, until
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.tensorrt_llm.backend import TensorRTLLMBackend
from cxr_triton.engines.tensorrt_llm.request import EngineConfig
from cxr_triton.engines.tensorrt_llm.runtime import TensorRTLLMRuntime
from cxr_triton.errors import InternalError, InvalidRequest, PromptTooLong, QueueFull, Unavailable

CONFIG = EngineConfig(
    dtype="float32",
    vocab_size=VOCAB,
    max_positions=64,
    rotary_dim=8,
    rotary_base=1e4,
    mrope_section=(1, 1, 2),
    max_batch=2,
    max_sequence=64,
    max_prompt=50,
    max_prompt_rows=3,
    hidden=4,
)
WAIT_S = 60


class Backend:
    """Keeps what it is asked; a test says what the engine answers."""

    def __init__(self):
        self.started, self.stopped, self.listeners = [], [], {}
        self.closed, self.refusal = False, None

    def start(self, request_id, tensors, listener):
        if self.refusal:
            raise self.refusal
        self.listeners[request_id] = listener
        self.started.append((request_id, tensors))

    def stop(self, request_id):
        self.stopped.append(request_id)

    def close(self):
        self.closed = True

    def say(self, request_id, *tokens, is_last=False, error=None):
        self.listeners[request_id](request_id, np.array(tokens, np.int32), is_last, error)


@pytest.fixture
def serve():
    opened = []

    def build(**options):
        backend = Backend()
        runtime = TensorRTLLMRuntime(CONFIG, backend, Letters(), queue_size=2, **options)
        opened.append(runtime)
        return runtime, backend

    yield build
    for runtime in opened:
        runtime.close()


def running(runtime, backend, count=1, **asked):
    """Streams that the engine has, with their receivers."""
    receivers, ids = [Receiver() for _ in range(count)], []
    for receiver in receivers:
        ids.append(runtime.submit(generation(**asked), receiver))
        until(lambda: len(backend.started) == len(ids))
    return ids, receivers


def test_tokens_become_text_and_the_end_token_is_counted(serve):
    """The engine gives no end token: it only ends. A native stream holds it, so this one does too."""
    runtime, backend = serve()
    (stream,), (receiver,) = running(runtime, backend)
    backend.say(stream, 1)
    until(lambda: receiver.chunks)
    assert receiver.text == Letters().stream().push([1]), "the first token is sent at once"
    backend.say(stream, *range(2, 11))
    backend.say(stream, is_last=True)
    completion = receiver.completion
    assert receiver.tokens == [*range(1, 11), EOS] and completion.finish_reason == "stop"
    assert completion.text == receiver.text == Letters().stream().push(range(1, 11))
    assert completion.usage == {"prompt_tokens": 3, "completion_tokens": 11, "image_tokens": 0}
    assert completion.timings_ms["total"] >= completion.timings_ms["time_to_first_token"] > 0
    assert not backend.stopped


def test_a_token_that_is_not_followed_is_sent_all_the_same(serve):
    runtime, backend = serve()
    (stream,), (receiver,) = running(runtime, backend)
    backend.say(stream, 1)
    backend.say(stream, 2)
    until(lambda: receiver.tokens == [1, 2])
    assert not receiver.done.is_set()


@pytest.mark.parametrize("last", ["with", "after"])
def test_the_limit_ends_a_stream(serve, last):
    """The engine says that it is done with the last token, or after it."""
    runtime, backend = serve()
    (stream,), (receiver,) = running(runtime, backend, max_new_tokens=3)
    assert backend.started[0][1]["request_output_len"].tolist() == [[3]]
    backend.say(stream, 1, 2, 3, is_last=last == "with")
    assert receiver.completion.finish_reason == "length" and receiver.tokens == [1, 2, 3]
    if last == "after":
        backend.say(stream, is_last=True)
    until(lambda: not runtime._running)


def test_an_answer_that_ends_early_is_an_error_where_nothing_may_end_it(serve):
    runtime, backend = serve()
    (stream,), (receiver,) = running(runtime, backend, eos_token_ids=())
    backend.say(stream, 1, is_last=True)
    assert isinstance(receiver.error, InternalError) and "ended the answer early" in receiver.error.message


def test_a_guide_is_refused_and_reaches_no_engine(serve):
    runtime, backend = serve()
    held = generation((1, 2))
    held = dataclasses.replace(held, sampling=dataclasses.replace(held.sampling, guide="start: /a/"))
    with pytest.raises(InvalidRequest, match=r"REQUEST\.guide: the engine of this server follows no grammar"):
        runtime.submit(held, Receiver())
    assert not backend.started


def test_streams_wait_for_a_slot_of_the_engine_with_a_heartbeat(serve):
    runtime, backend = serve(heartbeat_ms=20)
    ids, _ = running(runtime, backend, 2)
    waiting = [Receiver(), Receiver()]
    queued = [runtime.submit(generation(), receiver) for receiver in waiting]
    with pytest.raises(QueueFull, match="2 may"):
        runtime.submit(generation(), Receiver())
    until(lambda: len(waiting[0].chunks) > 1)
    assert not waiting[0].text and len(backend.started) == 2
    backend.say(ids[0], is_last=True)
    until(lambda: len(backend.started) == 3)
    assert backend.started[2][0] == queued[0], "first come, first served"


def test_a_stream_in_prefill_has_a_heartbeat(serve):
    runtime, backend = serve(heartbeat_ms=20)
    _, (receiver,) = running(runtime, backend)
    until(lambda: len(receiver.chunks) > 1)
    assert not receiver.tokens


@pytest.mark.parametrize("how", ["id", "callable"])
def test_a_cancelled_stream_ends_at_once_and_its_slot_when_the_engine_says_so(serve, how):
    runtime, backend = serve(slots=1)
    receiver, gone = Receiver(), threading.Event()
    stream = runtime.submit(generation(), receiver, gone.is_set)
    until(lambda: backend.started)
    next_one = Receiver()
    runtime.submit(generation(), next_one)
    backend.say(stream, 1, 2)
    until(lambda: receiver.tokens)
    gone.set() if how == "callable" else runtime.cancel(stream)
    assert receiver.completion.finish_reason == "cancelled" and backend.stopped == [stream]
    backend.say(stream, 3)
    until(lambda: not runtime._outputs)
    assert len(backend.started) == 1
    backend.say(stream, is_last=True)
    until(lambda: len(backend.started) == 2)
    assert receiver.tokens == [1, 2]


def test_a_stream_that_is_cancelled_while_it_waits_never_reaches_the_engine(serve):
    runtime, backend = serve(slots=1)
    (stream,), _ = running(runtime, backend)
    receiver = Receiver()
    waiting = runtime.submit(generation(), receiver)
    runtime.cancel(waiting)
    assert receiver.completion.finish_reason == "cancelled" and not backend.stopped
    backend.say(stream, is_last=True)
    until(lambda: not runtime._running)
    assert len(backend.started) == 1


def test_a_stop_string_cuts_the_text_and_stops_the_engine(serve):
    runtime, backend = serve()
    whole = Letters().stream().push(range(1, 9))
    (stream,), (receiver,) = running(runtime, backend, stop=(whole[3:5],))
    for token in range(1, 9):
        backend.say(stream, token)
    assert receiver.completion.text == receiver.text == whole[:3]
    assert receiver.completion.finish_reason == "stop" and backend.stopped == [stream]
    backend.say(stream, is_last=True)
    until(lambda: not runtime._running)


def test_an_engine_that_fails_fails_one_stream(serve):
    runtime, backend = serve()
    (bad, good), (failed, fine) = running(runtime, backend, 2)
    backend.say(bad, 1)
    backend.say(bad, is_last=True, error=InternalError("the engine broke"))
    assert failed.error.message == "the engine broke"
    backend.say(good, 5, is_last=True)
    assert fine.completion.finish_reason == "stop" and not backend.stopped


@pytest.mark.parametrize("phase", ["accept", "take", "stop"])
def test_a_stream_that_fails_here_ends_alone(serve, monkeypatch, phase):
    runtime, backend = serve()
    (bad, good), (failed, fine) = running(runtime, backend, 2)

    def fail(*args):
        raise TypeError("/secret")

    if phase == "stop":
        monkeypatch.setattr(backend, "stop", fail)
        runtime.cancel(bad)
        assert failed.completion.finish_reason == "cancelled"
    else:
        monkeypatch.setattr(runtime._streams[bad], phase, fail)
        backend.say(bad, 1)
        assert isinstance(failed.error, InternalError) and "/secret" not in failed.error.message
        assert backend.stopped == [bad]
    backend.say(good, 5, is_last=True)
    assert fine.completion.finish_reason == "stop"
    backend.say(bad, 2, is_last=True)
    runtime.submit(generation(), Receiver())
    until(lambda: len(backend.started) == 3)


def test_an_end_that_is_heard_twice_or_of_nobody_changes_nothing(serve):
    runtime, backend = serve(slots=1)
    (stream,), (receiver,) = running(runtime, backend)
    lost = Unavailable("the connection broke")
    backend.say(stream, 1, is_last=True)
    assert receiver.completion
    backend.say(stream, is_last=True, error=lost)
    runtime._hear("nobody", np.empty(0, np.int32), False, None)
    runtime.submit(generation(), Receiver())
    until(lambda: len(backend.started) == 2)


@pytest.mark.parametrize("error", [RuntimeError("/secret"), Unavailable("no connection")], ids=["untyped", "typed"])
def test_a_request_that_does_not_reach_the_engine_frees_its_slot(serve, error):
    runtime, backend = serve(slots=1)
    backend.refusal = error
    receiver = Receiver()
    runtime.submit(generation(), receiver)
    assert isinstance(receiver.error, (InternalError, Unavailable)) and "/secret" not in receiver.error.message
    backend.refusal = None
    running(runtime, backend)


def test_what_the_engine_would_refuse_is_refused_first(serve):
    runtime, backend = serve()
    with pytest.raises(PromptTooLong, match="51 tokens, the engine takes 50"):
        runtime.submit(generation(range(51)), Receiver())
    plain = generation(range(6))
    images = {"image_index": np.array([-1, 0, 1, 2, 3, -1]), "image_embeddings": np.zeros((4, 4), np.float32)}
    image = Generation(input_ids=plain.input_ids, position_ids=plain.position_ids, sampling=plain.sampling, **images)
    with pytest.raises(InvalidRequest, match="4 tokens, the engine was built for 3"):
        runtime.submit(image, Receiver())
    with pytest.raises(InvalidRequest, match="within 0 and 96"):
        runtime.submit(generation((VOCAB,)), Receiver())
    assert not backend.started


def test_closing_fails_what_runs_and_closes_the_backend(serve):
    runtime, backend = serve(slots=1)
    _, (receiver,) = running(runtime, backend)
    waiting = Receiver()
    runtime.submit(generation(), waiting)
    runtime.close()
    assert isinstance(receiver.error, Unavailable) and isinstance(waiting.error, Unavailable) and backend.closed
    with pytest.raises(Unavailable):
        runtime.submit(generation(), Receiver())


# -------------------------------------------------------------------------------------------------- the gRPC client


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers each request by what is in `answers`, on the stream that it came on; counts the streams."""

    def __init__(self):
        self.requests, self.streams, self.answers = [], 0, {}
        self.breaks_at_stop = False

    @property
    def stops(self):
        return [request.id for request in self.requests if is_stop(request)]

    def ModelStreamInfer(self, requests, context):
        self.streams += 1
        for request in requests:
            self.requests.append(request)
            if is_stop(request) and self.breaks_at_stop:
                context.abort(grpc.StatusCode.INTERNAL, "broken")
            for answer in [final(request.id)] if is_stop(request) else self.answers.get(request.id, []):
                if answer == "break":
                    context.abort(grpc.StatusCode.INTERNAL, "broken")
                if callable(answer):
                    answer()
                    continue
                yield answer


def is_stop(request):
    return any(tensor.name == "stop" for tensor in request.inputs)


def tokens(request_id, *values):
    response = pb.ModelInferResponse(id=request_id)
    response.outputs.add(name="output_ids", datatype="INT32", shape=[1, 1, len(values)])
    response.outputs.add(name="sequence_length", datatype="INT32", shape=[1, 1])
    response.raw_output_contents.extend([np.array(values, np.int32).tobytes(), np.int32(len(values)).tobytes()])
    return pb.ModelStreamInferResponse(infer_response=response)


def final(request_id):
    message = pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse(id=request_id))
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


@pytest.fixture
def engine():
    service, server = Server(), grpc.server(futures.ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    backend = TensorRTLLMBackend(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    yield service, backend
    backend.close()
    server.stop(0).wait()


def heard(said: queue.SimpleQueue):
    request_id, values, is_last, error = said.get(timeout=WAIT_S)
    return request_id, values.tolist(), is_last, type(error)


def listener():
    said = queue.SimpleQueue()
    return said, lambda *output: said.put(output)


def test_all_requests_share_one_stream_and_stops_have_their_own(engine):
    service, backend = engine
    service.answers = {name: [tokens(name, 1), tokens(name), tokens(name, 2, 3), final(name)] for name in "ab"}
    for name in "ab":
        said, listen = listener()
        backend.start(name, {"input_ids": np.array([[7]], np.int32), "streaming": np.array([[True]])}, listen)
        nothing = type(None)
        assert [heard(said) for _ in range(3)] == [
            (name, [1], False, nothing),
            (name, [2, 3], False, nothing),
            (name, [], True, nothing),
        ]
    assert service.streams == 1
    request = service.requests[0]
    assert [(t.name, t.datatype, list(t.shape)) for t in request.inputs] == [
        ("input_ids", "INT32", [1, 1]),
        ("streaming", "BOOL", [1, 1]),
    ]
    assert [output.name for output in request.outputs] == ["output_ids", "sequence_length"]
    said, listen = listener()
    backend.start("c", {"input_ids": np.array([[7]], np.int32)}, listen)
    backend.stop("c")
    until(lambda: len(service.requests) == 4)
    assert service.streams == 2 and said.empty(), "what answers a stop is not the end of the request"
    stop = next(r for r in service.requests if any(t.name == "stop" for t in r.inputs))
    assert stop.id == "c" and {t.name for t in stop.inputs} >= {"input_lengths", "request_output_len"}


def test_an_error_ends_its_request_and_keeps_its_details(engine, caplog):
    service, backend = engine
    service.answers["a"] = [pb.ModelStreamInferResponse(error_message="/opt/x broke", infer_response={"id": "a"})]
    said, listen = listener()
    backend.start("a", {}, listen)
    _, _, is_last, error = said.get(timeout=WAIT_S)
    assert is_last and isinstance(error, InternalError) and "/opt/x" not in error.message
    assert "/opt/x broke" in caplog.text


@pytest.mark.parametrize(
    "how", ["break", pb.ModelStreamInferResponse(error_message="of no request")], ids=["broken", "unnamed"]
)
def test_a_broken_stream_fails_all_its_requests_and_the_next_one_opens_another(engine, how):
    service, backend = engine
    service.answers = {"b": [how], "c": [tokens("c", 5), final("c")]}
    first, second, third = listener(), listener(), listener()
    backend.start("a", {}, first[1])
    backend.start("b", {}, second[1])
    assert heard(first[0]) == ("a", [], True, Unavailable) and heard(second[0]) == ("b", [], True, Unavailable)
    backend.start("c", {}, third[1])
    assert heard(third[0])[:2] == ("c", [5]) and heard(third[0])[:3] == ("c", [], True)


def test_a_stop_that_overtook_its_start_goes_again(engine):
    """The engine knows nothing of the request when the first stop comes; it begins to answer later."""
    service, backend = engine
    begins = threading.Event()
    service.answers["a"] = [lambda: begins.wait(WAIT_S), tokens("a", 1), tokens("a", 2), lambda: None]
    said, listen = listener()
    backend.start("a", {}, listen)
    backend.stop("a")
    until(lambda: service.stops == ["a"])
    begins.set()
    assert [heard(said)[1] for _ in range(2)] == [[1], [2]]
    until(lambda: service.stops == ["a", "a"])


def test_a_stop_whose_stream_broke_goes_again(engine):
    service, backend = engine
    goes_on = threading.Event()
    service.answers["a"] = [tokens("a", 1), lambda: goes_on.wait(WAIT_S), tokens("a", 2), final("a")]
    said, listen = listener()
    backend.start("a", {}, listen)
    assert heard(said)[1] == [1]
    service.breaks_at_stop = True
    backend.stop("a")
    until(lambda: "stops" not in backend._streams)
    service.breaks_at_stop = False
    goes_on.set()
    until(lambda: service.stops == ["a", "a"])
    assert heard(said)[1] == [2] and heard(said)[2]
    backend.stop("a")
    assert service.stops == ["a", "a"], "one that has ended is not stopped"


def test_a_request_that_was_not_sent_is_not_heard_of_later(engine, monkeypatch):
    service, backend = engine
    service.answers = {"b": ["break"]}
    said, listen = listener()

    def refuse(name):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(backend, "_queue", refuse)
        with pytest.raises(RuntimeError):
            backend.start("a", {}, listen)
    other = listener()
    backend.start("b", {}, other[1])
    assert heard(other[0])[3] is Unavailable and said.empty()


def test_a_closed_client_takes_nothing(engine):
    _, backend = engine
    backend.close()
    with pytest.raises(Unavailable):
        backend.start("a", {}, print)
