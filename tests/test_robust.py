"""Ctrl-C, signal handlers, hooks, fork: what comes in the midst of a call."""

import os
import signal

import numpy as np
import pytest
from clocks import PROMISED
from programs import model_of, python

import transformer_rs as tr
from transformer_rs._decoding import settings


class TestInterrupt:
    """Back within half a second, measured from the signal; the model is usable and nothing is half done."""

    def test_in_fit(self):
        seconds = python("""
            trainers = [tr.Trainer(model_of(), seed=0) for _ in range(2)]
            pairs = [(ids, ids[::-1]) for ids in np.random.default_rng(0).integers(3, 40, (400, 12))]
            fit = lambda trainer, **until: trainer.fit(pairs, max_tokens=600, progress=False, **until)
            seconds = late(lambda: fit(trainers[0], epochs=10**6))
            fit(trainers[0], steps=2)
            fit(trainers[1], steps=trainers[0].n_steps)
            one, other = (trainer.model.state_dict() for trainer in trainers)
            for name in one:
                assert np.array_equal(one[name], other[name]), name
            print(seconds)
        """)
        assert float(seconds) < PROMISED

    def test_in_one_long_step(self):
        seconds = python("""
            trainers = [tr.Trainer(model_of(d=256, layers=3), seed=0) for _ in range(2)]
            ids = np.random.default_rng(0).integers(3, 40, (200, 100))
            seconds = late(lambda: trainers[0].step(ids, ids))
            n = trainers[0].n_steps
            for _ in range(n):
                trainers[1].step(ids, ids)
            one, other = (trainer.model.state_dict() for trainer in trainers)
            for name in one:
                assert np.array_equal(one[name], other[name]), name
            assert trainers[0].step(ids[:1, :3], ids[:1, :3]).step == n + 1
            print(seconds)
        """)
        assert float(seconds) < PROMISED

    @pytest.mark.parametrize(
        "call",
        [
            "generate(ids, max_len=4000)",
            "hypotheses(ids, beam=5, max_len=4000)",
            "hypotheses(ids, n_best=5, max_len=4000, temperature=1.0, top_p=0.9, no_repeat_ngram=3, alternatives=5)",
            "generate(ids, max_len=4000, logits_processor=lambda ids, logits: logits)",
            "encode(np.tile(ids, (2, 2)))",
            "generate_iter and list(model.generate_iter(itertools.cycle(ids), max_len=50))",
            "generate_iter and list(model.generate_iter(itertools.cycle(ids), max_len=50, workers=2))",
            "score(ids, ids)",
            "__call__(ids, ids)",
        ],
    )
    def test_in_evaluation(self, call):
        seconds = python(f"""
            model = mute(model_of(d=256, layers=4, dropout=0.0))
            ids = np.random.default_rng(0).integers(3, 40, (300, 100))
            before = model.generate(ids[:2, :4], max_len=3)
            seconds = late(lambda: model.{call})
            after = model.generate(ids[:2, :4], max_len=3)
            assert all((a == b).all() for a, b in zip(before, after, strict=True))
            print(seconds)
        """)
        assert float(seconds) < PROMISED

    def test_in_a_stream(self):
        """Between two tokens, in a processor, or in one long first step: the stream ends, the model goes on."""
        seconds = python("""
            model = model_of(d=256, layers=4, dropout=0.0)
            source = np.random.default_rng(0).integers(3, 40, 3000)
            before = list(model.stream(source[:5], max_len=3))
            worst = 0
            for options in ({}, {"logits_processor": lambda ids, logits: time.sleep(0.01) or logits}):
                def call():
                    global stream
                    stream = model.stream(source, max_len=100_000, min_len=100_000, **options)
                    for _ in stream: pass
                worst = max(worst, late(call))
                assert next(stream, None) is None
            assert list(model.stream(source[:5], max_len=3)) == before
            print(worst)
        """)
        assert float(seconds) < PROMISED

    def test_a_handler_of_the_user_runs_and_its_exception_comes_out(self):
        assert (
            python("""
            class Stop(Exception): pass
            def handler(*_): raise Stop
            signal.signal(signal.SIGINT, handler)
            model = mute(model_of(d=128, layers=3))
            try:
                press(0.3)
                while True: model.generate(np.full((200, 50), 5), max_len=4000)
            except Stop:
                print("stopped")
        """)
            == "stopped"
        )

    def test_while_waiting_for_another_thread(self):
        """Two threads want one trainer, and both wait for who reads the model: before that one goes on, a wait is interrupted."""
        python("""
            model = model_of()
            trainer, reading, go_on = tr.Trainer(model, seed=0), threading.Event(), threading.Event()
            def hold(ids, logits):
                reading.set()
                assert go_on.wait(PATIENCE)
                return logits
            step = lambda: trainer.step([[3]], [[4]])
            threads = [threading.Thread(target=lambda: model.generate([[3]], max_len=1, logits_processor=hold))]
            threads += [threading.Thread(target=step)]
            threads[0].start()
            assert reading.wait(PATIENCE)
            threads[1].start()
            try:
                press(0.3)
                while True: step()
            except KeyboardInterrupt: pass
            go_on.set()
            for thread in threads: thread.join()
            assert trainer.n_steps == 1
        """)


class TestAHandlerThatCalls:
    """A signal handler runs in the midst of a call: what only reads works there, what the call has in use is refused."""

    START = """
        model, layer = model_of(d=256, layers=3), tr.nn.Encoder(256, 4, 1024, n_layers=4, seed=0)
        model.load_state_dict(model.state_dict() | {"head.bias": np.where(np.arange(40) == 2, -1e9, 0)})
        state, trainer = layer.state_dict(), tr.Trainer(model, seed=0)
        ids, x = np.random.default_rng(0).integers(3, 40, (200, 100)), np.ones((200, 200, 256), np.float32)
        class Stop(Exception): pass
        def meanwhile(call, inner):
            # The answer, or the error, of what a handler does in the midst of the call.
            said = []
            def handler(*_):
                try: said.append(inner())
                except tr.ConfigError as error: said.append(str(error))
                raise Stop
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            try: call(); sys.exit("too quick to tell")
            except Stop: return said[0]
    """

    @pytest.mark.parametrize(
        ("call", "inner", "what"),
        [
            ("trainer.step(ids, ids)", "trainer.step(ids[:1], ids[:1])", "the trainer"),
            ("trainer.step(ids, ids)", "model.load_state_dict(model.state_dict())", "the model's training"),
            ("model.generate(ids, max_len=4000)", "model.load_state_dict(model.state_dict())", "the weights"),
            ("layer(x)", "layer.load_state_dict(state)", "the weights"),
        ],
    )
    def test_what_is_in_use_is_refused(self, call, inner, what):
        said = python(f"""{self.START}
        print(meanwhile(lambda: {call}, lambda: {inner}))
        assert trainer.step(ids[:1], ids[:1]).step == 1
        {inner}
        """)
        assert (
            f"{what}: in use, maybe by the call at work on it that this signal handler or hook was called from" in said
        )

    @pytest.mark.parametrize(
        ("call", "inner"),
        [
            ("model.generate(ids[:4], max_len=10**4)", "model.generate(ids[:1, :4], max_len=3)"),
            ("model.generate(ids, max_len=4000)", "model.score(ids[:2], ids[:2])"),
            ("model.score(ids, ids)", "model.generate(ids[:1, :4], max_len=3)"),
            ("trainer.step(ids, ids)", "model.generate(ids[:1, :4], max_len=3)"),
            ("layer(x)", "layer(x[:1])"),
        ],
    )
    def test_what_reads_works(self, call, inner):
        assert python(f"""{self.START}
        expected = {inner}
        for _ in range(2):
            for one, other in zip(meanwhile(lambda: {call}, lambda: {inner}), expected, strict=True):
                assert np.array_equal(one, other)
        print("same")
        """) == "same"  # fmt: skip


def test_a_decoding_that_was_stopped_makes_no_step():
    model = model_of()
    decoder = model._core.decoder(settings("test", model.config, {"min_len": 9}, None), None)
    decoder.push(np.array([3, 4]), np.array([2]), [0])
    assert decoder.step(False)[0] is not None
    decoder.stop()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            decoder.step(False)
    assert decoder.sources() == 1


def test_a_processor_reads_its_model_while_a_step_waits():
    said = python("""
        model = model_of()
        trainer, steps = tr.Trainer(model, seed=0), []
        step = threading.Thread(target=lambda: steps.append(trainer.step([[3, 4]], [[5]]).step))
        def processor(ids, logits):
            if step.ident is None:
                step.start()
                time.sleep(0.5)  # now it waits for the decoding, which reads the weights
            assert len(model.score([[3, 4]], [[5]])) == 1
            return logits
        assert len(model.generate([[3, 4]], max_len=3, min_len=3, logits_processor=processor)[0]) == 3
        step.join()
        print(steps)
    """)
    assert said == "[1]"


@pytest.mark.parametrize("call", ["layer.load_state_dict({k: 0 * v for k, v in state.items()})", "pullback(y)"])
def test_ctrl_c_while_a_layer_is_in_use(call):
    """Who waits to write its weights, or its statistics, can be interrupted, and then has not written."""
    said = python(f"""
        layer, x = tr.nn.Encoder(256, 4, 1024, n_layers=6, norm="batch", seed=0), np.ones((200, 200, 256), np.float32)
        state = layer.state_dict()
        y, pullback = tr.vjp(layer, x[:1, :3], training=True, seed=0)
        other = threading.Thread(target=layer, args=(x,))
        other.start()
        time.sleep(0.2)
        press(0.2)
        try:
            {call}
            sys.exit("nothing to wait for")
        except KeyboardInterrupt:
            pass
        other.join()
        print(all(np.array_equal(v, state[k]) for k, v in layer.state_dict().items()))
        layer.load_state_dict(state)
    """)
    assert said == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_after_use():
    """Parent and child compute on, each with its own threads, and say the same."""
    assert (
        python("""
        model = model_of(dropout=0.0)
        ids = np.random.default_rng(0).integers(3, 40, (50, 20))
        trainer = tr.Trainer(model, seed=0)
        trainer.step(ids, ids)
        expected = model(ids, ids)
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                same = np.array_equal(model(ids, ids), expected)
                trainer.step(ids, ids)
                said = model.generate(ids[:3], max_len=5)
                os._exit(0 if same and len(said) == 3 and trainer.n_steps == 2 else 1)
            children.append(child)
        assert np.array_equal(model(ids, ids), expected)
        codes = [os.waitpid(child, 0)[1] for child in children]
        print(codes)
    """)
        == "[0, 0, 0]"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_others_are_at_work():
    """What the child lacks a thread for is an error there; what only others read it reads as well."""
    assert (
        python("""
        model = model_of(dropout=0.0)
        trainer = tr.Trainer(model, seed=0)
        expected = model.generate([[3, 4]], max_len=3)[0]
        reads, ends = threading.Event(), threading.Event()
        def hook(ids, logits):
            reads.set()
            ends.wait()
            return logits
        begin(model.generate, [[3]], max_len=1, logits_processor=hook)
        reads.wait()
        step = begin(trainer.step, [[3, 4]], [[5]])  # has the trainer, and waits until nobody reads
        while not (other := begin(model.score, [[3]], [[4]])).join(2) and not other.is_alive():
            pass  # who wants to read waits once somebody wants to write
        child = os.fork()
        if child == 0:
            same = np.array_equal(model.generate([[3, 4]], max_len=3)[0], expected)
            refused = 0
            for call in (lambda: trainer.step([[3]], [[4]]), lambda: model.load_state_dict(model.state_dict())):
                try:
                    call()
                except tr.ConfigError as error:
                    refused += "forked" in str(error)
            os._exit(0 if same and refused == 2 else 1)
        code = os.waitpid(child, 0)[1]
        ends.set()
        step.join()
        print(code, trainer.n_steps)
    """)
        == "0 1"
    )


def test_no_bits_of_the_callers_state_change():
    before, handler = np.geterr(), signal.getsignal(signal.SIGINT)
    rng = np.random.get_state()[1].copy()  # noqa: NPY002
    tr.Trainer(model_of(), seed=0).fit([([3], [4])] * 4, epochs=2, progress=False)
    assert np.geterr() == before and signal.getsignal(signal.SIGINT) is handler
    assert np.array_equal(np.random.get_state()[1], rng)  # noqa: NPY002
