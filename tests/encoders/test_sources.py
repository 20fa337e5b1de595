"""A stranger's encoder folder is read, never executed, and reaches neither the hub nor files outside it."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, PreTrainedTokenizerFast

from mmctr.encoders import EncoderConfig
from mmctr.encoders.base import EncoderBase
from tests.encoders.test_encoders import ENCODERS
from tests.helpers.tiny import ARCHITECTURE

_WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4, "shoe": 5, "blue": 6}
_CODE = "import pathlib\npathlib.Path({marker!r}).write_text('executed')\nclass Stranger: pass\n"


def tokenizer(folder: Path) -> str:
    """A transformers tokenizer of seven words, saved."""
    words = Tokenizer(WordLevel(_WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


def encoder(config: dict[str, Any], folder: Path | None = None) -> EncoderBase:
    torch.manual_seed(0)
    return TypeAdapter(EncoderConfig).validate_python(config).build(folder)


def with_tokenizer(name: str, folder: Path) -> dict[str, Any]:
    """The config of an encoder whose texts are cut by a transformers tokenizer."""
    source = tokenizer(folder)
    if name == "openclip":
        text = ARCHITECTURE["text_cfg"] | {"hf_tokenizer_name": source}
        return {"name": "openclip", "architecture": ARCHITECTURE | {"text_cfg": text}}
    if name == "hf":
        return ENCODERS["hf"] | {"tokenizer": source}
    return ENCODERS["towers"] | {"text": ENCODERS["towers"]["text"] | {"tokenizer": source}}


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Names of the hosts that were looked up; each lookup fails."""
    hosts: list[str] = []

    def lookup(host, *args, **kwargs):
        hosts.append(str(host))
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return hosts


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


@pytest.mark.lowest
@pytest.mark.parametrize("name", ["openclip", "hf", "towers"])
def test_a_saved_tokenizer_is_read_from_the_folder_alone(name, tmp_path, asked):
    config = with_tokenizer(name, tmp_path / "words")
    first = encoder(config)
    first.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "words")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = encoder(config, tmp_path / "moved")
    texts = ["red shoe", "blue"]
    assert torch.equal(first.tokenize(texts), again.tokenize(texts)) and again.tokenize(texts)[0, 0] == 4
    assert not asked


@pytest.mark.parametrize("name", ["openclip", "hf", "towers"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_in_a_folder_is_not_executed(name, file, tmp_path, asked):
    config = with_tokenizer(name, tmp_path / "words")
    encoder(config).save(tmp_path / "saved")
    marker = tmp_path / "executed"
    for folder in (tmp_path / "saved", tmp_path / "saved" / "text"):
        if not (folder / "tokenizer_config.json").is_file():
            continue
        (folder / "stranger.py").write_text(_CODE.format(marker=str(marker)))
        kinds = {"AutoTokenizer": ["stranger.Stranger", "stranger.Stranger"], "AutoConfig": "stranger.Stranger"}
        change(folder / file, auto_map=kinds, tokenizer_class="Stranger")
    with pytest.raises(ValueError, match=f"{file}.*auto_map asks to execute code"):
        encoder(config, tmp_path / "saved")
    assert not marker.exists() and not asked


def test_an_open_clip_config_may_not_ask_for_remote_code(tmp_path, asked):
    config = with_tokenizer("openclip", tmp_path / "words")
    encoder(config).save(tmp_path / "saved")
    path = tmp_path / "saved" / "open_clip_config.json"
    saved = json.loads(path.read_text())
    for options, message in (
        ({"trust_remote_code": True}, "tokenizer_kwargs has 'trust_remote_code'; options of a tokenizer are clean"),
        ({"bpe_path": "/etc/passwd"}, "tokenizer_kwargs has 'bpe_path'"),
        ({"clean": 3}, "clean is 3, but must be of type str"),
        ([1], "not an object"),
    ):
        text = saved["model_cfg"]["text_cfg"] | {"tokenizer_kwargs": options}
        path.write_text(json.dumps(saved | {"model_cfg": saved["model_cfg"] | {"text_cfg": text}}))
        with pytest.raises(ValueError, match=f"open_clip_config.json: .*{message}"):
            encoder(config, tmp_path / "saved")
        # the same from a config of the user: a model of a hub may hold the same keys
        with pytest.raises(ValueError, match=f"encoder.architecture: .*{message}"):
            encoder({"name": "openclip", "architecture": saved["model_cfg"] | {"text_cfg": text}})
    assert not asked


def test_an_open_clip_config_of_a_folder_names_no_models_of_a_hub(tmp_path, asked):
    encoder(ENCODERS["openclip"]).save(tmp_path)
    path = tmp_path / "open_clip_config.json"
    saved = json.loads(path.read_text())["model_cfg"]
    for part, values, message in (
        ("text_cfg", {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}, "tokenizer_config.json"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text/config.json: no such file"),
        ("vision_cfg", {"timm_model_name": "hf-hub:someone/model"}, "no architecture that timm holds"),
        ("vision_cfg", {"timm_model_name": 7}, "no architecture that timm holds"),
    ):
        path.write_text(json.dumps({"model_cfg": saved | {part: saved[part] | values}, "preprocess_cfg": {}}))
        with pytest.raises(ValueError, match=message):
            encoder(ENCODERS["openclip"], tmp_path)
    path.write_text(json.dumps([]))
    with pytest.raises(ValueError, match="the model config is None"):
        encoder(ENCODERS["openclip"], tmp_path)
    assert not asked


@pytest.mark.lowest
def test_a_text_tower_of_transformers_inside_open_clip_is_saved_whole(tmp_path, asked):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(vocab_size=len(_WORDS), **small).save_pretrained(tmp_path / "words")
    source = tokenizer(tmp_path / "words")
    text = {
        "hf_model_name": source,
        "hf_tokenizer_name": source,
        "hf_proj_type": "linear",
        "hf_pooler_type": "mean_pooler",
    }
    architecture = {name: part for name, part in ARCHITECTURE.items() if name != "text_cfg"} | {
        "text_cfg": text | {"context_length": 6}
    }
    config = {"name": "openclip", "architecture": architecture}
    first = encoder(config).eval()
    first.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "words")
    again = encoder(config, tmp_path / "saved").eval()
    again.load_state_dict(first.state_dict())
    tokens = again.tokenize(["red shoe"])
    assert torch.equal(first.encode_text(tokens), again.encode_text(tokens)) and not asked


@pytest.mark.parametrize("name", ["hf", "towers"])
def test_configs_of_transformers_in_a_folder_are_checked(name, tmp_path, asked):
    config = with_tokenizer(name, tmp_path / "words")
    encoder(config).save(tmp_path / "saved")
    part = tmp_path / "saved" if name == "hf" else tmp_path / "saved" / "text"
    (tmp_path / "outside.txt").write_text("secret")
    for file, values, message in (
        ("config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation is 'someone/kernel'"),
        ("config.json", {"use_pretrained_backbone": True}, "asks for weights of a hub"),
        ("config.json", {"model_type": "no such type"}, "config.json: transformers cannot read it"),
        ("tokenizer_config.json", {"vocab_file": str(tmp_path / "outside.txt")}, "must be the name of a file in the"),
        ("tokenizer_config.json", {"vocab_file": "../../outside.txt"}, "must be the name of a file in the same folder"),
        ("tokenizer.json", {"model": 3}, "transformers cannot read the tokenizer"),
    ):
        before = (part / file).read_text()
        change(part / file, **values)
        with pytest.raises(ValueError, match=message):
            encoder(config, tmp_path / "saved")
        (part / file).write_text(before)
    encoder(config, tmp_path / "saved")
    pixels = tmp_path / "saved" / ("pixels.json" if name == "hf" else "image/pixels.json")
    for values in ('{"mean": 3}', "[]", '{"mean": ["a", 1, 2], "std": [1, 1, 1]}'):
        pixels.write_text(values)
        with pytest.raises(ValueError, match="a number for each of the three colour channels"):
            encoder(config, tmp_path / "saved")
    assert not asked
