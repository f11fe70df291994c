"""TCA in a CLIP tower written from the formulas alone, in float64 and plain loops, and streams of pictures for it."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from .decoder_by_hand import found_names, golden


class Loops:
    """TCA in a CLIP tower written from the formulas alone, in float64 and Python loops."""

    def __init__(self, w, heads, rate, size=3, scale=1.0, lambd=3.0, beta=5.0):
        self.w = {key: value.double().numpy() for key, value in w.items()}
        self.heads, self.rate, self.size, self.lambd, self.beta = heads, rate, size, lambd, beta
        self.depth = 1 + max(int(key.split(".")[2]) for key in w if key.startswith("transformer"))
        powers = np.exp(np.linspace(0, 1, self.depth) / scale)
        self.weights = powers / powers.sum()
        self.items = {}
        self.anchors = None

    def norm(self, x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def unit(self, x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def picture(self, image, patch, firsts):
        kernel = self.w["conv1.weight"]
        side = image.shape[1] // patch
        cells = [
            (image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] * kernel).sum((1, 2, 3))
            for i in range(side)
            for j in range(side)
        ]
        x = np.concatenate([self.w["class_embedding"][None], np.stack(cells)]) + self.w["positional_embedding"]
        x = self.norm(x, "ln_pre")
        noted = []
        for layer in range(self.depth):
            p = f"transformer.resblocks.{layer}"
            condensing = layer in (3, 6, 9)
            rows = x
            if condensing and self.anchors is not None:
                near = int(np.argmax([self.unit(a[layer - 1]) @ self.unit(x[0]) for a in self.anchors]))
                rows = np.concatenate([self.anchors[near][layer - 1][None], x])
            extra = len(rows) - len(x)
            qkv = self.norm(rows, f"{p}.ln_1") @ self.w[f"{p}.attn.in_proj_weight"].T + self.w[f"{p}.attn.in_proj_bias"]
            width = x.shape[1]
            d = width // self.heads
            out, cls = [], np.zeros(len(x) - 1)
            for h in range(self.heads):
                q, k, v = (qkv[:, t * width + h * d : t * width + (h + 1) * d] for t in range(3))
                e = np.exp(q @ k.T / d**0.5)
                e = e / e.sum(1, keepdims=True)
                out.append(e @ v)
                cls += e[extra, extra + 1 :] / self.heads
            out = np.concatenate(out, 1) @ self.w[f"{p}.attn.out_proj.weight"].T + self.w[f"{p}.attn.out_proj.bias"]
            x = x + out[extra:]
            if condensing:
                x = self.condense(x, cls, int(firsts[(3, 6, 9).index(layer)]))
            h = self.norm(x, f"{p}.ln_2") @ self.w[f"{p}.mlp.c_fc.weight"].T + self.w[f"{p}.mlp.c_fc.bias"]
            h = h / (1 + np.exp(-1.702 * h))
            x = x + h @ self.w[f"{p}.mlp.c_proj.weight"].T + self.w[f"{p}.mlp.c_proj.bias"]
            noted.append(x[0])
        feature = self.unit(self.norm(x[0], "ln_post") @ self.w["proj"])
        return feature, np.stack(noted)

    def condense(self, x, score, first):
        n = len(x)
        left = math.ceil((1 - self.rate) * (n - 1))
        m = n - left
        order = np.argsort(-score, kind="stable")
        kept, middle, low = order[: left - 2 * m], order[left - 2 * m : left], order[left:]
        tokens = x[1 + middle]
        centers = [first]
        while len(centers) < 4:
            gap = [min(np.linalg.norm(t - tokens[c]) for c in centers) for t in tokens]
            centers.append(int(np.argmax(gap)))
        sums, total = np.zeros((4, x.shape[1])), np.zeros(4)
        for t in tokens:
            gap = [np.linalg.norm(t - tokens[c]) for c in centers]
            j = int(np.argmin(gap))
            weight = 1.0 if gap[j] == 0 else 1.0 / gap[j]
            sums[j] += weight * t
            total[j] += weight
        fused = sum(score[j] * x[1 + j] for j in low)
        return np.concatenate([x[:1], x[1 + kept], sums / total[:, None], fused[None]])

    def step(self, image, text, patch, firsts):
        feature, tokens = self.picture(image, patch, firsts)
        logits = 100 * feature @ text
        p = np.exp(logits - logits.max())
        p = p / p.sum()
        entropy, label = -sum(v * math.log(v) for v in p if v > 0), int(np.argmax(logits))
        held = self.items.setdefault(label, [])
        held.append((entropy, tokens))
        if len(held) > self.size:
            means = [self.unit(v.mean(0)) for _, v in held]
            alike = [np.mean([a @ b for j, b in enumerate(means) if j != i]) for i, a in enumerate(means)]
            del held[int(np.argmax([h + a for (h, _), a in zip(held, alike)]))]
        held.sort(key=lambda item: item[0])
        final = logits.copy()
        for c, items in self.items.items():
            for _, v in items:
                a = sum(w * (self.unit(s) @ self.unit(o)) for w, s, o in zip(self.weights, tokens, v))
                final[c] += self.lambd * math.exp(-self.beta * (1 - a))
        if len(self.items) == text.shape[1] and all(len(items) >= 2 for items in self.items.values()):
            self.anchors = [np.mean([v for _, v in self.items[c]], 0) for c in sorted(self.items)]
        return logits, final, tokens


def small_tower(seed=0, width=16, depth=12, images=14):
    """Random weights and pictures in the form of the reference files."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, gain=0.25):
        return gain * torch.randn(*shape, generator=g)

    w = {
        "class_embedding": rand(width),
        "positional_embedding": rand(37, width),
        "proj": rand(width, 8, gain=0.5),
        "conv1.weight": rand(width, 3, 4, 4),
    }
    norms = ["ln_pre", "ln_post"]
    for i in range(depth):
        p = f"transformer.resblocks.{i}"
        for name, shape in (
            ("attn.in_proj", (3 * width, width)), ("attn.out_proj", (width, width)),
            ("mlp.c_fc", (4 * width, width)), ("mlp.c_proj", (width, 4 * width)),
        ):  # fmt: skip
            mark = "_" if name == "attn.in_proj" else "."
            w[f"{p}.{name}{mark}weight"] = rand(*shape)
            w[f"{p}.{name}{mark}bias"] = rand(shape[0], gain=0.02)
        norms += [f"{p}.ln_1", f"{p}.ln_2"]
    for name in norms:
        w[f"{name}.weight"], w[f"{name}.bias"] = 1 + rand(width, gain=0.1), rand(width, gain=0.1)
    text = F.normalize(rand(8, 2), dim=0)
    pictures = rand(images, 3, 24, 24, gain=1.0)
    firsts = torch.randint(0, 6, (images, 3), generator=g)
    return w, pictures, text, firsts


def expected_of_loops():
    """A random tower and stream, with what the plain loops make of it."""
    w, pictures, text, firsts = small_tower()
    loops, found = Loops(w, 2, 0.07), []
    for picture, first in zip(pictures, firsts):
        logits, final, cls = loops.step(picture.double().numpy(), text.double().numpy(), 4, first)
        found.append((logits, final, cls, 0 if loops.anchors is None else 2))
    logits, final, cls, anchors = (torch.tensor(np.array(column)) for column in zip(*found))
    data = {f"sd.{name}": value for name, value in w.items()}
    data |= {"images": pictures, "text_weights": text, "first": firsts, "heads": 2, "patch": 4, "drop_rate": 0.07}
    return data | {"clip_logits": logits, "final": final, "cls": cls, "nanch": anchors}


STREAMS = ("plain loops", *found_names("tca_e2e_*.npz"))


def stream(name):
    """Weights, pictures, and what becomes of them: of a reference file, or of the loops."""
    return expected_of_loops() if name == "plain loops" else golden(name)
