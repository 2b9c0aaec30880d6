"""Whole runs: order, limits, records, validation, progress, exact resume."""

import io
import itertools
import math
import threading
import time

import numpy as np
import pytest

import transformer_rs as tr
from transformer_rs import fitting
from transformer_rs._sequences import Pairs


def data(n, seed=0):
    """Reverse a sequence."""
    rng = np.random.default_rng(seed)
    sources = [rng.integers(3, 10, size=rng.integers(1, 7)) for _ in range(n)]
    return [(ids, ids[::-1]) for ids in sources]


PAIRS, VALID = data(60), data(12, seed=1)


def trainer_of(dropout=0.1, lr=1e-2, seed=0, **settings):
    config = tr.TransformerConfig(
        src_vocab=10,
        tgt_vocab=10,
        d_model=16,
        n_heads=2,
        n_encoder_layers=1,
        n_decoder_layers=1,
        d_ff=24,
        dropout=dropout,
    )
    return tr.Trainer(tr.Transformer(config, seed=0), **{"optimizer": tr.AdamW(lr=lr), "seed": seed, **settings})


def fit(trainer, pairs=PAIRS, valid=None, **options):
    return trainer.fit(pairs, valid, **{"max_tokens": 60, "progress": False, **options})


def steps_in(epoch_pairs=PAIRS, max_tokens=60, accumulate=1):
    """Steps of the first epoch."""
    return fit(trainer_of(), epoch_pairs, epochs=1, max_tokens=max_tokens, accumulate=accumulate)[0]["step"]


def weights(trainer):
    return trainer.model.state_dict()


def assert_same(one, other):
    for name, array in weights(one).items():
        assert np.array_equal(array, weights(other)[name]), name


def without_time(history):
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_s")} for record in history]


def test_it_learns_and_says_how():
    trainer = trainer_of()
    history = fit(trainer, data(300), VALID, epochs=8, restore_best=False)
    assert [record["epoch"] for record in history] == list(range(1, 9))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"] and history[-1]["valid_loss"] < 0.8 * history[0]["valid_loss"]
    last = history[-1]
    assert last["step"] == trainer.n_steps and last["lr"] == 1e-2 and last["grad_norm"] > 0
    assert last["n_tokens"] == sum(len(tgt) + 1 for _, tgt in data(300))
    assert last["tokens_per_s"] == pytest.approx(sum(2 * len(src) for src, _ in data(300)) / last["seconds"])
    evaluation = trainer.evaluate(VALID)
    assert last["valid_loss"] == pytest.approx(evaluation.loss, rel=1e-12) and last["valid_nll"] == pytest.approx(
        evaluation.nll
    )
    assert fit(trainer, epochs=1)[0]["valid_loss"] is None


class Recorder:
    """A data set that remembers what was asked for."""

    def __init__(self, pairs):
        self.pairs, self.asked = pairs, []

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.pairs[i]


def test_every_pair_comes_once_an_epoch_in_an_order_of_seed_and_epoch():
    def orders(seed):
        recorder = Recorder(PAIRS)
        fit(trainer_of(seed=seed), recorder, epochs=2)
        asked = recorder.asked[len(PAIRS) :]  # the first look is at the lengths
        return asked[: len(PAIRS)], asked[len(PAIRS) :]

    first, second = orders(5)
    assert sorted(first) == sorted(second) == list(range(len(PAIRS)))
    assert first != second
    assert orders(5) == (first, second)
    assert orders(6)[0] != first


def test_any_data_set_gives_the_same_bits():
    trainers = [trainer_of() for _ in range(4)]
    as_lists = [(src.tolist(), tuple(tgt.tolist())) for src, tgt in PAIRS]
    for trainer, pairs in zip(trainers, (PAIRS, as_lists, Recorder(PAIRS), iter(PAIRS)), strict=True):
        fit(trainer, pairs, epochs=1)
        assert_same(trainers[0], trainer)


def test_a_batch_is_the_step_of_its_pairs():
    """`fit` does what `step` would do with the same batches."""
    one, other = trainer_of(), trainer_of()
    recorder, cuts = Recorder(PAIRS), []
    fit(one, recorder, epochs=1, progress=lambda result: cuts.append(len(recorder.asked)))
    for start, stop in itertools.pairwise([len(PAIRS), *cuts]):
        chosen = [PAIRS[i] for i in recorder.asked[start:stop]]
        assert sum(len(src) + len(tgt) for src, tgt in chosen) <= 60
        other.step([src for src, _ in chosen], [tgt for _, tgt in chosen])
    assert_same(one, other)


def test_accumulated_batches_are_one_step():
    n = steps_in()
    assert steps_in(accumulate=3) == -(-n // 3)
    # With gradients of the summed loss, two halves are the whole, but for rounding.
    whole, halves = trainer_of(dropout=0.0), trainer_of(dropout=0.0)
    pairs = [([3, 4, 5], [5, 4, 3]), ([6, 7, 8], [8, 7, 6])]
    seen = []
    fit(whole, pairs, steps=1, max_tokens=12, progress=seen.append)
    fit(halves, pairs, steps=1, max_tokens=6, accumulate=2, progress=seen.append)
    assert seen[0].n_tokens == seen[1].n_tokens == 8
    assert seen[0].loss == pytest.approx(seen[1].loss, rel=1e-6) and seen[0].grad_norm == pytest.approx(
        seen[1].grad_norm, rel=1e-5
    )


class TestLimits:
    def test_steps_and_epochs(self):
        n = steps_in()
        trainer = trainer_of()
        assert len(fit(trainer, steps=3)) == 1 and trainer.n_steps == 3
        assert len(fit(trainer, steps=n, epochs=9)) == 2 and trainer.n_steps == n + 3
        assert [r["epoch"] for r in fit(trainer, epochs=1, steps=10**6)] == [2]
        assert [r["epoch"] for r in fit(trainer, epochs=2)] == [3, 4]

    def test_minutes_count_training_alone(self):
        trainer = trainer_of()

        def slow(trainer, record):
            time.sleep(0.05)

        start = time.perf_counter()
        history = fit(trainer, minutes=0.2 / 60, on_epoch=slow)
        trained = sum(record["seconds"] for record in history)
        assert 0.2 <= trained <= time.perf_counter() - start - 0.05 * len(history)
        assert trained - history[-1]["seconds"] < 0.2

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({}, tr.ConfigError, "pass epochs=, steps= or minutes="),
            ({"epochs": 0}, tr.ConfigError, "`epochs`"),
            ({"steps": -1}, tr.ConfigError, "`steps`"),
            ({"steps": 1.5}, tr.DTypeError, "`steps`"),
            ({"minutes": 0}, tr.ConfigError, "`minutes`"),
            ({"minutes": "1"}, tr.DTypeError, "`minutes`"),
            ({"steps": 1, "max_tokens": 0}, tr.ConfigError, "`max_tokens`"),
            ({"steps": 1, "accumulate": 0}, tr.ConfigError, "`accumulate`"),
            ({"steps": 1, "on_epoch": 3}, tr.DTypeError, "`on_epoch`"),
            ({"steps": 1, "progress": 3}, tr.DTypeError, "`progress`"),
        ],
    )
    def test_options_are_checked(self, options, error, text):
        with pytest.raises(error, match=text):
            trainer_of().fit(PAIRS, **options)

    def test_on_epoch_stops(self):
        seen = []

        def stop(trainer, record):
            seen.append((trainer.n_steps, record["epoch"]))
            return record["epoch"] == 2

        trainer = trainer_of()
        assert len(fit(trainer, epochs=5, on_epoch=stop)) == 2
        assert [epoch for _, epoch in seen] == [1, 2] and seen[-1][0] == trainer.n_steps

    def test_what_a_callback_raises_comes_out_and_the_model_is_usable(self):
        def broken(result):
            if result.step == 2:
                raise LookupError("mine")

        one, other = trainer_of(), trainer_of()
        with pytest.raises(LookupError, match="mine"):
            fit(one, epochs=2, progress=broken)
        fit(one, steps=3)
        fit(other, steps=5)
        assert_same(one, other)


class TestSchedules:
    @pytest.mark.parametrize("kind", [tr.schedules.Cosine, tr.schedules.Linear])
    def test_the_total_comes_from_the_limits(self, kind):
        n = steps_in()

        def rates(**limits):
            results = []
            fit(trainer_of(schedule=kind(warmup=2)), progress=results.append, **limits)
            return [result.lr for result in results]

        assert rates(steps=6) == [1e-2 * kind(warmup=2, total=6).factor(s) for s in range(1, 7)]
        assert rates(epochs=1) == [1e-2 * kind(warmup=2, total=n).factor(s) for s in range(1, n + 1)]
        assert rates(epochs=1, steps=5) == rates(steps=5)
        two = rates(epochs=2)
        assert two[-1] == pytest.approx(0, abs=1e-12) and min(two[:-1]) > 0
        with pytest.raises(tr.ConfigError, match="total="):
            rates(minutes=1)
        assert len(rates(minutes=10, steps=3)) == 3

    def test_its_own_total_wins(self):
        results = []
        fit(trainer_of(schedule=tr.schedules.Linear(total=10)), steps=2, progress=results.append)
        assert [r.lr for r in results] == [1e-2 * 0.9, 1e-2 * 0.8]
        results.clear()
        fit(trainer_of(schedule=tr.schedules.Linear(total=10**9)), minutes=1e-4, progress=results.append)
        assert results and all(r.lr == pytest.approx(1e-2, rel=1e-3) for r in results)


class TestRestoreBest:
    def test_weights_optimiser_and_step_go_back_together(self):
        """Three epochs that go well, then a jump; the best comes back, and training goes on from it exactly."""

        def spoil(trainer, record):
            if record["epoch"] == 3:
                state = weights(trainer)
                trainer.model.load_state_dict({name: array * 1.7 for name, array in state.items()})
            return record["epoch"] == 4

        spoiled, plain = trainer_of(lr=1e-3), trainer_of(lr=1e-3)
        history = fit(spoiled, PAIRS, PAIRS, epochs=9, on_epoch=spoil)
        assert min(history, key=lambda r: r["valid_loss"])["epoch"] == 3
        fit(plain, epochs=3)
        assert_same(spoiled, plain)
        assert spoiled.n_steps == plain.n_steps == history[2]["step"]
        assert fit(spoiled, epochs=1)[0]["epoch"] == fit(plain, epochs=1)[0]["epoch"] == 4
        assert_same(spoiled, plain)

    def test_only_where_it_is_wanted(self):
        def spoil(trainer, record):
            if record["epoch"] == 1:
                trainer.model.load_state_dict({name: array * 3 for name, array in weights(trainer).items()})

        trainer = trainer_of(lr=1e-4)
        history = fit(trainer, PAIRS, VALID, epochs=2, on_epoch=spoil, restore_best=False)
        assert history[1]["valid_loss"] > history[0]["valid_loss"] and trainer.n_steps == history[1]["step"]


class TestResume:
    @pytest.mark.parametrize(("first", "second"), [(5, 5), (1, 9), (9, 1)])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_ten_steps_are_some_a_save_a_load_and_the_others(self, tmp_path, first, second, accumulate):
        settings = {"schedule": tr.schedules.Noam(warmup=4), "label_smoothing": 0.1, "clip_norm": 1.0}
        options = {"accumulate": accumulate, "max_tokens": 40}
        one, other = trainer_of(**settings), trainer_of(**settings)
        whole = fit(one, steps=10, **options)
        fit(other, steps=first, **options)
        other.save(tmp_path)
        again = tr.Trainer.load(tmp_path)
        rest = fit(again, steps=second, **options)
        assert_same(one, again)
        assert without_time(rest)[-1] == without_time(whole)[-1]
        assert (again.optimizer, again.schedule, again.seed, again.n_steps) == (
            one.optimizer,
            one.schedule,
            one.seed,
            10,
        )
        # And on and on.
        fit(one, epochs=1, **options)
        fit(again, epochs=1, **options)
        assert_same(one, again)

    def test_a_later_call_goes_on_without_a_file(self):
        one, other = trainer_of(), trainer_of()
        fit(one, epochs=2)
        for _ in range(100):
            if fit(other, steps=2, epochs=1)[-1]["epoch"] == 2 and other.n_steps >= one.n_steps:
                break
        assert other.n_steps == one.n_steps
        assert_same(one, other)

    @pytest.mark.parametrize("where", ["on_epoch", "progress"])
    def test_a_checkpoint_of_a_callback_goes_on_from_there(self, tmp_path, where):
        trainer = trainer_of()

        def save(*_):
            if trainer.n_steps <= 11:
                trainer.save(tmp_path)

        fit(trainer, steps=16, valid=VALID, restore_best=False, **{where: save})
        again = tr.Trainer.load(tmp_path)
        assert 0 < again.n_steps <= 11
        fit(again, steps=16 - again.n_steps)
        assert_same(trainer, again)

    def test_a_save_beside_a_fit_is_of_one_moment(self, tmp_path):
        tokens = fit(trainer_of(), epochs=1)[0]["n_tokens"]
        trainer, stop = trainer_of(), threading.Event()
        thread = threading.Thread(
            target=fit, args=(trainer,), kwargs={"epochs": 9999, "on_epoch": lambda *_: stop.is_set()}
        )
        thread.start()
        try:
            for _ in range(10):
                trainer.save(tmp_path)
                assert fit(tr.Trainer.load(tmp_path), epochs=1)[0]["n_tokens"] == tokens
        finally:
            stop.set()
            thread.join()

    def test_a_trainer_fits_once_at_a_time(self):
        trainer = trainer_of()
        with pytest.raises(tr.ConfigError, match="fitting already"):
            fit(trainer, steps=3, progress=lambda result: fit(trainer, steps=1))
        assert trainer.n_steps == 1
        fit(trainer, steps=2)
        assert trainer.n_steps == 3

    def test_other_data_begin_an_epoch(self):
        trainer = trainer_of()
        fit(trainer, steps=2)
        recorder = Recorder(data(40, seed=3))
        history = fit(trainer, recorder, epochs=1)
        assert history[0]["epoch"] == 2 and sorted(recorder.asked[40:]) == list(range(40))

    def test_steps_by_hand_do_not_move_the_data(self):
        recorder = Recorder(PAIRS)
        trainer = trainer_of()
        fit(trainer, recorder, steps=3)
        trainer.step([[3]], [[3]])
        seen = len(recorder.asked)
        fit(trainer, recorder, epochs=1)
        asked = recorder.asked[len(PAIRS) : seen] + recorder.asked[seen + len(PAIRS) :]
        assert sorted(asked) == list(range(len(PAIRS)))


class TestBadData:
    @pytest.mark.parametrize(
        ("pairs", "error", "text"),
        [
            ([], tr.ShapeError, "there are no pairs"),
            (3, tr.DTypeError, "expected pairs"),
            ({0: ([3], [3])}, tr.DTypeError, "got dict"),
            ([[3], [4], [5]], tr.ShapeError, r"list\(zip\(src, tgt\)\)"),
            ([([3], [3]), ([3], [])], tr.ShapeError, r"pairs\[1\]\.tgt"),
            ([([3], [3]), ([], [3])], tr.ShapeError, r"pairs\[1\]\.src"),
            ([([3], [3]), 5], tr.ShapeError, "pair 1: expected"),
            ([([3], [3]), ([3], [3], [3])], tr.ShapeError, "pair 1: expected"),
            ([([3], [3]), ([3.5], [3])], tr.DTypeError, r"pairs\[1\]\.src"),
            ([([3], [3]), ([3], [10])], tr.TokenOutOfRangeError, r"pairs\[1\]\.tgt"),
            ([([3], [3]), ([3], [4, 1])], tr.ShapeError, "bos_id 1 stands at row 0, column 1"),
            ([([3], [3]), ([3, 0, 4], [4])], tr.ShapeError, "pad_id 0 stands inside"),
            ([([3], [3]), ([3] * 40, [4] * 30)], tr.ShapeError, "pair 1 has 40 source and 30 target tokens"),
        ],
    )
    def test_it_is_found_before_training_starts(self, pairs, error, text):
        trainer = trainer_of()
        for broken in (pairs, Recorder(pairs) if isinstance(pairs, list) else pairs):
            with pytest.raises(error, match=text):
                fit(trainer, broken, steps=1)
            with pytest.raises(
                error, match=text.replace("pairs", "valid") if "pairs" in text and pairs != 3 and pairs else text
            ):
                fit(trainer, PAIRS, broken, steps=1)
        assert trainer.n_steps == 0

    def test_padded_rows_are_pairs_too(self):
        one, other = trainer_of(), trainer_of()
        width = max(len(src) for src, _ in PAIRS)
        src, tgt = (np.array([np.pad(pair[i], (0, width - len(pair[i]))) for pair in PAIRS]) for i in (0, 1))
        fit(one, epochs=1)
        fit(other, list(zip(src, tgt, strict=True)), epochs=1)
        assert_same(one, other)


class TestProgress:
    def test_a_function_gets_every_step(self):
        seen = []
        trainer = trainer_of()
        fit(trainer, steps=4, progress=seen.append)
        assert [result.step for result in seen] == [1, 2, 3, 4] and all(isinstance(r, tr.StepResult) for r in seen)

    def test_plain_lines_where_there_is_no_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr("transformer_rs.fitting._LINE_EVERY", 0.0)
        fit(trainer_of(), steps=3, progress=None)
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == "" and len(lines) == 3 and "\r" not in err
        assert lines[0].startswith("step 1: loss ") and "tokens/s" in lines[0] and "s left" in lines[0]

    def test_an_epoch_of_few_steps_is_worth_a_word(self, capsys, monkeypatch):
        monkeypatch.setattr("transformer_rs.fitting._LINE_EVERY", math.inf)
        expected = "fit: an epoch has 1 step of up to 4,096 tokens; a smaller max_tokens makes more of them\n"
        for progress, said in ((None, expected), (False, ""), (lambda result: None, "")):
            fit(trainer_of(), epochs=2, max_tokens=4096, progress=progress)
            assert capsys.readouterr() == ("", said)
        fit(trainer_of(), PAIRS[:3], epochs=2, max_tokens=4096, progress=None)
        assert capsys.readouterr() == ("", "")

    def test_silence(self, capsys, monkeypatch):
        monkeypatch.setattr("transformer_rs.fitting._LINE_EVERY", math.inf)
        fit(trainer_of(), steps=3, progress=None)
        monkeypatch.setattr("transformer_rs.fitting._LINE_EVERY", 0.0)
        fit(trainer_of(), steps=3, progress=False)
        assert capsys.readouterr() == ("", "")

    def test_a_bar_on_a_terminal(self, monkeypatch):
        pytest.importorskip("tqdm")
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr("sys.stderr", terminal)
        fit(trainer_of(), epochs=1, progress=None)
        assert "\r" in terminal.getvalue() and "tokens/s" in terminal.getvalue()

    def test_a_bar_that_cannot_be_had(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
        with pytest.raises(ImportError, match=r"transformer_rs\[progress\]"):
            fit(trainer_of(), steps=1, progress=True)


def small_trainer(**values):
    config = tr.TransformerConfig(
        src_vocab=10, tgt_vocab=10, d_model=16, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=24, **values
    )
    return tr.Trainer(tr.Transformer(config, seed=0), seed=0)


@pytest.mark.parametrize("error", [ValueError("my file is corrupt"), TypeError("mine"), KeyError("mine")])
def test_what_a_data_set_raises_comes_out(error):
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            raise error

    for call in (lambda: fit(trainer_of(), Broken(), epochs=1), lambda: trainer_of().evaluate(Broken())):
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (([3], [4] * 6), r"\[60\]\.tgt`: row 0 has 7 ids with BOS, more than max_positions=6"),
        (([3] * 7, [4]), r"\[60\]\.src`: row 0 has 7 ids, more than max_positions=6"),
    ],
)
def test_a_pair_beyond_the_table_is_found_before_training(pair, text):
    trainer = small_trainer(positions="learned", max_positions=6)
    short = [([3] * 6, [4] * 5)] * 60
    fit(trainer, short, valid=short, steps=1)
    with pytest.raises(tr.ShapeError, match="argument `pairs" + text):
        fit(trainer, [*short, pair], steps=5)
    with pytest.raises(tr.ShapeError, match="argument `valid" + text):
        fit(trainer, short, valid=[*short, pair], steps=5)
    with pytest.raises(tr.ShapeError, match="argument `pairs" + text):
        trainer.evaluate([*short, pair])
    assert trainer.n_steps == 1


def test_a_source_of_one_token_joins_a_batch_where_batches_have_statistics():
    trainer = small_trainer(norm="batch")
    pairs = [([3, 4, 5], [4, 5])] * 20 + [([3], [4])] * 3
    for max_tokens in (2, 5, 6):
        some = pairs if max_tokens > 2 else pairs[20:]
        recorder = Recorder(some)
        history = fit(trainer, recorder, valid=some, epochs=3, max_tokens=max_tokens)
        assert [record["n_tokens"] for record in history] == [sum(len(tgt) + 1 for _, tgt in some)] * 3
    with pytest.raises(tr.ShapeError, match='norm="batch" needs two source tokens, got one'):
        fit(trainer, pairs[20:21], epochs=1)
    plan = fitting.Plan(Pairs("fit", "pairs", pairs, trainer.model.config), 5, 1, 0)
    for epoch in range(5):
        groups = [batch for group in plan.groups(epoch) for batch in group]
        assert sorted(np.concatenate(groups)) == list(range(23))
        assert all(plan.data.src_lengths[batch].sum() > 1 for batch in groups)


@pytest.mark.parametrize("kind", [tr.schedules.Cosine, tr.schedules.Linear])
def test_a_schedule_that_only_rises_is_refused(kind):
    trainer = trainer_of(schedule=kind(warmup=5))
    with pytest.raises(tr.ConfigError, match="rises up to step 5, and the last one is 5; pass a smaller warmup"):
        fit(trainer, steps=5)
    assert trainer.n_steps == 0
    fit(trainer, steps=6)
    fit(trainer_of(schedule=kind(warmup=5, total=9)), steps=2)


class TestBestOfAnInterruptedFit:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, LookupError])
    def test_it_is_kept_and_the_trainer_stays_where_it_is(self, error, capsys):
        def spoil(trainer, record):
            if record["epoch"] == 2:
                trainer.model.load_state_dict({name: 1.7 * array for name, array in weights(trainer).items()})
            if record["epoch"] == 3:
                raise error

        one, other = trainer_of(lr=1e-3), trainer_of(lr=1e-3)
        with pytest.raises(error):
            fit(one, PAIRS, PAIRS, epochs=9, on_epoch=spoil, progress=None)
        assert "fit: trainer.restore_best() goes back to epoch 2" in capsys.readouterr().err
        fit(other, epochs=2)
        assert one.n_steps > other.n_steps
        assert one.restore_best() is True
        assert_same(one, other)
        assert one.n_steps == other.n_steps
        assert fit(one, epochs=1)[0]["epoch"] == 3
        assert one.restore_best() is False

    def test_training_goes_on_from_it(self):
        def stop(trainer, record):
            raise KeyboardInterrupt

        one, other = trainer_of(), trainer_of()
        with pytest.raises(KeyboardInterrupt):
            fit(one, PAIRS, VALID, epochs=9, on_epoch=stop)
        fit(other, epochs=1)
        for _ in range(2):
            one.step([[3, 4]], [[4, 3]])
            assert one.restore_best() is True
        assert without_time(fit(one, epochs=2)) == without_time(fit(other, epochs=2))
        assert_same(one, other)

    def test_where_there_is_none(self):
        trainer = trainer_of()
        assert trainer.restore_best() is False
        fit(trainer, PAIRS, VALID, epochs=1)
        assert trainer.restore_best() is False
        with pytest.raises(tr.ConfigError, match="fitting already"):
            fit(trainer, epochs=1, on_epoch=lambda trainer, _: trainer.restore_best())


@pytest.mark.parametrize("progress", [True, None])
def test_progress_without_stderr(monkeypatch, progress):
    monkeypatch.setattr("sys.stderr", None)
    trainer = trainer_of()
    assert len(fit(trainer, epochs=1, progress=progress)) == 1
    list(trainer.model.generate_iter([[3], [4]], max_len=2, progress=bool(progress)))


def test_restore_best_is_a_flag():
    with pytest.raises(tr.DTypeError, match="argument `restore_best`: expected True or False, got 'x'"):
        fit(trainer_of(), steps=1, restore_best="x")
    for value in (0, 1, np.bool_(False)):
        fit(trainer_of(), steps=1, restore_best=value)
