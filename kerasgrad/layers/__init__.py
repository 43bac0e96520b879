"""Recurrent layers whose back-propagation through time is written out, and can be watched."""

from kerasgrad.layers.omega import OmegaSimpleRNN
from kerasgrad.layers.simple_rnn import IRNN, ScaledIdentity, SimpleRNN, SimpleRNNCell
from kerasgrad.layers.simplified_lstm import SimplifiedLSTM, SimplifiedLSTMCell

__all__ = [
    "IRNN",
    "OmegaSimpleRNN",
    "ScaledIdentity",
    "SimpleRNN",
    "SimpleRNNCell",
    "SimplifiedLSTM",
    "SimplifiedLSTMCell",
]
