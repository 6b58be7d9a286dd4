"""Pairs of models of text as users write them, and faults that can be planted in each (`pair_faults`)."""

from __future__ import annotations

import math
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import tokens, with_equal_weights

# ---- Llama --------------------------------------------------------------------------------------------------


class RMSNorm(M.Module):
    def __init__(self, dim: int, eps: float = 1e-6, casts: bool = True) -> None:
        super().__init__()
        self.weight = mx.ones((dim,))
        self.eps, self.casts = eps, casts

    def __call__(self, x: mx.array) -> mx.array:
        y = x.astype(mx.float32) if self.casts else x
        y = y * mx.rsqrt(mx.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return self.weight * y.astype(x.dtype)


class Attention(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = 4, 2, 8
        self.q_proj, self.o_proj = M.Linear(32, 32, bias=False), M.Linear(32, 32, bias=False)
        self.k_proj, self.v_proj = M.Linear(32, 16, bias=False), M.Linear(32, 16, bias=False)
        self.fault = fault

    def rotated(self, x: mx.array) -> mx.array:
        theta = 500000.0 if self.fault == "theta" else 10000.0
        frequencies = 1.0 / theta ** (mx.arange(0, self.size, 2).astype(mx.float32) / self.size)
        angles = mx.arange(x.shape[2]).astype(mx.float32)[:, None] * frequencies[None]
        cos, sin = mx.cos(angles), mx.sin(angles)
        if self.fault == "pairs":
            a, b = x[..., ::2], x[..., 1::2]
            return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
        a, b = x[..., : self.size // 2], x[..., self.size // 2 :]
        if self.fault == "sign":
            return mx.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
        return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def __call__(self, x: mx.array) -> mx.array:
        b, n, _ = x.shape
        q = self.q_proj(x).reshape(b, n, self.heads, self.size).transpose(0, 2, 1, 3)
        k = self.k_proj(x).reshape(b, n, self.kv_heads, self.size).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(b, n, self.kv_heads, self.size).transpose(0, 2, 1, 3)
        q, k = self.rotated(q), self.rotated(k)
        if self.fault == "tile":
            k, v = mx.tile(k, (1, 2, 1, 1)), mx.tile(v, (1, 2, 1, 1))
        else:
            k, v = mx.repeat(k, 2, axis=1), mx.repeat(v, 2, axis=1)
        scale = 1 / self.size if self.fault == "scale" else self.size**-0.5
        scores = (q @ k.transpose(0, 1, 3, 2)) * scale
        offset = 0 if self.fault == "mask" else 1
        mask = mx.triu(mx.full((n, n), -1e9), k=offset)
        if self.fault == "mask":  # the first row would have no key
            mask = mask * (mx.arange(n)[:, None] > 0)
        if self.fault != "causal":
            scores = scores + mask.astype(scores.dtype)
        weights = mx.softmax(scores, axis=-2 if self.fault == "softmax" else -1, precise=True)
        y = weights @ v
        if self.fault != "heads":
            y = y.transpose(0, 2, 1, 3)
        return self.o_proj(y.reshape(b, n, -1))


class SwiGLU(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.gate_proj, self.up_proj = M.Linear(32, 64, bias=False), M.Linear(32, 64, bias=False)
        self.down_proj = M.Linear(64, 32, bias=False)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        if self.fault == "gate":
            return self.down_proj(self.gate_proj(x) * M.silu(self.up_proj(x)))
        act = M.gelu if self.fault == "geglu" else M.silu
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(32, 1e-5 if fault == "eps" else 1e-6, fault != "cast")
        self.self_attn = Attention(fault)
        self.post_attention_layernorm = RMSNorm(32)
        self.mlp = SwiGLU(fault)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x))
        if self.fault == "branch":
            return x + self.mlp(self.post_attention_layernorm(h))
        return h + self.mlp(self.post_attention_layernorm(h))


class Llama(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.embed_tokens = M.Embedding(50, 32)
        self.layers = [LlamaBlock(), LlamaBlock(fault)]
        self.norm = RMSNorm(32)
        self.lm_head = M.Linear(32, 50, bias=False)
        self.fault = fault

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embed_tokens(ids)
        if self.fault == "embedding":
            x = x * math.sqrt(32)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class TorchRMSNorm(T.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = T.Parameter(torch.ones(dim))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class TorchAttention(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = 4, 2, 8
        self.rope_theta = 10000.0
        self.q_proj, self.o_proj = T.Linear(32, 32, bias=False), T.Linear(32, 32, bias=False)
        self.k_proj, self.v_proj = T.Linear(32, 16, bias=False), T.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        frequencies = 1.0 / self.rope_theta ** (torch.arange(0, self.size, 2).float() / self.size)
        angles = torch.outer(torch.arange(n).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, -1))


class TorchSwiGLU(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = T.Linear(32, 64, bias=False), T.Linear(32, 64, bias=False)
        self.down_proj = T.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TorchLlamaBlock(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = TorchRMSNorm(32)
        self.self_attn = TorchAttention()
        self.post_attention_layernorm = TorchRMSNorm(32)
        self.mlp = TorchSwiGLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TorchLlama(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = T.Embedding(50, 32)
        self.layers = T.ModuleList([TorchLlamaBlock(), TorchLlamaBlock()])
        self.norm = TorchRMSNorm(32)
        self.lm_head = T.Linear(32, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def llama(fault: str) -> tuple[Any, Any, Any]:
    return *with_equal_weights(Llama(fault), TorchLlama()), tokens(2, 9, below=50)


# ---- bidirectional LSTM tagger ------------------------------------------------------------------------------


class Tagger(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.embedding = M.Embedding(20, 12)
        self.forward_lstm, self.backward_lstm = M.LSTM(12, 10), M.LSTM(12, 10)
        self.norm = M.LayerNorm(20)
        self.dropout = M.Dropout(0.3 if fault == "rate" else 0.2)
        self.classifier = M.Linear(20, 6)
        self.fault = fault

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embedding(ids)
        ahead, _ = self.forward_lstm(x)
        back, _ = self.backward_lstm(x if self.fault == "direction" else x[:, ::-1])
        if self.fault != "reversed":
            back = back[:, ::-1]
        if self.fault == "direction":
            back = back[:, ::-1]
        h = mx.concatenate([back, ahead] if self.fault == "order" else [ahead, back], axis=-1)
        h = self.norm(h)
        if self.fault == "tanh":
            h = mx.tanh(h)
        return self.classifier(self.dropout(h))


class TorchTagger(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = T.Embedding(20, 12)
        self.forward_lstm = T.LSTM(12, 10, batch_first=True)
        self.backward_lstm = T.LSTM(12, 10, batch_first=True)
        self.norm = T.LayerNorm(20)
        self.dropout = T.Dropout(0.2)
        self.classifier = T.Linear(20, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        ahead, _ = self.forward_lstm(x)
        back, _ = self.backward_lstm(x.flip(1))
        return self.classifier(self.dropout(self.norm(torch.cat([ahead, back.flip(1)], dim=-1))))


def tagger(fault: str) -> tuple[Any, Any, Any]:
    ours, theirs = with_equal_weights(Tagger(fault), TorchTagger())
    for name in ("forward_lstm", "backward_lstm"):
        layer, other = getattr(ours, name), getattr(theirs, name)
        weights = [p.detach().numpy() for p in (other.weight_ih_l0, other.weight_hh_l0)]
        bias = (other.bias_ih_l0 + other.bias_hh_l0).detach().numpy()
        order = [0, 1, 3, 2] if fault == "gates" and name == "backward_lstm" else [0, 1, 2, 3]  # i f o g
        parts = [np.concatenate([np.split(w, 4)[index] for index in order]) for w in (*weights, bias)]
        layer.Wx, layer.Wh, layer.bias = map(mx.array, parts)
    return ours, theirs, tokens(3, 7, below=20)
