"""Decoding with a model: searching and drawing, at once, token by token, or over any number of sources."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import ArrayLike, Ids, IntArray
from ._decoding import DecodingOptions, settings
from ._sequences import sources
from ._values import as_size, named
from .config import TransformerConfig
from .errors import ConfigError
from .hypothesis import Alternatives, Hypothesis

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._core import _Found

__all__ = ["Generation"]


class Generation:
    """The part of a model that says something."""

    _config: TransformerConfig
    _core: _core.Transformer

    def generate(
        self,
        src: ArrayLike,
        *,
        lengths: ArrayLike | None = None,
        src_lengths: ArrayLike | None = None,
        **options: "Unpack[DecodingOptions]",
    ) -> list[IntArray]:
        """Say what the model finds likeliest, by greedy or beam search, or draw from what it finds likely.

        The bits of a result depend on its source (and seed) alone: not on the batch, its order, padding or threads.
        BOS and PAD are never said. Ties go to the lowest id.

        Several threads may call at once. Where they ask in the same way (lengths, prefixes and seeds apart, and without a
        processor), for up to 64 hypotheses together, they are one batch: a call joins between two tokens of the others and
        leaves when its own sources are done.

        A token is chosen in this order. ``logits_processor`` may replace the model's logits; ``repetition_penalty`` lowers
        those of tokens said before; what ``suppress``, ``min_len`` and ``no_repeat_ngram`` forbid falls to minus infinity;
        the search, or the draw, takes from what is left. A token of ``prefixes`` or ``forced`` skips all of that. Where
        nothing is left, as with every token suppressed or minus infinity alone from a processor, that answer ends there,
        perhaps empty, and :meth:`hypotheses` calls it unfinished; in a beam, other hypotheses may go on. EOS is a token
        like others: it may be suppressed, and where it alone is left it is said.

        Args:
            src: Source ids, ragged or padded (B, S).
            lengths: What is real of each source; ``src_lengths`` is another name for it. None, here as below, means "not
                given".
            max_len: The most ids to return, a number or ``(a, b)`` for ``floor(a * len(src_i)) + b`` (fairseq's
                ``max_len_a`` and ``max_len_b``); None means ``(2, 10)``, at most ``max_positions`` where positions are learned.
            min_len: The fewest ids to return, a number or ``(a, b)``. Default 0.
            beam: Hypotheses kept alive; 1, the default, is greedy.
            length_penalty: The power a in ``score = sum(log p) / n ** a``, n the number of tokens with EOS: 0 compares
                sums, 1, the default, means; more favours long answers. (A simpler form of the penalty of Wu et al. 2016.)
            patience: The search ends when ``patience * beam`` hypotheses are finished (Kasai et al. 2022). Default 1; a
                small number ends it at the first.
            temperature: Draw instead of searching, from weights ``w = exp((x - max(x)) / temperature)`` of logits x.
                Above 0. Any of ``temperature`` (default 1), ``top_k``, ``top_p`` and ``min_p`` turns sampling on; what
                each leaves is what the next one sees, in this order.
            top_k: Draw from so many of the likeliest tokens (Fan et al. 2018).
            top_p: Draw from the fewest likeliest tokens whose weights make up this share of all (Holtzman et al. 2020).
            min_p: Draw from tokens with ``w >= min_p * max(w)`` (Nguyen et al. 2024).
            seed: What decides the draws: an int, of which source i uses (seed, i), or one int per source, each of which
                draws alike in any batch and gives what it gives as the int of a batch of one. None: fresh entropy.
            repetition_penalty: t: logits of tokens that the answer holds already become ``x / t`` if above 0, ``x * t``
                otherwise (Keskar et al. 2019). Default 1, which changes nothing.
            no_repeat_ngram: No answer holds the same run of so many ids twice (Paulus et al. 2018).
            suppress: Ids that are never said.
            forced: Ids that must stand at given places, ``{place: id}``, places counted from 0; EOS may be one.
            prefixes: What the answer to each source begins with, ragged or padded (B, T), each possibly empty. It is part of
                what is returned, and counts for the lengths.
            logits_processor: A function ``(ids (t,), logits (V,)) -> logits (V,)``, called for every hypothesis and token, on
                this thread, with copies: int64 ids so far, without BOS, and the model's own f32 logits. It returns what to
                go by, minus infinity for what must not follow. It may not change the model. A search then ranks by what is
                left of a logit after all changes, less ``log(sum(exp(x)))`` of the model's own logits x: it is not
                normalised again. Scores stay the model's.
            draft: A faster model with the same vocabularies, such as ``model.quantize("int8")``, that guesses the next tokens:
                speculative decoding (Leviathan et al. 2023). All guesses are checked at once, in the time that one token takes,
                and those that are wrong dropped; so it changes the time alone, and no bit of the result. It helps where up
                to five sources are decoded together and weights in f32 or bf16 take longer to come from memory than the products: with
                more sources it is not asked. For one hypothesis of each source, without a ``logits_processor``.

        Of one greedy answer, or one drawn from the ``top_k``, scores would need every logit; ids do not, so this is faster than
        :meth:`hypotheses` where the vocabulary is large.

        Returns:
            A list of int64 arrays, without BOS and EOS.

        Raises:
            ConfigError: Settings outside their domain or against each other.
            ShapeError: An empty batch or source, padding inside a sequence, prefixes or seeds that are not as many as sources.
            DTypeError: An unknown argument, ids that are no integers, a setting of another type.
            TokenOutOfRangeError: A source, prefix, suppressed or forced id outside its vocabulary.
            NonFiniteError: The logits are not finite, or those that a processor returned.
            OutOfMemoryError: The keys and values of one source, at ``beam`` times ``max_len``, exceed the free memory.

        What a processor raises comes out as it is.

        >>> import numpy as np
        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> model = tr.Transformer(config, seed=0)
        >>> len(model.generate([[3, 4, 5], [6]], max_len=4, beam=2))
        2
        >>> drawn = model.generate([[3, 4, 5]], temperature=0.8, top_p=0.9, seed=1)
        >>> bool((drawn[0] == model.generate([[6], [3, 4, 5]], temperature=0.8, top_p=0.9, seed=[5, 1])[1]).all())
        True
        >>> model.generate([[3, 4, 5]], draft=model.quantize("int8"))[0].tolist() == model.generate([[3, 4, 5]])[0].tolist()
        True
        >>> model.generate([[3]], prefixes=[[4, 5]], max_len=3, logits_processor=lambda ids, x: np.eye(7)[6] * 99)[0]
        array([4, 5, 6])
        """
        op = "Transformer.generate"
        ids = self._sources(op, src, lengths, src_lengths)
        asked = settings(op, self._config, options, ids)
        with named(op):
            found = self._core.hypotheses(ids.ids, ids.lengths, asked, asked["draft"])
        return [best[0][0] for best in found]

    def hypotheses(
        self,
        src: ArrayLike,
        *,
        n_best: int = 1,
        alternatives: int = 0,
        lengths: ArrayLike | None = None,
        src_lengths: ArrayLike | None = None,
        **options: "Unpack[DecodingOptions]",
    ) -> list[list[Hypothesis]]:
        """Say what the model finds likeliest, with scores and attention. See :meth:`generate` for the settings.

        Args:
            n_best: Hypotheses to return of each source, best first: at most ``beam``. When sampling, so many are drawn,
                independently of each other.
            alternatives: How many of the model's likeliest tokens to give for every step of a hypothesis.

        Returns:
            For every source a list of :class:`Hypothesis`: ``n_best`` of them, or as many as there are. They are ordered by
            what the search went by: their scores, unless a processor or a penalty changed the logits.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> model = tr.Transformer(config, seed=0)
        >>> best = model.hypotheses([[3, 4, 5]], beam=3, n_best=2, alternatives=4, max_len=4)[0]
        >>> best[0].score >= best[1].score
        True
        >>> best[0].alternatives.ids.shape == (len(best[0].token_logprobs), 4)
        True
        """
        op = "Transformer.hypotheses"
        ids = self._sources(op, src, lengths, src_lengths)
        asked = settings(op, self._config, options, ids, n_best=n_best, alternatives=alternatives, scores=True)
        version = self._core.version()
        with named(op):
            found = self._core.hypotheses(ids.ids, ids.lengths, asked, asked["draft"])
        return [
            [self._hypothesis(source, one, version) for one in best]
            for source, best in zip(ids.sequences(), found, strict=True)
        ]

    def stream(self, ids: ArrayLike, **options: "Unpack[DecodingOptions]") -> Iterator[int]:
        """Say one answer token by token: those that :meth:`generate` returns for ``[ids]``.

        Each token is computed when it is asked for. Dropping the iterator ends the work; an error, or an interrupt, does
        too. Other calls may use the model meanwhile, but its weights may not change, nor those of a draft.

        Args:
            ids: The ids of one source (S,).
            options: Those of :meth:`generate`, but for a beam; ``prefixes`` holds one prefix, ``[prefix]``.

        Returns:
            An iterator over ints, without BOS and EOS.

        Raises:
            ConfigError: A beam above 1; weights that changed since the first token.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> model = tr.Transformer(config, seed=0)
        >>> list(model.stream([3, 4, 5], max_len=4)) == model.generate([[3, 4, 5]], max_len=4)[0].tolist()
        True
        """
        op = "Transformer.stream"
        source = sources(op, self._config, [ids], None, "ids")
        asked = settings(op, self._config, options, source)
        if asked["beam"] > 1:
            message = "a search over several hypotheses knows no token before its end"
            raise ConfigError(f"{op}: argument `beam`: {message}; use beam=1, or generate")
        if asked["patience"] != 1:
            raise ConfigError(
                f"{op}: argument `patience`: there is one hypothesis, which ends at its EOS; leave it out"
            )
        with named(op):
            decoder = self._core.decoder(asked, asked["draft"])
            decoder.push(source.ids, source.lengths, [0])
        return _tokens(decoder)

    def generate_iter(
        self,
        inputs: Iterable[ArrayLike],
        *,
        max_tokens: int = 16_384,
        workers: int = 1,
        progress: "bool | Callable[[int], object]" = False,
        **options: "Unpack[DecodingOptions]",
    ) -> Iterator[IntArray]:
        """Answer any number of sources, in their order: the answers that :meth:`generate` gives for the list of them.

        Inputs are read as they are needed. A window of them is sorted by length and decoded together; a source that is
        done leaves at once and its place is taken by one that waits. Dropping the iterator ends the work. Other calls may
        use the model meanwhile, but its weights may not change, nor those of a draft.

        Args:
            inputs: Sources, each the ids of one sequence (S,).
            max_tokens: How many source tokens are read ahead of the answer that is given next: more keep the cores busier,
                fewer need less memory.
            workers: Above 1, so many threads decode sources of their own, each on one core; one answer alone takes longer. With
                1, all threads work on each step. On two cores a worker for each gave 1.0 to 1.2 times the tokens per second
                (docs/benchmarks.md).
            progress: True shows a bar (with tqdm); a function is called with the number of answers so far.
            options: Those of :meth:`generate`, but for ``prefixes`` and a list of seeds, which belong to a list of sources;
                with more than one worker no ``logits_processor``, which would be called from several threads.

        Returns:
            An iterator over int64 arrays, without BOS and EOS.

        Raises:
            TransformerRsError: As :meth:`generate`; an input that is refused is named by its number.
            ConfigError: Weights that changed since the first answer was asked for.

        >>> import transformer_rs as tr
        >>> config = tr.TransformerConfig(src_vocab=9, tgt_vocab=7, d_model=16, n_heads=2, d_ff=32)
        >>> model = tr.Transformer(config, seed=0)
        >>> inputs = [[3, 4, 5], [6], [7, 8]]
        >>> [a.tolist() for a in model.generate_iter(iter(inputs))] == [a.tolist() for a in model.generate(inputs)]
        True
        """
        from ._window import Window  # late, as few need it

        op = "Transformer.generate_iter"
        asked = settings(op, self._config, options, None)
        ahead, n = as_size(op, "max_tokens", max_tokens, 1), as_size(op, "workers", workers, 1, 1024)
        if n > 1 and asked["logits_processor"] is not None:
            message = "a processor is called on the calling thread alone; pass workers=1"
            raise ConfigError(f"{op}: argument `logits_processor`: {message}")
        with named(op):
            decoders = list(map(self._core.decoder, [asked] * n, [asked["draft"]] * n))
        models = [self._core] if asked["draft"] is None else [self._core, asked["draft"]]
        return Window(op, self._config, inputs, ahead, decoders, models, progress).answers()

    def _sources(self, op: str, src: ArrayLike, lengths: Any, src_lengths: Any) -> Ids:
        if lengths is not None and src_lengths is not None:
            raise ConfigError(f"{op}: `lengths` and `src_lengths` are two names of one argument; pass one of them")
        if lengths is None:
            return sources(op, self._config, src, src_lengths)
        return sources(op, self._config, src, lengths, lengths_name="lengths")

    def _hypothesis(self, source: IntArray, found: "_Found", version: int) -> Hypothesis:
        ids, score, token_logprobs, finished, likeliest = found
        alternatives = None if likeliest is None else Alternatives(*likeliest)
        look = self._looks(source, ids, len(token_logprobs), version)
        return Hypothesis(ids, score, token_logprobs, finished, alternatives, look)

    def _looks(self, source: IntArray, ids: IntArray, tokens: int, version: int) -> Any:
        """Where the tokens of a hypothesis looked, computed when somebody asks."""

        def attention() -> NDArray[np.float32]:
            if self._core.version() != version:
                remedy = "read it before the weights change"
                raise ConfigError(f"Hypothesis.attention: the weights are not those that made it; {remedy}")
            tgt_in = np.concatenate([[self._config.bos_id], ids])[:tokens]
            lengths = np.array([len(source)]), np.array([tokens])
            _, weights = self._core.forward(source, lengths[0], tgt_in, lengths[1], True)
            cross = weights[self._config.n_encoder_layers + 1 :: 2]
            return np.stack([layer.reshape(self._config.n_heads, tokens, len(source)) for layer in cross])

        return attention


def _tokens(decoder: _core.Decoder) -> Iterator[int]:
    said = 0
    while True:
        newest, done = decoder.step(False)
        if done:
            # The last step gave a token, or EOS.
            yield from done[0][1][0][0][said:].tolist()
            return
        if newest is None:
            return
        said += 1
        yield newest
