"""Tiny random models and a byte tokenizer: no downloads, float32, a second or less."""

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from greenloop.decoder import native
from greenloop.learn.policy import adapt
from greenloop.recipe import LoraSection

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "vocab_size": 304,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "bos_token_id": 256,
}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with MBPP and HumanEval; tests that need it are skipped where it is missing."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("GREENLOOP_DATA_DIR") or beside)
    if not (folder / "mbpp.jsonl").is_file():
        pytest.skip(f"MBPP is not in {folder}: set GREENLOOP_DATA_DIR to a folder that holds mbpp.jsonl")
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, `<|bos|>` 256, `<|end|>` 257, roles 258-260, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|bos|>", eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llama() -> LlamaForCausalLM:
    """Random float32 Llama with grouped KV heads; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


def tiny_qwen2() -> Qwen2ForCausalLM:
    """Random float32 Qwen2 (biases on q, k, v), untied head."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)).eval()
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                torch.nn.init.normal_(linear.bias, std=0.3)
        return model


def tiny_qwen3() -> Qwen3ForCausalLM:
    """Random float32 Qwen3: norms on queries and keys, a head width of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)).eval()
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
        return model


def tiny_mistral() -> MistralForCausalLM:
    """Random float32 Mistral with full attention."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=False)).eval()


@pytest.fixture(params=[tiny_llama, tiny_qwen2, tiny_qwen3, tiny_mistral], ids=["llama", "qwen2", "qwen3", "mistral"])
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A fresh tiny model of each family."""
    return request.param()


NO_NATIVE = "no Numba, or no OpenMP of PyTorch's that answers to GOMP_parallel"


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training through native code, and through PyTorch's operations."""
    if request.param:
        if not native.available():
            pytest.skip(NO_NATIVE)
        return
    train_through_torch(monkeypatch)


def train_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training use PyTorch's operations alone."""
    for name in ("attention.reads", "operations.reads", "logprob.lays_out"):
        monkeypatch.setattr(f"greenloop.learn.{name}", lambda *_: False)


def with_adapter(model: torch.nn.Module, *, rank: int = 4) -> PeftModel:
    """The model with a LoRA adapter on all linear layers whose B is not zero."""
    adapted = adapt(model, LoraSection(rank=rank, alpha=2 * rank), seed=0, base_name="tiny")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return adapted


class ByteText:
    """Decodes token ids as text; the little of a tokenizer that the engine asks for."""

    eos_token_id = 257

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        """Characters of the ids below 256; others are special and never shown."""
        return "".join(chr(token) for token in tokens if token < 256)
