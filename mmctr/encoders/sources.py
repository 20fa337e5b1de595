"""Where models and tokenizers come from: hub names, installed packages, and folders of strangers.

A shared run holds the configs of its encoder. These are data: code that they name is never executed, the hub is never
asked, and no file outside the folder is opened. Names that the user's own config gives may be names of a hub; code of
a hub is not executed either.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmctr.files import read_json

OPEN_CLIP_TOKENIZER_OPTIONS = {
    "clean": str,
    "strip_sep_token": bool,
    "language": str,
    "additional_special_tokens": list,
    "reduction_mask": str,
}
"""options of the tokenizers of open_clip that only change how a text is cut, with the type of the value"""
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""implementations of attention that transformers holds; any other name is downloaded from the hub and executed"""


def model_source(name: str) -> str:
    """The name or folder of a model as transformers and open_clip accept it.

    Args:
        name: a name of a hub, a folder, or `package:NAME/folder` for a folder inside an installed Python package.

    Raises:
        ValueError: the package is not installed, or has no such folder.
    """
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model {name!r}: the package {package!r} is not installed; pip install {package.replace('_', '-')}"
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise ValueError(f"model {name!r}: {path} is not a folder of that package")
    return str(path)


def config_of_folder(folder: Path) -> Any:
    """The transformers config in a folder, without code of the folder and without the hub.

    Raises:
        ValueError: `config.json` is missing or no config of transformers, or asks for code, pretrained weights of a
            hub, or a foreign implementation of attention.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    _check_transformers(read_json(path), path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: transformers cannot read it: {error}") from None


def check_tokenizer(folder: Path) -> None:
    """Check the configs of a transformers tokenizer in a folder before transformers reads them.

    Raises:
        ValueError: `tokenizer_config.json` is missing or damaged, asks for code, or names a file outside the folder.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    _check_transformers(config, path)
    for key, value in config.items():
        if not key.endswith("_file") or value is None:
            continue
        if not isinstance(value, str) or Path(value).name != value or not (folder / value).is_file():
            raise ValueError(f"{path}: {key} is {value!r}, but must be the name of a file in the same folder")
    if (folder / "config.json").is_file():
        _check_transformers(read_json(folder / "config.json"), folder / "config.json")


def tokenizer_of_folder(folder: Path) -> Any:
    """The transformers tokenizer in a folder, without code of the folder, files outside it, and the hub.

    Raises:
        ValueError: the tokenizer is damaged or needs code, or `tokenizer_config.json` names a file outside the folder.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise ValueError(f"{folder}: transformers cannot read the tokenizer: {error}") from None


def _check_transformers(config: Any, path: Path) -> None:
    """Raise ValueError where a config of transformers asks for more than reading files of a folder."""
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {type(config).__name__}, not an object of options")
    for key, value in config.items():
        if key in ("auto_map", "trust_remote_code", "custom_pipelines") and value:
            raise ValueError(f"{path}: {key} asks to execute code of others; this is never done: remove the key")
        if key in ("use_pretrained_backbone", "use_timm_backbone") and value:
            raise ValueError(f"{path}: {key} asks for weights of a hub; set it to false")
        if key.endswith("attn_implementation") and value is not None and value not in ATTENTION:
            raise ValueError(f"{path}: {key} is {value!r}, but must be one of {', '.join(ATTENTION)}")
        if isinstance(value, dict):
            _check_transformers(value, path)


def check_open_clip(model_config: Any, source: str, own: bool) -> None:
    """Check a model config of open_clip before open_clip reads it.

    Args:
        model_config: the config (embed_dim, vision_cfg, text_cfg).
        source: what holds the config, for messages.
        own: whether the user wrote or named the config, which may then name models of a hub.

    Raises:
        ValueError: a part is missing or of another type, the tokenizer has options that are not among
            `OPEN_CLIP_TOKENIZER_OPTIONS`, or the config is not the user's own and names models of a hub.
    """
    if not isinstance(model_config, dict):
        raise ValueError(f"{source}: the model config is {model_config!r}, not an object of options")
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(model_config)
    if missing:
        raise ValueError(f"{source}: {sorted(missing)[0]!r} is missing (open_clip's model config format)")
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        if not isinstance(model_config.get(part, {}), dict):
            raise ValueError(f"{source}: {part} is {model_config[part]!r}, not an object of options")
    options = model_config["text_cfg"].get("tokenizer_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(f"{source}: tokenizer_kwargs is {options!r}, not an object of options")
    for key, value in options.items():
        kind = OPEN_CLIP_TOKENIZER_OPTIONS.get(key)
        if kind is None:
            known = ", ".join(OPEN_CLIP_TOKENIZER_OPTIONS)
            raise ValueError(f"{source}: tokenizer_kwargs has {key!r}; options of a tokenizer are {known}")
        if not isinstance(value, kind):
            raise ValueError(f"{source}: tokenizer_kwargs: {key} is {value!r}, but must be of type {kind.__name__}")
    if not own:
        _check_names(model_config, source)


def check_preprocessing(values: Any, source: str) -> None:
    """Check mean, standard deviation and size of the pictures in a config of open_clip.

    Raises:
        ValueError: a value is of another type; the message names the source, the key and the value.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: preprocess_cfg is {values!r}, not an object of options")
    for key, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        is_number = all(isinstance(part, int | float) and not isinstance(part, bool) for part in numbers)
        wrong = key in ("mean", "std") and not (is_number and isinstance(value, list) and len(value) == 3)
        wrong = wrong or (key == "size" and not (is_number and len(numbers) in (1, 2) and min(numbers) > 0))
        if wrong or (key in ("mode", "interpolation", "resize_mode") and not isinstance(value, str)):
            raise ValueError(f"{source}: preprocess_cfg: {key} is {value!r}; it is no such value of pictures")


def _check_names(model_config: dict[str, Any], source: str) -> None:
    """Raise ValueError where a foreign config of open_clip names an image tower that timm itself does not hold."""
    name = model_config["vision_cfg"].get("timm_model_name")
    if name is not None:
        import timm

        if not isinstance(name, str) or not timm.is_model(name):
            raise ValueError(f"{source}: timm_model_name is {name!r}, which is no architecture that timm holds")
