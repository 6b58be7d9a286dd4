"""Recurrent layers with PyTorch's parameters."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors
# ruff: noqa: B905

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.porting.functions.random import dropout


def _run_layers(
    cell, gates, x, states, params, num_layers, has_biases, bidirectional, batch_first, dropout_p, training
):
    """Runs layers over a sequence. `states` has one array [layers * directions, B, H] for each part of the state."""
    unbatched = x.ndim == 2
    if unbatched:
        x, states = x[:, None], [state[:, None] for state in states]
    elif batch_first:
        x = x.swapaxes(0, 1)
    directions = 2 if bidirectional else 1
    per = len(params) // (num_layers * directions)
    ends = [[] for _ in states]
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            w_ih, w_hh, *rest = params[index * per : (index + 1) * per]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            w_hr = rest[-1] if len(rest) % 2 else None  # the projection of an LSTM
            inputs = x @ w_ih.T if b_ih is None else x @ w_ih.T + b_ih
            state = tuple(part[index] for part in states)
            steps = range(x.shape[0]) if direction == 0 else range(x.shape[0] - 1, -1, -1)
            hidden = []
            for step in steps:
                state = cell(inputs[step], state, w_hh, b_hh)
                if w_hr is not None:
                    state = (state[0] @ w_hr.T, *state[1:])
                hidden.append(state[0])
            outputs.append(mx.stack(hidden if direction == 0 else hidden[::-1]))
            for kept, part in zip(ends, state):
                kept.append(part)
        x = outputs[0] if directions == 1 else mx.concatenate(outputs, axis=-1)
        if dropout_p and layer < num_layers - 1:
            x = dropout(x, dropout_p, training)
    finals = [mx.stack(kept) for kept in ends]
    if unbatched:
        return x[:, 0], *(final[:, 0] for final in finals)
    return x.swapaxes(0, 1) if batch_first else x, *finals


def _lstm_step(inputs, state, w_hh, b_hh):
    h, c = state
    gates = inputs + h @ w_hh.T if b_hh is None else inputs + (h @ w_hh.T + b_hh)
    i, f, g, o = mx.split(gates, 4, axis=-1)
    c = mx.sigmoid(f) * c + mx.sigmoid(i) * mx.tanh(g)
    return mx.sigmoid(o) * mx.tanh(c), c


def _gru_step(inputs, state, w_hh, b_hh):
    (h,) = state
    recurrent = h @ w_hh.T if b_hh is None else h @ w_hh.T + b_hh
    i_r, i_z, i_n = mx.split(inputs, 3, axis=-1)
    h_r, h_z, h_n = mx.split(recurrent, 3, axis=-1)
    r, z = mx.sigmoid(i_r + h_r), mx.sigmoid(i_z + h_z)
    n = mx.tanh(i_n + r * h_n)
    return (n + z * (h - n),)


def _tanh_step(inputs, state, w_hh, b_hh):
    recurrent = state[0] @ w_hh.T if b_hh is None else state[0] @ w_hh.T + b_hh
    return (mx.tanh(inputs + recurrent),)


def _relu_step(inputs, state, w_hh, b_hh):
    recurrent = state[0] @ w_hh.T if b_hh is None else state[0] @ w_hh.T + b_hh
    return (nn.relu(inputs + recurrent),)


def lstm(
    x,
    states,
    params,
    num_layers=1,
    has_biases=True,
    bidirectional=False,
    batch_first=False,
    dropout=0.0,
    training=False,
):
    """Returns the outputs of an LSTM, and the last h and c (Hochreiter and Schmidhuber, 1997)."""
    return _run_layers(
        _lstm_step, 4, x, states, params, num_layers, has_biases, bidirectional, batch_first, dropout, training
    )


def gru(
    x,
    state,
    params,
    num_layers=1,
    has_biases=True,
    bidirectional=False,
    batch_first=False,
    dropout=0.0,
    training=False,
):
    """Returns the outputs of a GRU and its last state (Cho et al., 2014)."""
    return _run_layers(
        _gru_step, 3, x, [state], params, num_layers, has_biases, bidirectional, batch_first, dropout, training
    )


def rnn_tanh(
    x,
    state,
    params,
    num_layers=1,
    has_biases=True,
    bidirectional=False,
    batch_first=False,
    dropout=0.0,
    training=False,
):
    """Returns the outputs of a simple recurrent network and its last state."""
    return _run_layers(
        _tanh_step, 1, x, [state], params, num_layers, has_biases, bidirectional, batch_first, dropout, training
    )


def rnn_relu(
    x,
    state,
    params,
    num_layers=1,
    has_biases=True,
    bidirectional=False,
    batch_first=False,
    dropout=0.0,
    training=False,
):
    """Returns the outputs of a simple recurrent network with ReLU and its last state."""
    return _run_layers(
        _relu_step, 1, x, [state], params, num_layers, has_biases, bidirectional, batch_first, dropout, training
    )


def _cell(step, x, state, w_ih, w_hh, b_ih, b_hh):
    return step(x @ w_ih.T if b_ih is None else x @ w_ih.T + b_ih, state, w_hh, b_hh)


def lstm_cell(x, state, w_ih, w_hh, b_ih=None, b_hh=None):
    """Returns h and c after one step of an LSTM."""
    return _cell(_lstm_step, x, state, w_ih, w_hh, b_ih, b_hh)


def gru_cell(x, state, w_ih, w_hh, b_ih=None, b_hh=None):
    """Returns the state after one step of a GRU."""
    return _cell(_gru_step, x, (state,), w_ih, w_hh, b_ih, b_hh)[0]


def rnn_tanh_cell(x, state, w_ih, w_hh, b_ih=None, b_hh=None):
    """Returns the state after one step of a simple recurrent network."""
    return _cell(_tanh_step, x, (state,), w_ih, w_hh, b_ih, b_hh)[0]


def rnn_relu_cell(x, state, w_ih, w_hh, b_ih=None, b_hh=None):
    """Returns the state after one step of a simple recurrent network with ReLU."""
    return _cell(_relu_step, x, (state,), w_ih, w_hh, b_ih, b_hh)[0]
