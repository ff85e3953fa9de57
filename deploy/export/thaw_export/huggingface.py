"""Source: a local Hugging Face folder (config.json, safetensors, and for text a tokenizer).

Classifiers are exported as they are and return logits. A base model returns one embedding per sample: for text pooled over
the attention mask (mean, unless the folder's 1_Pooling/config.json says cls), for images its pooled output.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.export import Dim

from thaw_export import weights
from thaw_export.errors import ExportError
from thaw_export.source import (
    IMAGE_INPUTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    TEXT_INPUTS,
    Source,
    image_source,
    main_output,
    with_forward,
)

TEXT_TASK = "ForSequenceClassification"
IMAGE_TASK = "ForImageClassification"


def huggingface_source(folder: Path, options) -> Source:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder} has no config.json; is it a Hugging Face model folder?")
    if not list(folder.glob("*.safetensors")):
        raise ExportError(f"{folder} has no .safetensors file (pickled weights are not read: they can run code)")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ExportError(f"{folder}/config.json: {first_line(error)}") from error

    is_image = takes_images(config)
    classifies = is_classifier(config, options.task)
    model = load_model(folder, config, is_image, classifies, options)
    if is_image:
        return image_model(folder, model, config, classifies, options)
    return text_model(folder, model, config, classifies)


def takes_images(config) -> bool:
    return hasattr(config, "image_size") and hasattr(config, "num_channels") and not hasattr(config, "vocab_size")


def is_classifier(config, task: str) -> bool:
    if task != "auto":
        return task == "classification"
    names = getattr(config, "architectures", None) or []
    return any(name.endswith((TEXT_TASK, IMAGE_TASK)) for name in names)


def load_model(folder: Path, config, is_image: bool, classifies: bool, options):
    import transformers

    if classifies:
        factory = transformers.AutoModelForImageClassification if is_image else transformers.AutoModelForSequenceClassification
    else:
        factory = transformers.AutoModel
    arguments = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    if options.num_classes:
        if not classifies:
            raise ExportError("--num-classes needs a model with a classifier; Thaw gives an embedding model its head by itself")
        config.num_labels = options.num_classes
        arguments["ignore_mismatched_sizes"] = True
    # The pooler of BERT-like models feeds nothing here: an unused parameter would only be carried along.
    pooler = {} if classifies or is_image else {"add_pooling_layer": False}
    try:
        try:
            model, info = factory.from_pretrained(folder, config=config, **arguments, **pooler)
        except TypeError:
            model, info = factory.from_pretrained(folder, config=config, **arguments)
    except Exception as error:  # The library raises a dozen kinds; each means the folder cannot be loaded.
        raise ExportError(f"loading {folder}: {first_line(error)}") from error
    config.use_cache = False
    missing = sorted(info["missing_keys"])
    if options.num_classes:
        missing = [name for name in missing if not is_head(name)]
    if missing:
        weights.refuse_mismatch(str(folder), missing, sorted(info["unexpected_keys"]))
    return model


def is_head(name: str) -> bool:
    return name.split(".")[0] in ("classifier", "score", "head", "pre_classifier", "classification_head")


def text_model(folder: Path, model, config, classifies: bool) -> Source:
    if classifies:
        forward = logits_of_text
    elif getattr(config, "is_encoder_decoder", False):
        raise ExportError(f"{folder} is an encoder-decoder model without a classifier; export its encoder by module:function")
    else:
        forward = {"mean": mean_embedding, "cls": first_embedding}[pooling_mode(folder)]
    length = longest_text(config)
    facts = {"max_length": length} if length else {}
    extra = {}
    tokenizer = tokenizer_json(folder)
    if tokenizer:
        extra["tokenizer.json"] = tokenizer
    ids = torch.randint(0, config.vocab_size, (2, 11))
    per_input = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return Source(
        module=with_forward(model, TEXT_INPUTS, forward),
        inputs=TEXT_INPUTS,
        example=(ids, torch.ones_like(ids)),
        dynamic_shapes=(per_input, dict(per_input)),
        kind="text",
        facts=facts,
        extra_files=extra,
    )


def logits_of_text(model, original, input_ids, attention_mask):
    return original(input_ids=input_ids, attention_mask=attention_mask).logits


def mean_embedding(model, original, input_ids, attention_mask):
    """Mean of the token states over the attention mask, [batch, hidden]."""
    states = original(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    kept = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1).clamp(min=1e-9)


def first_embedding(model, original, input_ids, attention_mask):
    return original(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]


def pooling_mode(folder: Path) -> str:
    """What sentence-transformers' pooling module says; mean where there is none."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    config = json.loads(path.read_text())
    if config.get("pooling_mode") in ("mean", "cls"):
        return config["pooling_mode"]
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in known:
        raise ExportError(f"{path}: pooling {', '.join(chosen) or 'of no kind'} is not supported; mean or cls is")
    return known[chosen[0]]


def longest_text(config) -> int | None:
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    # RoBERTa-like models count positions from after the padding id.
    if length and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text"):
        length -= config.pad_token_id + 1
    return length


def tokenizer_json(folder: Path) -> str | None:
    path = folder / "tokenizer.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        try:
            json.loads(text)
        except ValueError as error:
            raise ExportError(f"{path}: not valid JSON: {error}") from error
        return text
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str()
    except Exception:  # No tokenizer, or one without a fast form: the run spec can still name a file.
        return None


def image_model(folder: Path, model, config, classifies: bool, options) -> Source:
    def forward(self, original, pixel_values):
        output = original(pixel_values=pixel_values)
        if classifies:
            return main_output(output)
        pooled = getattr(output, "pooler_output", None)
        return pooled.flatten(1) if pooled is not None else output.last_hidden_state[:, 0]

    path = folder / "preprocessor_config.json"
    preparation = json.loads(path.read_text()) if path.is_file() else {}
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    return image_source(
        with_forward(model, IMAGE_INPUTS, forward),
        channels=config.num_channels,
        size=size,
        mean=options.mean or preparation.get("image_mean", IMAGENET_MEAN),
        std=options.std or preparation.get("image_std", IMAGENET_STD),
    )


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
