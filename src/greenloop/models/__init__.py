"""Models: from a spec such as `smollm2-135m`, a hub id or a folder to weights and a tokenizer.

`resolve` finds out what a spec stands for, `pull` brings the packaged model; neither imports torch.
`greenloop.models.check.check` raises what can be known before weights are read, and
`greenloop.models.load.load_model` reads them. Nothing here reads the environment: the cache folder is an argument.
"""

from greenloop.models.pull import PACKAGED, pull
from greenloop.models.spec import Kind, ModelSource, resolve

__all__ = ["PACKAGED", "Kind", "ModelSource", "pull", "resolve"]
