"""Prompts get the begin and end tokens that a GGUF file asks for."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import InputError
from betterhalf.models.description import describe_model
from betterhalf.models.gguf import read_once, tokenizer_flags
from betterhalf.models.loading import load_model
from betterhalf.tasks.prompting import encode, plain_draft, templated_draft

WriteGguf = Callable[..., Path]

FLAGS = [
    {},
    {"add_bos_token": False},
    {"add_bos_token": True},
    {"add_eos_token": True},
    {"add_bos_token": True, "add_eos_token": True},
]
IDS = {"llama": (1, 264, 2), "gpt2": (0, 97, 1)}
"""Ids of begin of sequence, of the token "ab", and of end of sequence."""


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(f"{k}={v}" for k, v in flags.items()) or "silent")
@pytest.mark.parametrize("tokenizer", ["llama", "gpt2"])
def test_prompts_hold_the_tokens_that_the_file_says_are_added(
    tokenizer: str, flags: dict[str, bool], tmp_path: Path, write_gguf: WriteGguf
) -> None:
    path = write_gguf(tmp_path / "model.gguf", tokenizer=tokenizer, flags=flags)
    assert tokenizer_flags(path) == ({"add_bos_token": True} if tokenizer == "llama" else {}) | flags
    model = describe_model(ModelConfig(name=str(path)))
    begin, word, end = IDS[tokenizer]
    before = (begin,) * flags.get("add_bos_token", tokenizer == "llama")
    behind = (end,) * flags.get("add_eos_token", False)
    assert encode(model.tokenizer, plain_draft("0", "ab", answer="")).token_ids == (*before, word, *behind)
    assert encode(model.tokenizer, templated_draft("0", "ab", answer="")).token_ids == (word,)


def test_the_byte_level_tokenizer_of_llama_3_begins_texts_unless_the_file_says_otherwise(
    tmp_path: Path, write_gguf: WriteGguf
) -> None:
    silent = write_gguf(tmp_path / "silent.gguf", tokenizer="gpt2", pre="llama-bpe")
    assert tokenizer_flags(silent) == {"add_bos_token": True}
    says = write_gguf(tmp_path / "says.gguf", tokenizer="gpt2", pre="llama-bpe", flags={"add_bos_token": False})
    assert tokenizer_flags(says) == {"add_bos_token": False}


@pytest.mark.parametrize("tokenizer", ["llama", "gpt2"])
def test_a_folder_made_of_the_file_gives_the_same_prompts(
    tokenizer: str, tmp_path: Path, write_gguf: WriteGguf
) -> None:
    path = write_gguf(tmp_path / "model.gguf", tokenizer=tokenizer, flags={"add_bos_token": True})
    model = load_model(ModelConfig(name=str(path)))
    model.module.save_pretrained(tmp_path / "folder")
    model.tokenizer.save_pretrained(tmp_path / "folder")
    folder = load_model(ModelConfig(name=str(tmp_path / "folder")))
    for text in ("ab", "a b", "b"):
        assert folder.tokenizer.encode(text) == model.tokenizer.encode(text)
        assert model.tokenizer.encode(text)[0] == IDS[tokenizer][0]


def test_a_file_is_parsed_once_for_configuration_tokenizer_and_weights(
    tmp_path: Path, write_gguf: WriteGguf, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip("gguf.gguf_reader").GGUFReader
    parsed: list[Path] = []
    real = reader.__init__
    monkeypatch.setattr(reader, "__init__", lambda self, path, *rest: (parsed.append(Path(path)), real(self, path))[1])
    path = write_gguf(tmp_path / "model.gguf", quantisation="Q4_0")
    model = load_model(ModelConfig(name=str(path)))
    assert parsed == [path]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert len(parsed) > 2, "transformers alone should parse it for each part"
    for (name, ours), (_, theirs) in zip(model.module.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_file_that_changed_is_parsed_again(tmp_path: Path, write_gguf: WriteGguf) -> None:
    gguf = pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "model.gguf", tokenizer="llama")
    with read_once():
        first = gguf.GGUFReader(path)
        assert gguf.GGUFReader(path) is first
        write_gguf(path, tokenizer="gpt2")
        again = gguf.GGUFReader(path)
    assert again.get_field("tokenizer.ggml.model").contents() == "gpt2"
    assert isinstance(gguf.GGUFReader, type), "the library's own class is back"


@pytest.mark.parametrize(
    "damaged",
    [
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 2**63),
        struct.pack("<QsIIQ", 1, b"a", 9, 12, 2**62),
        struct.pack("<QsIIQ", 1, b"a", 9, 0, 2**45),
        struct.pack("<QsIQ", 1, b"a", 8, 2**45),
        struct.pack("<QsI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 10**5,
    ],
    ids=[
        "name beyond memory",
        "name beyond any file",
        "array beyond any file",
        "array beyond this file",
        "string beyond this file",
        "arrays in arrays",
    ],
)
def test_damaged_metadata_is_refused(damaged: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + damaged)
    with pytest.raises(InputError, match="is not a complete GGUF file"):
        tokenizer_flags(path)
