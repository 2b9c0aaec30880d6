"""Decoding in plain NumPy, written from the formulas, over whole targets and without caches; the model gives nothing but logits."""

import numpy as np

PAD, BOS, EOS = 0, 1, 2


def philox(key, counter):
    """Philox4x32-10 (Salmon et al. 2011)."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def halves(n):
    return n & 0xFFFFFFFF, n >> 32


def uniform(seed, row, draw, place):
    key = halves(seed)
    for data in (row, draw):
        key = tuple(philox(key, (*halves(data), 0, 1))[:2])
    low, high = philox(key, (*halves(place), 0, 0))[:2]
    return ((low | high << 32) >> 11) / 2**53


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


class Plain:
    """Decoding of one source, in plain words."""

    def __init__(self, model, source, row=0, **options):
        self.model, self.source, self.row, self.o = model, source, row, options
        self.prefix = options.get("prefixes", [[]] * (row + 1))[row]
        self.max_len = self.length(options.get("max_len") or (2, 10))
        self.min_len = self.length(options.get("min_len", 0))

    def length(self, value):
        if isinstance(value, int):
            return value
        return max(int(np.floor(value[0] * len(self.source))) + value[1], 0)

    def next(self, ids):
        """The model's log-probabilities, and the logits to go by."""
        raw = self.model([self.source], [[BOS, *ids]])[0][-1]
        place, x = len(ids), raw.copy()
        forced = self.prefix[place] if place < len(self.prefix) else self.o.get("forced", {}).get(place)
        if forced is not None:
            x[np.arange(len(x)) != forced] = -np.inf
            return log_softmax(raw), x
        if "logits_processor" in self.o:
            x = np.array(self.o["logits_processor"](np.array(ids), x), np.float32)
        penalty = np.float32(self.o.get("repetition_penalty", 1.0))
        for token in set(ids):
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        never = [PAD, BOS, *self.o.get("suppress", [])] + ([EOS] if place < self.min_len else [])
        n = self.o.get("no_repeat_ngram")
        if n is not None:
            runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
            never += [token for token in range(len(x)) if (*ids[len(ids) - n + 1 :], token)[-n:] in runs]
        x[never] = -np.inf
        return log_softmax(raw), x

    def draw(self, x, u):
        if np.isneginf(x).all():
            return None
        w = np.exp((x.astype(np.float64) - x.max()) / (self.o.get("temperature") or 1.0))
        order = sorted((i for i in range(len(x)) if w[i] > 0), key=lambda i: (-w[i], i))
        order = order[: self.o.get("top_k") or len(order)]
        if self.o.get("top_p"):
            share = np.cumsum(w[order]) / w[order].sum()
            order = order[: int(np.argmax(share >= self.o["top_p"])) + 1]
        order = sorted(i for i in order if w[i] >= (self.o.get("min_p") or 0.0))
        return order[int(np.argmax(np.cumsum(w[order]) > u * w[order].sum()))]

    def sample(self, seed, row, number=0):
        ids, logp = [], []
        while len(ids) < self.max_len:
            logprobs, x = self.next(ids)
            token = self.draw(x, uniform(seed, row, number, len(ids)))
            if token is None:
                break
            logp.append(logprobs[token])
            if token == EOS:
                return ids, logp, True
            ids.append(token)
        return ids, logp, False

    def score(self, values):
        return sum(values) / max(len(values), 1) ** self.o.get("length_penalty", 1.0)

    def search(self):
        """[(ids, log-probabilities, finished)], best first; what it goes by is Σ of the changed log-probabilities."""
        beam = self.o.get("beam", 1)
        live, ended = [([], [], [])], []
        while live:
            every = []
            for ids, logp, values in live:
                logprobs, x = self.next(ids)
                lse = (x - logprobs)[~np.isinf(x)]
                raw = self.model([self.source], [[BOS, *ids]])[0][-1].astype(np.float64)
                shift = (raw - logprobs)[0]
                assert len(lse) == 0 or np.isfinite(shift)
                for token in np.flatnonzero(~np.isneginf(x)):
                    every.append(([*ids, int(token)], [*logp, logprobs[token]], [*values, x[token] - shift]))
            if not every:
                ended += [(*path, False) for path in live]
                break
            every.sort(key=lambda path: -sum(path[2]))
            ended += [(ids[:-1], *rest, True) for ids, *rest in every[:beam] if ids[-1] == EOS]
            live = [path for path in every if path[0][-1] != EOS][:beam]
            if len(ended) >= self.o.get("patience", 1.0) * beam:
                break
            if live and len(live[0][0]) == self.max_len:
                ended += [(*path, False) for path in live]
                break
        ended.sort(key=lambda path: -self.score(path[2]))
        return [(ids, logp, finished) for ids, logp, _, finished in ended]
