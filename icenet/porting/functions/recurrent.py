"""Recurrent layers with PyTorch's parameters."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.porting.functions.random import dropout


def lstm(x, h, c, w_ih, w_hh, b_ih=None, b_hh=None, w_hr=None):
    """Runs an LSTM over x [T, B, C] (Hochreiter and Schmidhuber, 1997). Returns all h, and the last h and c."""
    x = x @ w_ih.T if b_ih is None else mx.addmm(b_ih + b_hh, x, w_ih.T)
    hidden = []
    for inputs in x:
        i, f, g, o = mx.split(mx.addmm(inputs, h, w_hh.T), 4, axis=-1)
        c = mx.sigmoid(f) * c + mx.sigmoid(i) * mx.tanh(g)
        h = mx.sigmoid(o) * mx.tanh(c)
        if w_hr is not None:
            h = h @ w_hr.T
        hidden.append(h)
    return mx.stack(hidden), h, c


def gru(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
    """Runs a GRU over x [T, B, C] (Cho et al., 2014). Returns all h, and the last one."""
    x = x @ w_ih.T if b_ih is None else mx.addmm(b_ih, x, w_ih.T)
    hidden = []
    for inputs in x:
        r, z, n = mx.split(inputs, 3, axis=-1)
        h_r, h_z, h_n = mx.split(h @ w_hh.T if b_hh is None else mx.addmm(b_hh, h, w_hh.T), 3, axis=-1)
        r, z = mx.sigmoid(r + h_r), mx.sigmoid(z + h_z)
        n = mx.tanh(n + r * h_n)
        h = n + z * (h - n)
        hidden.append(h)
    return mx.stack(hidden), h


def rnn(x, h, w_ih, w_hh, b_ih=None, b_hh=None, activation=mx.tanh):
    """Runs a recurrent layer over x [T, B, C] (Elman, 1990). Returns all h, and the last one."""
    x = x @ w_ih.T if b_ih is None else mx.addmm(b_ih + b_hh, x, w_ih.T)
    hidden = []
    for inputs in x:
        h = activation(mx.addmm(inputs, h, w_hh.T))
        hidden.append(h)
    return mx.stack(hidden), h


def rnn_relu(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
    """Runs a recurrent layer with ReLU. Returns all h, and the last one."""
    return rnn(x, h, w_ih, w_hh, b_ih, b_hh, nn.relu)


def recurrent(
    layer,
    x,
    states,
    params,
    num_layers=1,
    has_biases=True,
    bidirectional=False,
    batch_first=False,
    p=0.0,
    training=False,
):
    """Runs recurrent layers. `states` has one array [layers * directions, B, H] for each part of the state."""
    unbatched = x.ndim == 2
    if unbatched:
        x, states = x[:, None], [state[:, None] for state in states]
    elif batch_first:
        x = x.swapaxes(0, 1)
    directions = 2 if bidirectional else 1
    per = len(params) // (num_layers * directions)
    ends = []
    for index in range(num_layers):
        outputs = []
        for place in range(index * directions, (index + 1) * directions):
            weights = params[place * per : (place + 1) * per]
            if not has_biases:
                weights = [*weights[:2], None, None, *weights[2:]]
            is_reverse = place % directions == 1
            y, *end = layer(x[::-1] if is_reverse else x, *(state[place] for state in states), *weights)
            outputs.append(y[::-1] if is_reverse else y)
            ends.append(end)
        x = outputs[0] if directions == 1 else mx.concatenate(outputs, axis=-1)
        if p and index < num_layers - 1:
            x = dropout(x, p, training)
    finals = [mx.stack([end[part] for end in ends]) for part in range(len(states))]
    if unbatched:
        return x[:, 0], *(final[:, 0] for final in finals)
    return x.swapaxes(0, 1) if batch_first else x, *finals


def lstm_cell(x, state, w_ih, w_hh, b_ih=None, b_hh=None):
    """Returns h and c after one step of an LSTM."""
    return lstm(x[None], *state, w_ih, w_hh, b_ih, b_hh)[1:]


def gru_cell(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
    """Returns the state after one step of a GRU."""
    return gru(x[None], h, w_ih, w_hh, b_ih, b_hh)[1]


def rnn_tanh_cell(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
    """Returns the state after one step of a recurrent layer."""
    return rnn(x[None], h, w_ih, w_hh, b_ih, b_hh)[1]


def rnn_relu_cell(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
    """Returns the state after one step of a recurrent layer with ReLU."""
    return rnn_relu(x[None], h, w_ih, w_hh, b_ih, b_hh)[1]
