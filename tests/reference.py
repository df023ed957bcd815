"""The SA loss in the paper's symbols: image by image, step by step, one network call for each."""

import torch


def sa_terms(
    model, x0, n, noise, a, tau=None, relative=False, window="down", r=None, reduction="sum", **rows
):
    """(L_simple, L_sa) per image, each [B], where every row is differentiated.

    Args:
        model: (x [1, ...], s int64 [1], **rows) -> eps [1, ...].
        x0: images [B, ...].
        n: the steps t of L_simple, integers [B].
        noise: [K, B, ...] by position in the window; position 0 has the noise of step n.
        a: cum_alphas of the steps 0..N.
        tau: weights of the steps 0..N; by default 1.
        relative: whether tau is divided by its largest in each window.
        window: "down" (steps r, ..., r-K+1 in 1..N) or "paper" (steps r, ..., r+K-1 in 2..N).
        r: anchors [B]; by default n.
        reduction: "sum" or "mean" over an image.
        rows: further arguments of the network, tensors of length B.
    """
    K, N = len(noise), len(a) - 1
    low, sign = (2, 1) if window == "paper" else (1, -1)
    tau, r = [1.0] * (N + 1) if tau is None else tau, n if r is None else r

    def e(b, s, p):
        eps = noise[p, b]
        x_s = a[s] ** 0.5 * x0[b] + (1 - a[s]) ** 0.5 * eps
        own = {name: row[b][None] for name, row in rows.items()}
        return model(x_s[None], torch.tensor([s]), **own)[0] - eps

    def gap(b):
        steps = {p: int(r[b]) + sign * p for p in range(K)}
        steps = {p: s for p, s in steps.items() if low <= s <= N}
        largest = max((tau[s] for s in steps.values()), default=0) if relative else 1
        weights = {p: tau[s] / largest if largest else 0 for p, s in steps.items()}
        return sum((weights[p] * e(b, s, p) / K for p, s in steps.items()), torch.zeros_like(x0[b]))

    def norm2(e):
        return e.square().sum() if reduction == "sum" else e.square().mean()

    simple = [norm2(e(b, int(n[b]), 0)) for b in range(len(x0))]
    return torch.stack(simple), torch.stack([norm2(gap(b)) for b in range(len(x0))])
