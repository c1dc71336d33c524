"""What the model reads, and the program in what it answers.

In: a `Task` and a tokenizer; later the text of a completion. Out: a `Prompt`; later a program or None.
Executes nothing, loads no model, imports neither torch nor transformers.
"""

from greenloop.prompt.extract import extract_code, well_formed
from greenloop.prompt.protocols import PROTOCOLS, PromptProtocol, Tokenizer, get_protocol, render

__all__ = ["PROTOCOLS", "PromptProtocol", "Tokenizer", "extract_code", "get_protocol", "render", "well_formed"]
