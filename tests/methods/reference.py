"""The papers' formulas once more, as slow numpy loops over single numbers.

One function per Form and per Start class, by class name. None of them shares a line with the
package; a Form or Start without an entry is covered by its golden record alone.
"""

import math

import numpy as np


def product(B, A):
    m, r, n = len(B), len(A), len(A[0])
    D = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            for k in range(r):
                D[i, j] += B[i][k] * A[k][j]
    return D


def lora(t, W, s):
    return s * product(t["B"], t["A"])


def full(t, W, s):
    return s * t["D"]


def dora(t, W, s):
    """Return the dW for which W + dW = m V / |V|, V = W + s B A, row by row."""
    V = W + s * product(t["B"], t["A"])
    out = np.zeros_like(W)
    for i in range(len(W)):
        norm = math.sqrt(sum(v * v for v in V[i]))
        out[i] = t["m"][i] * V[i] / norm - W[i]
    return out


def gralora(t, W, s):
    """Output part i reads input part j through B_ij [out/k, r/k] A_ij [r/k, in/k]."""
    k, n, g = t["A"].shape
    m, q = t["B"].shape[-1], g // k
    D = np.zeros((k * m, k * n))
    for i in range(k):
        for j in range(k):
            A_ij = t["A"][j][:, i * q : (i + 1) * q].T
            B_ij = t["B"][i][j * q : (j + 1) * q, :].T
            D[i * m : (i + 1) * m, j * n : (j + 1) * n] = product(B_ij, A_ij)
    if "A_hybrid" in t:
        D += product(t["B_hybrid"], t["A_hybrid"])
    return s * D


def loha(t, W, s):
    first, second = product(t["B1"], t["A1"]), product(t["B2"], t["A2"])
    D = np.zeros_like(first)
    for i in range(D.shape[0]):
        for j in range(D.shape[1]):
            D[i, j] = s * first[i, j] * second[i, j]
    return D


def vera(t, W, s):
    m, n = W.shape
    D = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            for k in range(len(t["d"])):
                D[i, j] += t["b"][i] * t["B"][i, k] * t["d"][k] * t["A"][k, j]
    return s * D


def randlora(t, W, s):
    """Sum the bases one by one; the diagonals act on the smaller side of W."""
    small, large = sorted(W.shape)
    n, r = t["Lambda"].shape
    D = np.zeros((large, small))
    for i in range(n):
        for k in range(r):
            for a in range(large):
                for b in range(small):
                    left = t["B"][a, i * r + k] * t["Lambda"][i, k]
                    D[a, b] += left * t["A"][k, b] * t["Gamma"][i, b]
    return 2 / math.sqrt(n) * s * (D if W.shape[0] >= W.shape[1] else D.T)


def adalora(t, W, s):
    return s * product(t["P"], [e * row for e, row in zip(t["Lambda"], t["Q"], strict=True)])


def hydralora(t, x, s):
    """Return the update of one token x [in], not a dW."""
    logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in t["W_g"]]
    e = [math.exp(z - max(logits)) for z in logits]
    y = np.zeros(t["B"].shape[1])
    for i, B in enumerate(t["B"]):
        y += s * e[i] / sum(e) * (B @ (t["A"] @ x))
    return y


FORMS = {
    "LoRA": lora,
    "Dense": full,
    "DoRA": dora,
    "GraLoRA": gralora,
    "LoHa": loha,
    "VeRA": vera,
    "RandLoRA": randlora,
    "AdaSVD": adalora,
}
BRANCHES = {"HydraLoRA": hydralora}


def svd_product(W, ranks):
    """Return the part of W made of the singular triplets with these indices."""
    U, S, Vt = np.linalg.svd(np.asarray(W, dtype=np.float64), full_matrices=False)
    return sum(S[i] * np.outer(U[:, i], Vt[i]) for i in ranks)


def pissa(W, r, s, gradient):
    """Return s B0 A0: the best rank-r part of W."""
    return svd_product(W, range(r))


def milora(W, r, s, gradient):
    k = min(W.shape)
    return svd_product(W, range(k - r, k))


def olora(W, r, s, gradient):
    """Return B0 A0 before s: the first r columns of Q times the first r rows of R."""
    Q, R = np.linalg.qr(np.asarray(W, dtype=np.float64))
    return s * Q[:, :r] @ R[:r]


STARTS = {"PiSSA": pissa, "MiLoRA": milora, "OLoRA": olora}


def adamw(p, g_list, lr, decay=0.0, b1=0.9, b2=0.999, eps=1e-8, ratio=1.0):
    """Return a tensor after AdamW steps, number by number (arXiv 1711.05101, algorithm 2)."""
    p = p.copy()
    for i in np.ndindex(p.shape):
        m = v = 0.0
        for step, g in enumerate(g_list, start=1):
            m = b1 * m + (1 - b1) * g[i]
            v = b2 * v + (1 - b2) * g[i] ** 2
            m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
            rate = lr * ratio
            p[i] -= rate * decay * p[i] + rate * m_hat / (math.sqrt(v_hat) + eps)
    return p


def ada_importance(history, beta1, beta2):
    """Return AdaLoRA's S per triplet from [(t, g), ...] of one site, number by number."""
    names = ("Lambda", "P", "Q")
    mean = {n: np.zeros_like(history[0][0][n]) for n in names}
    spread = {n: np.zeros_like(history[0][0][n]) for n in names}
    for t, g in history:
        for n in names:
            for i in np.ndindex(mean[n].shape):
                sensitivity = abs(t[n][i] * g[n][i])
                mean[n][i] = beta1 * mean[n][i] + (1 - beta1) * sensitivity
                gap = abs(sensitivity - mean[n][i])
                spread[n][i] = beta2 * spread[n][i] + (1 - beta2) * gap
    out = []
    for i in range(len(mean["Lambda"])):
        total = mean["Lambda"][i] * spread["Lambda"][i]
        total += np.mean([mean["P"][j, i] * spread["P"][j, i] for j in range(len(mean["P"]))])
        total += np.mean([a * b for a, b in zip(mean["Q"][i], spread["Q"][i], strict=True)])
        out.append(total)
    return np.array(out)


def ada_budget(t, n_steps, t_i, t_f, first, last):
    """Return b(t) for 1-based step t; t_i and t_f in steps."""
    if t <= t_i:
        return first
    if t > n_steps - t_f:
        return last
    return int(last + (first - last) * (1 - (t - t_i) / (n_steps - t_i - t_f)) ** 3)
