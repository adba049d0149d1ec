"""Multi-scale causal attention as its definition reads: explicit masks, one softmax, float64, slow.

Written from docs/attention.md without looking at the fast path's blocks, windows or gate channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_attention(module, x_BTHWD: Tensor, t_BT: Tensor) -> Tensor:
    """What MultiScaleAttention must return for a whole video."""
    qkv = (x_BTHWD @ module.qkv.weight.T).unflatten(-1, (3, module.config.heads, module.config.head_width))
    outs, at = [], 0
    for scale, constants in zip(module.config.scales, module.config.gate_constants, strict=True):
        own = slice(at, at + scale.heads)
        delta = None if module.delta is None else module.delta[own]
        outs.append(one_scale(module, qkv[..., own, :], t_BT, scale, constants, delta))
        at += scale.heads
    return torch.cat(outs, -2).flatten(-2) @ module.out.weight.T


def window_of(position: int, side: int, window: int | None, shifted: bool) -> int:
    if window is None or window >= side:
        return 0
    start = window // 2 if shifted else 0
    return -1 if position < start else (position - start) // window


def one_scale(module, qkv, t_BT, scale, constants, delta):
    B, T, H, W, _, h, d = qkv.shape
    F, theta = module.config.frames_per_unit, module.config.rope_theta
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
            keys.append(("unit", frame // F, (frame, y, x), cell[n], token[:, 1], token[:, 2], lam))
    if m > 1:
        for group in range(U // m):
            for f in range(F):
                frames = [group * m * F + f * m + i for i in range(m)]
                for n, (y, x) in enumerate(where):
                    token = pooled[:, frames, cell[n][0], cell[n][1]].mean(1)
                    signal, noise = (1 - t_BT[:, frames]).mean(1) ** 2, (t_BT[:, frames] ** 2).mean(1) / m
                    lam = torch.log(signal) - torch.log(noise) + constants[1]
                    centre = sum(frames) / m
                    keys.append(("group", group, (centre, y, x), cell[n], token[:, 1], token[:, 2], lam))

    if scale.top is not None:
        return (
            routed_scale(module, pooled, keys, where, cell, scale, F, delta)
            .repeat_interleave(s, 2)
            .repeat_interleave(s, 3)
        )

    k = torch.stack([rotate(norm(key[4], module.k_gain), key[2], theta) for key in keys], 1)  # B K h d
    v = torch.stack([key[5] for key in keys], 1)
    out = torch.zeros(B, T, rows, columns, h, d, dtype=qkv.dtype)
    for frame in range(T):
        for n, (y, x) in enumerate(where):
            q = rotate(norm(pooled[:, frame, cell[n][0], cell[n][1], 0], module.q_gain), (frame, y, x), theta)
            seen, log_gates = [], []
            for i, (kind, number, _, key_cell, _, _, lam) in enumerate(keys):
                if not same_window(cell[n], key_cell, rows, columns, scale, module.shifted):
                    continue
                if not visible(kind, number, frame // F, scale):
                    continue
                seen.append(i)
                own = kind == "unit" and number == frame // F
                gate = torch.zeros(B, h, dtype=qkv.dtype)
                if delta is not None and not own:
                    gate = torch.nn.functional.logsigmoid(lam[:, None] + delta)
                log_gates.append(gate)
            kept = torch.ones(d, dtype=q.dtype)
            if delta is not None:  # the gate takes the place of the channels that carry no position
                kept[d // 2 - 1] = kept[d - 1] = 0
            logits = torch.einsum("bhd,bkhd->bkh", q * kept, k[:, seen]) / math.sqrt(d)
            weights = (logits + torch.stack(log_gates, 1)).softmax(1)
            out[:, frame, cell[n][0], cell[n][1]] = torch.einsum("bkh,bkhd->bhd", weights, v[:, seen])
    return out.repeat_interleave(s, 2).repeat_interleave(s, 3)


def routed_scale(module, pooled, keys, where, cell, scale, F, delta):
    """Query blocks see their own place in their own and the previous unit, and the `top` earlier blocks by mean q·k."""
    theta = module.config.rope_theta
    B, T, rows, columns, _, h, d = pooled.shape
    size = [
        max(n for n in range(1, min(side, scale.patch_window or side) + 1) if side % n == 0) for side in (rows, columns)
    ]
    kept = torch.ones(d, dtype=pooled.dtype)
    if delta is not None:
        kept[d // 2 - 1] = kept[d - 1] = 0

    def block_of(unit, at):
        return unit, at[0] // size[0], at[1] // size[1]

    q, k, v, bias, of_key = [], [], [], [], []
    for _, unit, position, at, key, value, lam in keys:
        q.append(rotate(norm(pooled[:, position[0], at[0], at[1], 0], module.q_gain), position, theta) * kept)
        k.append(rotate(norm(key, module.k_gain), position, theta))
        v.append(value)
        gate = torch.zeros(B, h, dtype=pooled.dtype)
        bias.append(gate if delta is None else torch.nn.functional.logsigmoid(lam[:, None] + delta))
        of_key.append(block_of(unit, at))
    q, k, v, bias = (torch.stack(x, 1) for x in (q, k, v, bias))
    members = {block: [i for i, other in enumerate(of_key) if other == block] for block in of_key}

    out = torch.zeros(B, T, rows, columns, h, d, dtype=pooled.dtype)
    for block, own in members.items():
        unit = block[0]
        first = 0 if scale.window is None else unit - scale.window
        earlier = [other for other in members if first <= other[0] < unit - 1]
        near = [other for other in members if other[1:] == block[1:] and unit - 1 <= other[0] <= unit]
        for b in range(B):
            for head in range(h):
                fits = []
                for other in earlier:
                    score = q[b, own, head].mean(0) @ k[b, members[other], head].mean(0)
                    fits.append(float(score.detach() + d**0.5 * bias[b, members[other], head].mean()))
                best = sorted(range(len(earlier)), key=lambda i: -fits[i])[: scale.top]
                seen = [i for other in [*near, *(earlier[i] for i in best)] for i in members[other]]
                past = torch.tensor([of_key[i][0] < unit for i in seen])
                for i in own:
                    logits = k[b, seen, head] @ q[b, i, head] / math.sqrt(d) + bias[b, seen, head] * past
                    _, _, position, at, *_ = keys[i]
                    out[b, position[0], at[0], at[1], head] = logits.softmax(0) @ v[b, seen, head]
    return out


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


def rotate(x: Tensor, position, theta: float) -> Tensor:
    pairs = x.shape[-1] // 2 - 1  # the last does not rotate
    shares = [pairs // 3 + (axis < pairs % 3) for axis in range(3)]
    angles = [p * theta ** (-i / max(n, 1)) for p, n in zip(position, shares, strict=True) for i in range(n)]
    cos, sin = x.new_tensor([math.cos(a) for a in angles]), x.new_tensor([math.sin(a) for a in angles])
    half = x.shape[-1] // 2
    a, b = x[..., :pairs], x[..., half : half + pairs]
    rest_a, rest_b = x[..., pairs:half], x[..., half + pairs :]
    return torch.cat((a * cos - b * sin, rest_a, b * cos + a * sin, rest_b), -1)


def lay_end_to_end(model, groups):
    """Every group's parameters in one bf16 buffer, one behind the other, as DeepSpeed's ZeRO 1 and 2 lay them."""
    model.bfloat16()
    for group in groups:
        flat = torch.cat([p.detach().flatten() for p in group["params"]])
        for p, part in zip(group["params"], flat.split([p.numel() for p in group["params"]]), strict=True):
            p.data = part.view_as(p)
