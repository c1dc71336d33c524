"""A Llama or Qwen decoder over fused weights: the one forward that rollouts and training share."""

from greenloop.decoder.linear import FusedLinear
from greenloop.decoder.stack import SUPPORTED, Attend, Decoder, DecoderLayer, Norm, gated, rotate, supported, unwrapped

__all__ = [
    "SUPPORTED",
    "Attend",
    "Decoder",
    "DecoderLayer",
    "FusedLinear",
    "Norm",
    "gated",
    "rotate",
    "supported",
    "unwrapped",
]
