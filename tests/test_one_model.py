"""Many threads on one model: calls that are one batch, readers beside training, trainers that take turns."""

import itertools
import os
import threading

import numpy as np
import pytest
from clocks import PATIENCE, PROMISED
from programs import model_of, mute, python, together

import transformer_rs as tr

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
            lead_for_ever(model, [[3, 4]])
            while True:
                with tr.profile() as measured: time.sleep(0.01)
                if choices(measured): break
            for _ in range(3):  # one who finds the list of batches taken for a millisecond, as on a busy machine, decodes alone
                others = [threading.Thread(target=lambda: said.append(model.generate([[3, 4, 5]], max_len=500)[0])) for _ in range(7)]
                with tr.profile() as measured:
                    for other in others: other.start()
                    for other in others: other.join()
                # (The block may begin within a call, whose part is a row by itself then.)
                shared = sum(row["rows"] - row["calls"] for row in choices(measured))
                if shared == 7 * 500: break
            assert len(said) in (7, 14, 21) and all(np.array_equal(one, expected) for one in said)
            print(shared, flush=True)
            os._exit(0)
        """)
        assert float(shared) == 7 * 500

    def test_who_is_refused_is_so_alone(self):
        model = mute(model_of(dropout=0.0, d=512))
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
        model.load_state_dict(model.state_dict() | {"head.bias": np.full(40, np.nan)})

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
            lead_for_ever(model, source)
            other = begin(lambda: said.append(model.generate(source, max_len=300)[0]))
            try:
                press(0.3)
                while True: model.generate(source * 2, max_len=100_000)
            except KeyboardInterrupt: pass
            other.join()
            assert (said[0] == expected).all()
            os._exit(0)
        """)

    def test_what_an_interrupted_call_asked_for_is_not_decoded(self):
        """It waits for the others' first, long step when Ctrl-C comes. That step is made longer until it lasts until then."""
        rows = python("""
            model = mute(model_of(d=256, layers=4, dropout=0.0))
            for length in (500, 1000, 2000, 4000):
                said, answered = [], False
                ids = np.random.default_rng(0).integers(3, 40, (40, length))
                with tr.profile() as measured:
                    other = begin(lambda: said.append(model.generate(ids, max_len=2)))
                    at_work()
                    try:
                        press(0.1)
                        model.generate([[3, 4]], max_len=2)
                        answered = True
                        while True: time.sleep(1)
                    except KeyboardInterrupt: in_time = not answered and not said
                    other.join()
                rows = sum(row["rows"] for row in measured.rows if row["part"] == "search")
                if in_time and rows == 80: break  # else Ctrl-C may have come behind that step
            assert in_time, "too quick to tell"
            print(rows)
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
            lead_for_ever(model, source)
            other = begin(lambda: said.append(model.generate(source, max_len=300)[0]))
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
