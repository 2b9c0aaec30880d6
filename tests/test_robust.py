"""Ctrl-C, fork, and many threads at once."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from clocks import PATIENCE, PROMISED

import transformer_rs as tr
from transformer_rs._decoding import settings

START = f"""
import _thread, itertools, os, signal, sys, threading, time
sys.path.append({str(Path(__file__).parent)!r})
import numpy as np
from clocks import PATIENCE, late
import transformer_rs as tr
def model_of(d=64, layers=2, dropout=0.1, vocabulary=40):
    config = tr.TransformerConfig(src_vocab=vocabulary, tgt_vocab=vocabulary, d_model=d, n_heads=4, n_encoder_layers=layers,
                                  n_decoder_layers=layers, d_ff=4 * d, dropout=dropout)
    return tr.Transformer(config, seed=0)
def press(after):
    def wait():
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=wait, daemon=True).start()
def mute(model):
    "One that never says EOS: as many tokens as it may."
    bias = model.state_dict()["head.bias"]
    bias[2] = -1e9
    model.load_state_dict(model.state_dict() | {{"head.bias": bias}})
    return model
"""


def python(code):
    """Run a program of its own: signals and forks are not for the tests' own process."""
    code = START + textwrap.dedent(code)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * PATIENCE)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def model_of(**values):
    small = {"d_model": 32, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 64, "dropout": 0.1}
    return tr.Transformer(tr.TransformerConfig(**{"src_vocab": 20, "tgt_vocab": 20, **small, **values}), seed=0)


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
        def start(work, *arguments, **options):
            thread = threading.Thread(target=work, args=arguments, kwargs=options, daemon=True)
            thread.start()
            return thread
        start(model.generate, [[3]], max_len=1, logits_processor=hook)
        reads.wait()
        step = start(trainer.step, [[3, 4]], [[5]])  # has the trainer, and waits until nobody reads
        while not (other := start(model.score, [[3]], [[4]])).join(0.5) and not other.is_alive():
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


def together(n, work):
    """Run work(i) on n threads; what one of them raises comes out."""
    errors, results = [], [None] * n

    def run(i):
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


SOURCE = [[3, 4, 5, 6]]


def say_while_training(say, n):
    """Readers see the weights of one step or of another, never a mixture, and between all steps; training ends as it does alone."""
    alone, model = model_of(), model_of()
    seen, reference = {say(alone).tobytes()}, tr.Trainer(alone, seed=0)
    for _ in range(15):
        reference.step(SOURCE, SOURCE)
        seen.add(say(alone).tobytes())
    trainer, done, reads = tr.Trainer(model, seed=0), threading.Event(), threading.Semaphore(0)

    def work(i):
        if i == 0:
            try:
                for _ in range(15):
                    assert reads.acquire(timeout=PATIENCE)
                    trainer.step(SOURCE, SOURCE)
            finally:
                done.set()
        while not done.is_set():
            assert say(model).tobytes() in seen
            model.state_dict()
            reads.release()

    together(n, work)
    for name, array in model.state_dict().items():
        assert np.array_equal(array, alone.state_dict()[name])


def test_eight_threads_on_one_model():
    model = model_of()
    sources = [[[3 + (i + j) % 15 for j in range(4 + i)]] for i in range(8)]
    expected = [(model(s, s)[0], model.generate(s, max_len=8)[0], model.score(s, s)[0]) for s in sources]

    def work(i):
        for _ in range(10):
            s = sources[i]
            got = model(s, s)[0], model.generate(s, max_len=8)[0], model.score(s, s)[0]
            assert all(np.array_equal(a, b) for a, b in zip(got, expected[i], strict=True))

    together(8, work)


def test_eight_threads_decode_each_in_its_own_way():
    model = model_of()
    ways = [
        {"beam": 3}, {"temperature": 1.0, "seed": 3}, {"no_repeat_ngram": 2}, {"prefixes": [[5, 6]], "suppress": [7]},
        {"logits_processor": lambda ids, logits: logits[::-1].copy()}, {"top_p": 0.5, "seed": 1}, {"min_len": 9}, {},
    ]  # fmt: skip
    source = [[3, 4, 5, 6, 7]]
    expected = [model.generate(source, **way)[0].tolist() for way in ways]

    def work(i):
        stream = model.stream(source[0]) if not ways[i] else None
        for _ in range(5):
            assert model.generate(source, **ways[i])[0].tolist() == expected[i]
        if stream is not None:
            assert list(stream) == expected[i]

    together(8, work)


def mute(model):
    """One that never says EOS: as many tokens as it may."""
    model.load_state_dict(model.state_dict() | {"head.bias": np.where(np.arange(20) == 2, -1e9, 0)})
    return model


class TestCallsThatAreOneBatch:
    """Threads that decode in the same way share steps, and nobody can tell but by the clock."""

    def test_all_say_what_they_say_alone(self):
        model, rng = model_of(dropout=0.0), np.random.default_rng(0)
        sources = [rng.integers(3, 20, n) for n in rng.integers(1, 20, 100)]
        ways = [{}, {"beam": 3}, {"beam": 3, "max_len": 5}, {"min_len": 6}, {"repetition_penalty": 1.3, "max_len": 15}]
        ways += [{"draft": model.quantize(), "max_len": (1, 3)}, {"temperature": 1.2, "seed": 5}]
        expected = [[model.generate([s], **way)[0].tolist() for s in sources] for way in ways]
        drawn = [model.generate(sources[i : i + 3], **ways[-1]) for i in range(90)]

        def work(i):
            mine = np.random.default_rng(i)
            for _ in range(40):
                way, first, n = mine.integers(len(ways)), mine.integers(90), mine.integers(1, 4)
                said = [ids.tolist() for ids in model.generate(sources[first : first + n], **ways[way])]
                if way == len(ways) - 1:  # row i is drawn by (seed, i)
                    assert said == [ids.tolist() for ids in drawn[first][:n]]
                else:
                    assert said == expected[way][first : first + n]
                best = model.hypotheses(sources[first : first + n], beam=2, n_best=2)
                assert [len(each) for each in best] == [2] * n

        together(12, work)

    def test_they_share_steps(self):
        """Seven calls while another one leads, which does not end before the process does: each step is theirs as well."""
        shared = python("""
            model = mute(model_of(dropout=0.0))
            expected, said = model.generate([[3, 4, 5]], max_len=500)[0], []
            choices = lambda measured: [row for row in measured.rows if row["part"] == "choice"]
            endless = threading.Thread(target=lambda: model.generate([[3, 4]], max_len=100_000), daemon=True)
            endless.start()
            while True:
                with tr.profile() as measured: time.sleep(0.01)
                if choices(measured): break
            others = [threading.Thread(target=lambda: said.append(model.generate([[3, 4, 5]], max_len=500)[0])) for _ in range(7)]
            with tr.profile() as measured:
                for other in others: other.start()
                for other in others: other.join()
            assert len(said) == 7 and all(np.array_equal(one, expected) for one in said)
            steps, = choices(measured)
            print(steps["rows"] - steps["calls"], flush=True)
            os._exit(0)
        """)
        assert float(shared) == 7 * 500

    def test_who_is_refused_is_so_alone(self):
        model = mute(model_of(dropout=0.0, d_model=512))
        expected = model.generate([[3, 4]], max_len=200)[0]

        def work(i):
            if i % 4 == 0:
                with pytest.raises(tr.OutOfMemoryError, match="source 0 may need"):
                    model.generate([[3], [4]], max_len=2**31 - 1)
                return
            assert np.array_equal(model.generate([[3, 4]], max_len=200)[0], expected)

        for _ in range(5):
            together(8, work)

    def test_all_hear_of_logits_that_are_not_finite(self):
        model = model_of(dropout=0.0)
        model.load_state_dict(model.state_dict() | {"head.bias": np.full(20, np.nan)})

        def work(_):
            with pytest.raises(tr.NonFiniteError, match="token 0 of source 0"):
                model.generate([[3, 4]])

        together(8, work)

    def test_weights_that_change_meanwhile(self):
        """Every answer is that of the weights of one step."""
        say_while_training(lambda model: model.hypotheses(SOURCE, beam=2)[0][0].token_logprobs, 6)

    def test_ctrl_c_in_the_call_that_leads_and_the_others_go_on(self):
        seconds = python("""
            model = mute(model_of(d=256, layers=4, dropout=0.0))
            source, said, ended = [[3, 4, 5]], [], False
            expected = model.generate(source, max_len=300)[0]
            def speak():
                last = False
                while not last:
                    last = ended
                    said.append(model.generate(source, max_len=300)[0])
            others = [threading.Thread(target=speak) for _ in range(3)]
            def call():
                for other in others:
                    if other.ident is None: other.start()
                model.generate(source * 2, max_len=3000)
            seconds = late(call)
            ended = True
            for other in others: other.join()
            assert len(said) >= 3 and all((one == expected).all() for one in said)
            print(seconds)
        """)
        assert float(seconds) < PROMISED

    def test_ctrl_c_in_a_call_that_waits_for_who_leads(self):
        """Who leads does not end before the process does, and another one gets its answer from it."""
        python("""
            model = mute(model_of(dropout=0.0))
            source, said = [[3, 4, 5]], []
            expected = model.generate(source, max_len=300)[0]
            threading.Thread(target=lambda: model.generate(source, max_len=100_000), daemon=True).start()
            while True:
                with tr.profile() as measured: time.sleep(0.01)
                if measured.rows: break
            other = threading.Thread(target=lambda: said.append(model.generate(source, max_len=300)[0]))
            other.start()
            try:
                press(0.3)
                while True: model.generate(source * 2, max_len=100_000)
            except KeyboardInterrupt: pass
            other.join()
            assert (said[0] == expected).all()
            os._exit(0)
        """)

    def test_what_an_interrupted_call_asked_for_is_not_decoded(self):
        """It waits for the others' first, long step when Ctrl-C comes."""
        rows = python("""
            model, said = model_of(d=256, layers=4, dropout=0.0), []
            model.load_state_dict(model.state_dict() | {"head.bias": np.where(np.arange(40) == 2, -1e9, 0)})
            ids = np.random.default_rng(0).integers(3, 40, (40, 1000))
            other = threading.Thread(target=lambda: said.append(model.generate(ids, max_len=2)))
            with tr.profile() as measured:
                other.start()
                time.sleep(0.2)
                press(0.2)
                try: model.generate([[3, 4]], max_len=2); sys.exit("it was answered")
                except KeyboardInterrupt: assert not said, "too quick to tell"
                other.join()
            print(sum(row["rows"] for row in measured.rows if row["part"] == "search"))
        """)
        assert float(rows) == 2 * 40

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    def test_a_child_does_not_wait_for_its_parents_threads(self):
        code = python("""
            import warnings
            warnings.simplefilter("ignore")
            model = mute(model_of(dropout=0.0))
            source, said = [[3, 4, 5]], []
            expected = model.generate(source, max_len=300)[0]
            threading.Thread(target=lambda: model.generate(source, max_len=100_000), daemon=True).start()
            while True:
                with tr.profile() as measured: time.sleep(0.01)
                if measured.rows: break
            other = threading.Thread(target=lambda: said.append(model.generate(source, max_len=300)[0]))
            other.start()
            child = os.fork()
            if child == 0:
                os._exit(0 if (model.generate(source, max_len=300)[0] == expected).all() else 1)
            deadline = time.monotonic() + PATIENCE
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline: time.sleep(0.01)
            other.join()
            assert (said[0] == expected).all()
            if ended == (0, 0): os.kill(child, signal.SIGKILL)
            print(ended[1] if ended[0] else "still waiting", flush=True)
            os._exit(0)
        """)
        assert code == "0"


def test_reading_while_training():
    say_while_training(lambda model: model.score(SOURCE, SOURCE)[0], 4)


def test_two_trainers_at_once_take_turns():
    """Steps do not mix: two trainers that train different parts, as many steps as they were asked for."""
    model = model_of()
    trainers = [tr.Trainer(model, freeze=(f"{part}.*",), seed=0) for part in ("encoder", "decoder")]

    def work(i):
        for _ in range(10):
            assert np.isfinite(trainers[i].step([[3, 4]], [[5]]).loss)

    together(2, work)
    assert [trainer.n_steps for trainer in trainers] == [10, 10]


def test_threads_of_one_trainer_take_turns():
    trainer = tr.Trainer(model_of(), seed=0)
    steps = together(4, lambda i: [trainer.step([[3, 4]], [[5]]).step for _ in range(5)])
    assert sorted(itertools.chain(*steps)) == list(range(1, 21))


def test_no_bits_of_the_callers_state_change():
    before, handler = np.geterr(), signal.getsignal(signal.SIGINT)
    rng = np.random.get_state()[1].copy()  # noqa: NPY002
    tr.Trainer(model_of(), seed=0).fit([([3], [4])] * 4, epochs=2, progress=False)
    assert np.geterr() == before and signal.getsignal(signal.SIGINT) is handler
    assert np.array_equal(np.random.get_state()[1], rng)  # noqa: NPY002
