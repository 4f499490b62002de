"""The backends computed token by token in float64, straight from their definitions and sharing no code with them."""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def entmax(scores, alpha):
    """By bisection of the threshold until float64 is exhausted."""
    x = (alpha - 1) * np.asarray(scores)
    low, high = x.max() - 1, x.max()
    for _ in range(100):
        tau = (low + high) / 2
        p = np.maximum(x - tau, 0) ** (1 / (alpha - 1))
        low, high = (tau, high) if p.sum() > 1 else (low, tau)
    return p


def attend(q, keys, values, scale, bias=0.0):
    """One query over the given keys."""
    return softmax(keys @ q * scale + bias) @ values


def block_sparse(q, k, v, blocks, bias, size, scale):
    """blocks[t][h]: set of blocks; bias(t, query head, block)."""
    T, Hq, D = q.shape
    H = k.shape[1]
    out = np.zeros((T, Hq, D))
    for t in range(T):
        for head in range(Hq):
            h = head // (Hq // H)
            keys = [s for s in range(t + 1) if s // size in blocks[t][h]]
            logit_bias = np.array([bias(t, head, s // size) for s in keys])
            if np.isfinite(logit_bias).any():
                out[t, head] = attend(q[t, head], k[keys, h], v[keys, h], scale, logit_bias)
    return out


def most_likely(p, topk, top_p):
    """The likeliest of the candidates {index: probability}: ``topk`` of them, or until they reach ``top_p``."""
    taken, reached = set(), 0.0
    for c in sorted(p, key=lambda c: (-p[c], c)):
        if len(taken) >= topk if topk is not None else reached >= top_p:
            break
        taken.add(c)
        reached += p[c]
    return taken


def dash(q, k, v, r, *, chunk_size, router_scale, prior, sigma, prior_heads, selector="entmax", alpha=1.5, topk=None,
         top_p=None, rope=None, init_chunks=0, local_chunks=0, router_qk=None):  # fmt: skip
    """Output [T, Hq, D] and active tokens [T, H]."""
    T, Hq, D = q.shape
    H = k.shape[1]
    group, C = Hq // H, chunk_size
    router_q, router_k = (q, k) if router_qk is None else router_qk
    summaries = np.zeros((T // C, H, D))
    for c in range(T // C):
        for h in range(H):
            query = r[h]
            if rope is not None:
                cos, sin = rope
                half = np.concatenate([-r[h][D // 2 :], r[h][: D // 2]])
                query = np.mean([r[h] * cos[t] + half * sin[t] for t in range(c * C, c * C + C)], axis=0)
            chunk = router_k[c * C : c * C + C, h]
            summaries[c, h] = softmax(chunk @ query / math.sqrt(D)) @ chunk

    p, weights = np.zeros((T, Hq, T // C + 1)), np.zeros((T, Hq, T // C + 1))
    blocks = [[None] * H for _ in range(T)]
    forced = []
    for t in range(T):
        own = t // C
        forced.append({c for c in range(own + 1) if c < init_chunks or c >= own - local_chunks})
        candidates = [c for c in range(own + 1) if c not in forced[t]]
        for head in range(Hq):
            if candidates:
                scores = router_scale * summaries[candidates, head // group] @ router_q[t, head] / math.sqrt(D)
                weights[t, head, candidates] = C * np.exp(scores)
                if selector == "entmax":
                    p[t, head, candidates] = entmax(scores, alpha[head] if np.ndim(alpha) else alpha)
                else:
                    p[t, head, candidates] = softmax(scores)
        for h in range(H):
            mean = p[t, h * group : (h + 1) * group].mean(0)
            chosen = {c for c in candidates if mean[c] > 0}
            if selector == "topk":
                chosen = most_likely({c: mean[c] for c in candidates}, topk - len(forced[t]), None)
            elif selector == "topp":
                chosen = most_likely({c: mean[c] for c in candidates}, None, top_p)
            blocks[t][h] = chosen | forced[t]

    def bias(t, head, c):
        h = head // group
        if c in forced[t] or prior == "none":
            return 0.0
        weights = p[t, head] if prior_heads == "head" else p[t, h * group : (h + 1) * group].mean(0)
        if prior == "raw":
            return math.log(weights[c]) if weights[c] > 0 else -math.inf
        mean = np.mean([math.log(weights[j]) for j in blocks[t][h] - forced[t] if weights[j] > 0])
        return ((math.log(weights[c]) if weights[c] > 0 else 0.0) - mean) / sigma

    out = np.zeros((T, Hq, D)) if prior == "mass" else block_sparse(q, k, v, blocks, bias, C, D**-0.5)
    for t, head in (
        np.ndindex(T, Hq) if prior == "mass" else ()
    ):  # a mean of attentions: of each chunk, and of all forced
        h = head // group
        keys = [s for s in range(t + 1) if s // C in forced[t]]
        terms = [(np.exp(k[keys, h] @ q[t, head] / math.sqrt(D)).sum(), keys)]
        for c in blocks[t][h] - forced[t]:
            terms.append((weights[t, head, c], range(c * C, c * C + C)))
        total = sum(weight for weight, _ in terms)
        out[t, head] = sum(
            weight / total * attend(q[t, head], k[list(keys), h], v[list(keys), h], D**-0.5) for weight, keys in terms
        )
    return out, active_tokens(T, H, lambda t, h, s: s // C in blocks[t][h])


def active_tokens(T, H, reads):
    return np.array([[sum(reads(t, h, s) for s in range(t + 1)) for h in range(H)] for t in range(T)])


def visible(t, kernel_size, stride):
    return [j for j in range(t + 1) if stride * j + kernel_size - 1 <= t]


def top_blocks(scores, own, topk, forced):
    """Forced blocks first, then by score, ties to the lower index."""
    order = sorted(range(own + 1), key=lambda b: (b not in forced, -scores[b], b))
    return set(order[:topk])


def touching(j, b, kernel_size, stride, block_size):
    """Tokens that window j and block b share."""
    return len(set(range(stride * j, stride * j + kernel_size)) & set(range(block_size * b, block_size * (b + 1))))


def moba(q, k, v, *, block_size, topk):
    """With a KV head for each query head."""
    T, H, _ = q.shape
    blocks = [[None] * H for _ in range(T)]
    for t in range(T):
        own = t // block_size
        for h in range(H):
            means = [k[b * block_size : (b + 1) * block_size, h].mean(0) for b in range(own)]
            blocks[t][h] = top_blocks([mean @ q[t, h] for mean in means] + [0.0], own, topk, {own})
    out = block_sparse(q, k, v, blocks, lambda *_: 0.0, block_size, q.shape[-1] ** -0.5)
    return out, active_tokens(T, H, lambda t, h, s: s // block_size in blocks[t][h])


def infllmv2(q, k, v, *, block_size, kernel_size, kernel_stride, topk, init_blocks, window_size):
    T, Hq, D = q.shape
    H = k.shape[1]
    group = Hq // H
    blocks = [[None] * H for _ in range(T)]
    for t in range(T):
        own = t // block_size
        js = visible(t, kernel_size, kernel_stride)
        for h in range(H):
            total = np.zeros(len(js))
            if js:
                ck = np.stack([k[kernel_stride * j : kernel_stride * j + kernel_size, h].mean(0) for j in js])
                total = sum(softmax(ck @ q[t, h * group + g] * D**-0.5) for g in range(group))
            scores = [
                max([total[j] for j in js if touching(j, b, kernel_size, kernel_stride, block_size)], default=0.0)
                for b in range(own + 1)
            ]
            forced = set(range(init_blocks)) | set(range(own - window_size // block_size, own + 1))
            blocks[t][h] = top_blocks(scores, own, topk, forced)
    out = block_sparse(q, k, v, blocks, lambda *_: 0.0, block_size, D**-0.5)
    return out, active_tokens(T, H, lambda t, h, s: s // block_size in blocks[t][h])


def nsa(q, k, v, ck, cv, gates, kw, vw, *, pooling, block_size, kernel_size, kernel_stride, topk, init_blocks,
        local_blocks, window_size):  # fmt: skip
    T, Hq, D = q.shape
    H = k.shape[1]
    group, scale = Hq // H, D**-0.5
    out = np.zeros((T, Hq, D))
    blocks = [[None] * H for _ in range(T)]
    for t in range(T):
        own = t // block_size
        js = visible(t, kernel_size, kernel_stride)
        for h in range(H):
            heads = range(h * group, (h + 1) * group)
            p = {head: softmax(ck[js, h] @ q[t, head] * scale) if js else np.zeros(0) for head in heads}
            total = sum(p.values())
            scores = np.zeros(own + 1)
            for b in range(own + 1):
                shared = [touching(j, b, kernel_size, kernel_stride, block_size) for j in js]
                if pooling == "weighted":
                    scores[b] = sum(total[j] * shared[j] / kernel_stride for j in js)
                else:
                    scores[b] = max([total[j] for j in js if shared[j]], default=0.0)
            forced = set(range(init_blocks)) | set(range(own - local_blocks + 1, own + 1))
            blocks[t][h] = top_blocks(scores, own, topk, forced)
            for head in heads:
                if js:
                    out[t, head] += gates[t, head, 0] * (p[head] @ cv[js, h])
                if window_size:
                    window = range(max(0, t - window_size + 1), t + 1)
                    out[t, head] += gates[t, head, 2] * attend(q[t, head], kw[window, h], vw[window, h], scale)
    out += gates[:, :, 1:2] * block_sparse(q, k, v, blocks, lambda *_: 0.0, block_size, scale)
    active = active_tokens(
        T, H, lambda t, h, s: s // block_size in blocks[t][h] or (window_size > 0 and s > t - window_size)
    )
    return out, active


def indexer(q, k, v, index_q, index_k, *, block_size, index_pooling, selector, topk, top_p, init_blocks, local_blocks,
            gradient, dense=False):  # fmt: skip
    """Output [T, Hq, D], active tokens [T, H], and KL of every token and KV head [T, H]."""
    T, Hq, D = q.shape
    H, size = k.shape[1], index_k.shape[1]
    group = Hq // H
    blocks, priors, kl = [[None] * H for _ in range(T)], [[None] * H for _ in range(T)], np.zeros((T, H))
    for t in range(T):
        own = t // block_size
        forced = {b for b in range(own + 1) if b < init_blocks or b >= own - local_blocks}
        candidates = [b for b in range(own + 1) if b not in forced]
        for h in range(H):
            scores = {}
            for b in candidates:
                keys = index_k[b * block_size : (b + 1) * block_size]
                keys = keys.mean(0)[None] if index_pooling == "mean" else keys
                scores[b] = max(index_q[t, h] @ key for key in keys) / math.sqrt(size)
            p = dict(zip(candidates, softmax(np.array(list(scores.values()))), strict=True)) if candidates else {}
            chosen = set()
            for b in sorted(candidates, key=lambda b: (-scores[b], b)):
                full = len(chosen | forced) >= topk if selector == "topk" else sum(p[c] for c in chosen) >= top_p
                if dense or not full:
                    chosen.add(b)
            blocks[t][h], priors[t][h] = chosen | forced, {b: math.log(p[b]) for b in chosen}
            mass = dict.fromkeys(range(own + 1), 0.0)
            keys = [s for s in range(t + 1) if s // block_size in blocks[t][h]]
            for head in range(h * group, (h + 1) * group):
                for s, weight in zip(keys, softmax(k[keys, h] @ q[t, head] * D**-0.5), strict=True):
                    mass[s // block_size] += weight
            total, learned = sum(mass[b] for b in chosen), sum(p[b] for b in chosen)
            for b in chosen:
                m = mass[b] / total
                kl[t, h] += m * math.log(m / (p[b] / learned))

    def bias(t, head, b):
        return priors[t][head // group].get(b, 0.0) if gradient == "prior" else 0.0

    out = block_sparse(q, k, v, blocks, bias, block_size, D**-0.5)
    return out, active_tokens(T, H, lambda t, h, s: s // block_size in blocks[t][h]), kl
