"""Multi-scale causal attention as its definition reads: explicit masks, one softmax, float64, slow.

Written from docs/attention.md without looking at the fast path's blocks, windows or gate channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_attention(module, x_BTHWD: Tensor, t_BT: Tensor, frames_per_unit: int, constants, theta: float) -> Tensor:
    """What MultiScaleAttention must return for a whole video."""
    heads, width = module.heads, module.head_width
    lam_own = 2 * (torch.log1p(-t_BT) - torch.log(t_BT))
    qkv = (x_BTHWD @ module.qkv.weight.T).unflatten(-1, (3, heads, width))
    outs, at = [], 0
    for index, scale in enumerate(module.scales):
        mine = slice(at, at + scale.heads)
        delta = None if module.delta is None else module.delta[mine]
        outs.append(one_scale(module, qkv[..., mine, :], t_BT, frames_per_unit, scale, constants[index], delta, theta))
        at += scale.heads
    if module.gate == "mix":
        b_h = [c[0] for scale, c in zip(module.scales, constants, strict=True) for _ in range(scale.heads)]
        logs = [torch.nn.functional.logsigmoid(lam_own + b + d) for b, d in zip(b_h, module.delta, strict=True)]
        gates = torch.stack(logs, -1).exp()  # B T h
        weights = gates / gates.mean(-1, keepdim=True)
        outs = [torch.cat(outs, -2) * weights[:, :, None, None, :, None]]
    return torch.cat(outs, -2).flatten(-2) @ module.out.weight.T


def window_of(position: int, side: int, window: int | None, shifted: bool) -> int:
    if window is None or window >= side:
        return 0
    start = window // 2 if shifted else 0
    return -1 if position < start else (position - start) // window


def one_scale(module, qkv, t_BT, F, scale, constants, delta, theta):
    B, T, H, W, _, h, d = qkv.shape
    s, m = scale.space, scale.time
    U = T // F
    rows, columns = H // s, W // s
    pooled = torch.stack(
        [
            torch.stack([qkv[:, :, i * s : (i + 1) * s, j * s : (j + 1) * s].mean((2, 3)) for j in range(columns)], 2)
            for i in range(rows)
        ],
        2,
    )  # B T rows columns 3 h d
    where = [(i * s + (s - 1) / 2, j * s + (s - 1) / 2) for i in range(rows) for j in range(columns)]
    cell = [(i, j) for i in range(rows) for j in range(columns)]

    # keys: (kind, unit or group, position, cell, k, v, log gate)
    keys = []
    for frame in range(T):
        for n, (y, x) in enumerate(where):
            token = pooled[:, frame, cell[n][0], cell[n][1]]
            lam = 2 * (torch.log1p(-t_BT[:, frame]) - torch.log(t_BT[:, frame])) + constants[0]
            keys.append(("unit", frame // F, (frame, y, x), cell[n], token[:, 1], token[:, 2], lam, constants[2]))
    if m > 1:
        for group in range(U // m):
            for f in range(F):
                frames = [group * m * F + f * m + i for i in range(m)]
                for n, (y, x) in enumerate(where):
                    token = pooled[:, frames, cell[n][0], cell[n][1]].mean(1)
                    signal, noise = (1 - t_BT[:, frames]).mean(1) ** 2, (t_BT[:, frames] ** 2).mean(1) / m
                    lam = torch.log(signal) - torch.log(noise) + constants[1]
                    centre = sum(frames) / m
                    keys.append(("group", group, (centre, y, x), cell[n], token[:, 1], token[:, 2], lam, constants[3]))

    tail = 6 if module.gate == "pair" else 2  # channels that carry no position
    k = torch.stack([rotate(norm(key[4], module.k_gain), key[2], theta, tail) for key in keys], 1)  # B K h d
    v = torch.stack([key[5] for key in keys], 1)
    out = torch.zeros(B, T, rows, columns, h, d, dtype=qkv.dtype)
    for frame in range(T):
        for n, (y, x) in enumerate(where):
            q = rotate(norm(pooled[:, frame, cell[n][0], cell[n][1], 0], module.q_gain), (frame, y, x), theta, tail)
            seen, log_gates = [], []
            for i, (kind, number, _, key_cell, _, _, lam, rho) in enumerate(keys):
                if not same_window(cell[n], key_cell, rows, columns, scale, module.shifted):
                    continue
                if not visible(kind, number, frame // F, scale):
                    continue
                seen.append(i)
                own = kind == "unit" and number == frame // F
                gate = torch.zeros(B, h, dtype=qkv.dtype)
                if delta is not None and not own:
                    gate = torch.nn.functional.logsigmoid(lam[:, None] + delta)
                    if module.gate == "pair":
                        t_q = t_BT[:, frame]
                        gate = pair_gate(2 * torch.log((1 - t_q) / t_q) + constants[0], lam, rho, delta)
                log_gates.append(gate)
            kept = torch.ones(d, dtype=q.dtype)
            if module.gate in ("logits", "pair"):  # the gate takes these channels' place
                kept[d // 2 - tail // 2 : d // 2] = kept[d - tail // 2 :] = 0
            logits = torch.einsum("bhd,bkhd->bkh", q * kept, k[:, seen]) / math.sqrt(d)
            gates = torch.stack(log_gates, 1)
            values = v[:, seen]
            if module.gate in ("logits", "pair"):
                logits = logits + gates
            elif module.gate == "values":
                values = values * gates.exp()[..., None]
            out[:, frame, cell[n][0], cell[n][1]] = torch.einsum("bkh,bkhd->bhd", logits.softmax(1), values)
    return out.repeat_interleave(s, 2).repeat_interleave(s, 3)


def pair_gate(lam_q_B: Tensor, lam_k_B: Tensor, rho: float, delta_h: Tensor) -> Tensor:
    """log of SNR_eff / (1 + SNR_q + SNR_eff), linear in log(1 + SNR_q) between the nodes: `[B, h]`."""
    snr_k = lam_k_B.exp()
    snr_eff = (rho**2 * snr_k / (1 + (1 - rho**2) * snr_k))[:, None] * delta_h.exp()
    nodes = [0.0, 1.0, 2.0, 4.0, 7.0, 12.0]
    rows = []
    for a, eff in zip(torch.log1p(lam_q_B.exp()).tolist(), snr_eff, strict=True):
        a = min(a, nodes[-1])
        i = max(j for j in range(len(nodes) - 1) if nodes[j] <= a)
        share = (a - nodes[i]) / (nodes[i + 1] - nodes[i])
        low, high = (torch.log(eff / (math.exp(node) + eff)) for node in nodes[i : i + 2])
        rows.append((1 - share) * low + share * high)
    return torch.stack(rows)


def visible(kind: str, number: int, unit: int, scale) -> bool:
    m = scale.time
    complete = unit // m
    if kind == "unit" and number == unit:
        return True
    if m == 1:
        return kind == "unit" and number < unit and (scale.window is None or unit - number <= scale.window)
    if kind == "unit":
        return complete * m <= number < unit
    return number < complete and (scale.window is None or complete - number <= scale.window)


def same_window(a, b, rows, columns, scale, shifted) -> bool:
    return all(
        window_of(p, side, scale.patch_window, shifted) == window_of(q, side, scale.patch_window, shifted)
        for p, q, side in zip(a, b, (rows, columns), strict=True)
    )


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x: Tensor, position, theta: float, tail: int) -> Tensor:
    pairs = (x.shape[-1] - tail) // 2
    shares = [pairs // 3 + (axis < pairs % 3) for axis in range(3)]
    angles = [p * theta ** (-i / max(n, 1)) for p, n in zip(position, shares, strict=True) for i in range(n)]
    cos, sin = x.new_tensor([math.cos(a) for a in angles]), x.new_tensor([math.sin(a) for a in angles])
    half = x.shape[-1] // 2
    a, b = x[..., :pairs], x[..., half : half + pairs]
    rest_a, rest_b = x[..., pairs:half], x[..., half + pairs :]
    return torch.cat((a * cos - b * sin, rest_a, b * cos + a * sin, rest_b), -1)
