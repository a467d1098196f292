"""The decoder in float64 numpy, written from its papers and from nothing in the package: an oracle for tests."""

import numpy as np

from grpo_jax.models.architecture import Architecture


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rope(x, positions, theta):
    """Pairs (i, i + E/2) as complex numbers, turned by position * theta^(-2i/E)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * positions[:, None, None] * theta ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], -1)


def attention(q, k, v, positions, segments, window):
    """One row, query by query and head by head."""
    out = np.zeros_like(q)
    per_key_head = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        seen = [
            j
            for j in range(len(q))
            if segments[j] == segments[i] != 0
            and positions[j] <= positions[i]
            and (window == 0 or positions[i] - positions[j] < window)
        ]
        for h in range(q.shape[1] if seen else 0):
            scores = k[seen, h // per_key_head] @ q[i, h] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[i, h] = weights @ v[seen, h // per_key_head] / weights.sum()
    return out


def dense(x, layer, leaf, adapters):
    y = x @ leaf["kernel"][layer]
    return y if adapters is None else y + x @ adapters["a"][layer] @ adapters["b"][layer]


def forward(params, a: Architecture, tokens, positions, segments, adapters=None):
    """Logits [S, V] of one row."""
    params = _float64(params)
    x = params["embed"]["embedding"][tokens]
    for i, stack in enumerate(a.stacks):
        tree, added = params[f"stack_{i}"], None if adapters is None else _float64(adapters[f"stack_{i}"])
        for layer, window in enumerate(stack.windows):

            def project(x, block, name, tree=tree, added=added, layer=layer):
                return dense(x, layer, tree[block][name], None if added is None else added[block][name])

            y = rms_norm(x, tree["attention_norm"]["scale"][layer], a.norm_eps)
            q, k, v = (
                project(y, "attention", name).reshape(len(x), -1, a.head_size) for name in ("query", "key", "value")
            )
            q, k = rope(q, positions, a.rope_theta), rope(k, positions, a.rope_theta)
            y = attention(q, k, v, positions, segments, window).reshape(len(x), -1)
            x = x + project(y, "attention", "out")
            y = rms_norm(x, tree["mlp_norm"]["scale"][layer], a.norm_eps)
            gate = project(y, "mlp", "gate")
            x = x + project(gate / (1 + np.exp(-gate)) * project(y, "mlp", "up"), "mlp", "down")
    x = rms_norm(x, params["final_norm"]["scale"], a.norm_eps)
    return x @ (params["embed"]["embedding"].T if a.tied else params["head"]["kernel"])


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def completion_logps(params, a: Architecture, prompt, completion, temperature=1.0, adapters=None):
    """Log-probability of each completion token after its prompt, both without padding."""
    tokens = np.concatenate([prompt, completion])
    place = np.arange(len(tokens))
    logits = forward(params, a, tokens, place, np.ones_like(place), adapters)[len(prompt) - 1 : -1]
    return log_softmax(logits / temperature)[np.arange(len(completion)), completion]


def _float64(tree):
    return {k: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}
