"""Decoding of any number of sources: a window moves over them, and answers come out in order."""

import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np

from . import _core
from ._arrays import IntArray
from ._sequences import sources
from .config import TransformerConfig
from .errors import ConfigError, DTypeError
from .threads import num_threads

# Sources that a worker decodes side by side at most: they keep a core busy.
_AT_ONCE = 64

_Source = tuple[int, IntArray]
_Done = list[tuple[int, IntArray]]


class Window:
    """Sources that are read but whose answers are not given yet."""

    def __init__(
        self,
        op: str,
        config: TransformerConfig,
        inputs: Iterable[Any],
        max_tokens: int,
        decoders: list[_core.Decoder],
        models: list[_core.Transformer],
        progress: Any,
    ) -> None:
        if not isinstance(inputs, Iterable) or isinstance(inputs, str | bytes):
            message = f"expected an iterable of sequences of ids, got {type(inputs).__name__}"
            raise DTypeError(f"{op}: argument `inputs`: {message}")
        if not (isinstance(progress, bool) or callable(progress)):
            raise DTypeError(f"{op}: argument `progress`: expected a bool or a function, got {type(progress).__name__}")
        self.op, self.config, self.max_tokens, self.progress = op, config, max_tokens, progress
        self.total = len(inputs) if isinstance(inputs, Sized) else None
        self.inputs, self.engine = enumerate(inputs), _Workers(decoders) if len(decoders) > 1 else _Alone(decoders[0])
        self.models = models
        self.lengths: dict[int, int] = {}
        self.tokens, self.more = 0, True

    def answers(self) -> Iterator[IntArray]:
        """All of them, in order."""
        show = _Bar(self.op, self.total) if self.progress is True else self.progress or (lambda _: None)
        ready: dict[int, IntArray] = {}
        given, began = 0, self.versions()
        try:
            while True:
                if self.more and self.tokens <= self.max_tokens // 2:
                    self.engine.take(self.read())
                if not self.lengths:
                    return
                self.check(began)
                for number, ids in self.engine.work():
                    ready[number] = ids
                while given in ready:
                    self.check(began)
                    self.tokens -= self.lengths.pop(given)
                    given += 1
                    show(given)
                    yield ready.pop(given - 1)
        finally:
            self.engine.stop()
            getattr(show, "close", lambda: None)()

    def versions(self) -> list[int]:
        return [model.version() for model in self.models]

    def check(self, began: list[int]) -> None:
        """Refuse weights that changed; a decoder notices it only while it has sources."""
        if self.versions() != began:
            raise ConfigError(f"{self.op}: the weights have changed since it began; begin anew")

    def read(self) -> list[_Source]:
        """The next sources, as many as there is room for, the longest first."""
        new: list[_Source] = []
        while self.tokens < self.max_tokens:
            number, one = next(self.inputs, (-1, None))
            if number < 0:
                self.more = False
                break
            ids = sources(self.op, self.config, [one], None, f"inputs[{number}]").ids
            new.append((number, ids))
            self.lengths[number] = len(ids)
            self.tokens += len(ids)
        return sorted(new, key=lambda source: -len(source[1]))


class _Alone:
    """One decoding, advanced by whoever asks for answers."""

    def __init__(self, decoder: _core.Decoder) -> None:
        self.decoder = decoder

    def take(self, new: list[_Source]) -> None:
        _push(self.decoder, new)

    def work(self) -> _Done:
        return _ids(self.decoder.step(True)[1])

    def stop(self) -> None:
        pass


class _Workers:
    """A thread for each decoding."""

    def __init__(self, decoders: list[_core.Decoder]) -> None:
        self.waiting: queue.SimpleQueue[_Source | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[_Done | BaseException] = queue.SimpleQueue()
        self.decoders, self.stopped = decoders, False
        self.under_way = [0] * len(decoders)
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(len(decoders))]

    def take(self, new: list[_Source]) -> None:
        n = len(self.decoders)
        # The longest first, for each of them.
        for i in range(n):
            for source in new[i::n]:
                self.waiting.put(source)
        for thread in self.threads:
            if thread.ident is None:
                thread.start()

    def work(self) -> _Done:
        while True:
            try:
                # A limit lets Ctrl-C through.
                done = self.done.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(done, BaseException):
                raise done
            return done

    def stop(self) -> None:
        self.stopped = True
        for decoder in self.decoders:
            decoder.stop()
            self.waiting.put(None)
        for thread in self.threads:
            if thread.ident is not None:
                thread.join()

    def run(self, worker: int) -> None:
        decoder = self.decoders[worker]
        try:
            with num_threads(1):
                while not self.stopped:
                    here = self.under_way[worker] = decoder.sources()
                    left = self.waiting.qsize() + sum(self.under_way)
                    if room := _room(here, left, len(self.decoders)):
                        new = self.next(room, wait=here == 0)
                        self.under_way[worker] += len(new)
                        _push(decoder, new)
                    done = decoder.step(False)[1]
                    if done:
                        self.done.put(_ids(done))
        except BaseException as error:  # the interrupt by `stop` too, which nobody waits for
            self.done.put(error)

    def next(self, n: int, wait: bool) -> list[_Source]:
        new: list[_Source] = []
        try:
            while len(new) < n:
                source = self.waiting.get(block=wait and not new)
                if source is None:
                    break
                new.append(source)
        except queue.Empty:
            pass
        return new


def _room(here: int, left: int, workers: int) -> int:
    """How many sources a worker takes that has some here, of all that are left."""
    # All end at about the same time if none has more than its share.
    most = min(_AT_ONCE, -(-left // workers))
    # Not one by one: what is encoded together is encoded faster.
    return max(1, most - here) if here <= most * 3 // 4 else 0


def _push(decoder: _core.Decoder, new: list[_Source]) -> None:
    if new:
        lengths = np.array([len(ids) for _, ids in new])
        decoder.push(np.concatenate([ids for _, ids in new]), lengths, [number for number, _ in new])


def _ids(done: list[tuple[int, list[Any]]]) -> _Done:
    return [(number, best[0][0]) for number, best in done]


class _Bar:
    """A bar on stderr that is told how many answers there are."""

    def __init__(self, op: str, total: int | None) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            message = "progress=True needs tqdm: pip install 'transformer_rs[progress]'"
            raise ImportError(f"{op}: {message}") from None
        self.bar = tqdm(total=total, unit=" answers", dynamic_ncols=True, disable=sys.stderr is None)

    def __call__(self, given: int) -> None:
        self.bar.update(given - self.bar.n)

    def close(self) -> None:
        self.bar.close()
