"""The command from outside: tiny models in, an archive that Thaw's rules hold for out."""

import json
import zipfile

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models

from thaw_export import cli
from thaw_export.replay import set_training

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50, max_position_embeddings=40)


def export(*arguments) -> None:
    cli.main([str(argument) for argument in arguments])


def refusal(capsys, *arguments) -> str:
    """The one line that a refused export prints."""
    with pytest.raises(SystemExit) as stopped:
        export(*arguments)
    assert stopped.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1, errors
    return errors[0]


def described(path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(f"{path.stem}/extra/thaw.json"))


def ids(rows: int = 3, length: int = 9):
    values = torch.randint(0, 50, (rows, length))
    mask = torch.ones_like(values)
    mask[0, 5:] = 0
    return values, mask


def evaluating(path):
    module = torch.export.load(path).module()
    set_training(module, lambda node: False)
    return module


@pytest.fixture
def bert(tmp_path):
    """A Hugging Face folder of a base model with a tokenizer."""
    folder = tmp_path / "bert"
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**TINY)).save_pretrained(folder)
    Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return folder


def test_base_model_gives_the_mean_over_the_mask(bert, tmp_path):
    path = tmp_path / "out.pt2"
    export(bert, "-o", path)
    values, mask = ids()
    states = transformers.AutoModel.from_pretrained(bert).eval()(input_ids=values, attention_mask=mask).last_hidden_state
    expected = torch.stack([row[kept.bool()].mean(0) for row, kept in zip(states, mask)])
    torch.testing.assert_close(evaluating(path)(values, mask), expected)
    facts = described(path)
    assert (facts["format"], facts["kind"], facts["inputs"]) == (1, "text", ["input_ids", "attention_mask"])
    assert facts["max_length"] == 40
    with zipfile.ZipFile(path) as archive:
        assert archive.read("out/extra/tokenizer.json") == (bert / "tokenizer.json").read_bytes()


def test_parameter_names_are_those_on_disk(bert, tmp_path):
    path = tmp_path / "out.pt2"
    export(bert, "-o", path)
    names = {name for name in torch.export.load(path).state_dict}
    on_disk = set(safetensors.torch.load_file(bert / "model.safetensors"))
    # The pooler feeds nothing.
    assert {name for name in on_disk if not name.startswith("pooler.")} == {name for name in names if name in on_disk}
    assert not [name for name in names - on_disk if name.endswith("weight")]


def test_pooling_config_is_honoured(bert, tmp_path):
    (bert / "1_Pooling").mkdir()
    config = bert / "1_Pooling" / "config.json"
    config.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    path = tmp_path / "out.pt2"
    export(bert, "-o", path)
    values, mask = ids()
    states = transformers.AutoModel.from_pretrained(bert).eval()(input_ids=values, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(evaluating(path)(values, mask), states[:, 0])


def test_unsupported_pooling_is_refused(bert, tmp_path, capsys):
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    assert "pooling_mode_max_tokens" in refusal(capsys, bert, "-o", tmp_path / "out.pt2")
    assert not list(tmp_path.glob("*.pt2"))


def test_classifier_gives_logits_only(tmp_path):
    folder, path = tmp_path / "classifier", tmp_path / "out.pt2"
    config = transformers.BertConfig(**TINY, num_labels=4)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    export(folder, "-o", path)
    values, mask = ids()
    expected = model(input_ids=values, attention_mask=mask).logits
    torch.testing.assert_close(evaluating(path)(values, mask), expected)


def test_roberta_counts_positions_after_padding(tmp_path):
    folder, path = tmp_path / "roberta", tmp_path / "out.pt2"
    transformers.RobertaModel(transformers.RobertaConfig(**TINY)).save_pretrained(folder)
    export(folder, "-o", path)
    assert described(path)["max_length"] == 38


def test_tied_weights_stay_one(tmp_path):
    folder, path = tmp_path / "gpt2", tmp_path / "out.pt2"
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=40, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    export(folder, "-o", path)
    assert evaluating(path)(*ids()).shape == (3, 16)


def test_image_folder_model(tmp_path):
    folder, path = tmp_path / "vit", tmp_path / "out.pt2"
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16, num_labels=5
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}')
    export(folder, "-o", path)
    assert evaluating(path)(torch.randn(3, 3, 32, 32)).shape == (3, 5)
    assert described(path)["image"] == {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}


def test_torchvision_with_local_weights(tmp_path, capsys):
    import torchvision

    weights, path = tmp_path / "weights.safetensors", tmp_path / "out.pt2"
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    # Files from other frameworks lack the counters.
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state, weights)
    export("torchvision:resnet18", "--num-classes", 3, "--image-size", 32, "--weights", weights, "-o", path)
    loaded = torch.export.load(path).state_dict
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert evaluating(path)(torch.randn(1, 3, 32, 32)).shape == (1, 3)

    state["conv1.wieght"] = state.pop("conv1.weight")
    safetensors.torch.save_file(state, weights)
    error = refusal(capsys, "torchvision:resnet18", "--num-classes", 3, "--weights", weights, "-o", tmp_path / "bad.pt2")
    assert "conv1.weight (nearest: conv1.wieght)" in error
    assert not (tmp_path / "bad.pt2").exists()


def test_timm_model(tmp_path):
    path = tmp_path / "out.pt2"
    export("timm:vit_tiny_patch16_224", "--image-size", 32, "--num-classes", 2, "-o", path)
    assert evaluating(path)(torch.randn(3, 3, 32, 32)).shape == (3, 2)
    assert described(path)["image"]["size"] == 32


def test_function_source_and_reexport(tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text(
        "import torch\n"
        "def net():\n"
        "    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(144, 2)\n"
        "    return torch.nn.Sequential(*layers), (torch.randn(2, 1, 8, 8),)\n"
    )
    monkeypatch.chdir(tmp_path)
    export("mymodels:net", "--mean", 0.1, "--std", 0.2, "-o", "out.pt2")
    first = torch.export.load("out.pt2").state_dict
    # The seed of new weights is fixed, so exporting again gives the same model.
    export("mymodels:net", "--mean", 0.1, "--std", 0.2, "-o", "out.pt2")
    again = torch.export.load("out.pt2").state_dict
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not first["1.running_mean"].any(), "the check must not move the saved statistics"
    assert described(tmp_path / "out.pt2")["image"] == {"size": 8, "mean": [0.1], "std": [0.2]}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "no folder 'nowhere'"),
        (["torchvision:resnet19"], "nearest: resnet18"),
        (["timm:vit_tinny_patch16_224"], "vit_tiny_patch16_224"),
        (["nopackage:function"], "no Python module 'nopackage'"),
        (["json:nothing"], "no function 'nothing'"),
        (["torchvision:resnet18", "--weights", "absent.safetensors"], "no such file"),
        (["torchvision:resnet18", "--weights", __file__], "only .safetensors"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, capsys):
    assert words in refusal(capsys, *arguments, "-o", tmp_path / "out.pt2")
    assert not list(tmp_path.iterdir())


def test_pickled_weights_are_refused(bert, tmp_path, capsys):
    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(b"anything")
    assert "no .safetensors file" in refusal(capsys, bert, "-o", tmp_path / "out.pt2")


def test_truncated_weights_are_refused(bert, tmp_path, capsys):
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refusal(capsys, bert, "-o", tmp_path / "out.pt2")


def test_missing_weights_are_named(bert, tmp_path, capsys):
    weights = bert / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    del state["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(state, weights, metadata={"format": "pt"})
    assert "encoder.layer.1.output.dense.weight" in refusal(capsys, bert, "-o", tmp_path / "out.pt2")
