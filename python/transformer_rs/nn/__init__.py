"""Layers with weights by name, in f32.

A layer is called with vectors of a batch: a padded array (B, T, D) with ``lengths=``, or a list of arrays (T_i, D), which
has its own lengths. The result has the form of the input: a list, or a padded array with zeros at padding. Padding is
never computed. Layers that look at each row alone take arrays of any leading shape as well.

A plain call is evaluation. ``training=True`` turns dropout and batch statistics on, ``seed=`` says which dropout. Through
``tr.vjp(layer, x, training=True)`` a call gives its pullback, and that the gradients of the weights by name. One layer may
be called by many threads at once.
"""

from ._blocks import Decoder, DecoderLayer, Encoder, EncoderLayer
from ._layer import Layer
from ._multi_head_attention import MultiHeadAttention
from ._rowwise import BatchNorm, Embedding, FeedForward, LayerNorm, Linear, RMSNorm

__all__ = [
    "BatchNorm",
    "Decoder",
    "DecoderLayer",
    "Embedding",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "Layer",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "RMSNorm",
]
