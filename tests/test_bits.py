"""The same bits: for any number of threads, and for a sequence in any company. See docs/numerics.md."""

import numpy as np
import pytest

import transformer_rs as tr

THREADS = (1, 2, 3, 7)
KINDS = {
    "pre-norm": {},
    "post-norm, gelu": {"norm_first": False, "activation": "gelu"},
    "rms, swiglu, learned": {"norm": "rms", "activation": "swiglu", "positions": "learned", "max_positions": 64},
    "batch norm": {"norm": "batch"},
}


def model_of(kind="pre-norm", dropout=0.1):
    # Large enough that the work is really divided.
    config = tr.TransformerConfig(
        src_vocab=50, tgt_vocab=60, d_model=64, n_heads=4, n_encoder_layers=2, n_decoder_layers=2, d_ff=128,
        dropout=dropout, **KINDS[kind],
    )  # fmt: skip
    return tr.Transformer(config, seed=0)


def sentences(n, vocabulary, longest, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, size=rng.integers(1, longest)) for _ in range(n)]


SRC, TGT = sentences(40, 50, 30, seed=0), sentences(40, 60, 28, seed=1)


def bits(arrays):
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def on_threads(n, work):
    with tr.num_threads(n):
        return work()


def assert_threads_do_not_matter(work):
    results = [on_threads(n, work) for n in THREADS]
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind):
    model = model_of(kind)
    tgt_in, _ = model.shift(TGT)

    def work():
        logits, attention = model(SRC, tgt_in, return_attention=True)
        return bits(logits), [bits(layer) for layer in attention.encoder + attention.decoder + attention.cross]

    assert_threads_do_not_matter(work)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    model = model_of(kind)

    def work():
        result, grads = tr.Trainer(model, label_smoothing=0.1, seed=0).gradients(SRC, TGT)
        return result, bits(grads.values())

    assert_threads_do_not_matter(work)


def test_twenty_steps_with_dropout():
    def work():
        trainer = tr.Trainer(
            model_of(),
            optimizer=tr.AdamW(lr=3e-3),
            schedule=tr.schedules.Noam(warmup=5),
            label_smoothing=0.1,
            clip_norm=0.5,
            seed=0,
        )
        losses = [trainer.step(SRC[i::4], TGT[i::4]) for _ in range(5) for i in range(4)]
        assert losses[-1].loss < losses[0].loss
        return losses, bits(trainer.model.state_dict().values())

    assert_threads_do_not_matter(work)


def test_generation():
    model = model_of()

    def work():
        found = model.hypotheses(SRC, beam=3, n_best=2, max_len=12)
        greedy = bits(model.generate(SRC, max_len=12))
        return greedy, [(bits([h.ids, h.token_logprobs]), h.score, h.finished) for best in found for h in best]

    assert_threads_do_not_matter(work)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_alone_in_a_batch_in_another_order_padded_and_ragged(kind):
    model = model_of(kind)
    tgt_in, _ = model.shift(TGT)
    together = model(SRC, tgt_in)
    for i in (0, 7, 39):
        assert bits(model([SRC[i]], [tgt_in[i]])) == bits([together[i]])
    order = np.random.default_rng(0).permutation(len(SRC))
    shuffled = model([SRC[i] for i in order], [tgt_in[i] for i in order])
    assert bits(shuffled) == bits([together[i] for i in order])
    src, tgt = (np.array([np.pad(ids, (0, 40 - len(ids))) for ids in part]) for part in (SRC, tgt_in))
    padded = model(src, tgt)
    assert bits([logits[: len(ids)] for logits, ids in zip(padded, tgt_in, strict=True)]) == bits(together)


def test_decoding_alone_in_a_batch_and_at_any_beam_width():
    model = model_of()
    for options in ({}, {"beam": 3}):
        together = model.hypotheses(SRC, max_len=10, **options)
        for i in (0, 11, 39):
            alone = model.hypotheses([SRC[i]], max_len=10, **options)[0][0]
            assert bits([alone.ids, alone.token_logprobs]) == bits([together[i][0].ids, together[i][0].token_logprobs])
    # Cached decoding has the bits of the whole target, for every hypothesis of every beam.
    for source, best in zip(SRC[:8], model.hypotheses(SRC[:8], beam=4, n_best=4, max_len=10), strict=True):
        scores = model.score([source] * 4, [h.ids for h in best], eos=[h.finished for h in best])
        assert bits(scores) == bits([h.token_logprobs for h in best])


def test_training_with_dropout_zero_is_evaluation():
    for kind in ("pre-norm", "post-norm, gelu", "rms, swiglu, learned"):
        trainer = tr.Trainer(model_of(kind, dropout=0.0), label_smoothing=0.1, seed=0)
        result, _ = trainer.gradients(SRC, TGT)
        nll = -sum(float(s) for scores in trainer.model.score(SRC, TGT) for s in scores) / result.n_tokens
        assert result.nll == pytest.approx(nll, rel=1e-6)
        order = trainer.evaluate([(s, t) for s, t in zip(SRC, TGT, strict=True)], max_tokens=10**6)
        assert order.nll == pytest.approx(result.nll, rel=1e-9)
