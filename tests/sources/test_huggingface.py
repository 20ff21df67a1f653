"""Folders of Hugging Face: networks that the library builds, and what is refused without it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tersor
from tersor.core.errors import ModelError
from tersor.sources.huggingface import load

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


@pytest.fixture
def library():
    """Return the transformers library; what needs it is skipped where it is absent."""
    return pytest.importorskip("transformers", reason="needs tersor[huggingface]")


@pytest.fixture
def save(library, tmp_path):
    """Save a network of the library, and return its folder and itself."""

    def make(name, shard="1GB", **changes):
        net = getattr(library, name)(getattr(library, name).config_class(**{**SMALL, **changes}))
        folder = tmp_path / "net"
        net.eval().save_pretrained(folder, max_shard_size=shard)
        return folder, net

    return make


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def other_batch(model, batch=3, length=21):
    """Make inputs of another size than the example's, with padding."""
    torch.manual_seed(1)
    made = {}
    for name, tensor in model.inputs.example.items():
        if name == "input_ids":
            made[name] = torch.randint(99, (batch, length))
        elif name == "pixel_values":
            made[name] = torch.randn(batch, *tensor.shape[1:])
        else:
            made[name] = torch.full((batch, length), int(name == "attention_mask"))
    if "attention_mask" in made:
        made["attention_mask"][1, 14:] = 0
    return made


@pytest.mark.parametrize(
    ("name", "changes", "names", "shape"),
    [
        ("BertModel", {}, "input_ids attention_mask token_type_ids", (2, 16, 32)),
        (
            "BertForSequenceClassification",
            {"num_labels": 3},
            "input_ids attention_mask token_type_ids",
            (2, 3),
        ),
        ("RobertaForMaskedLM", {"type_vocab_size": 1}, "input_ids attention_mask", (2, 16, 99)),
        (
            "LlamaForCausalLM",
            {"num_key_value_heads": 2},
            "input_ids attention_mask",
            (2, 16, 99),
        ),
        (
            "ViTForImageClassification",
            {"image_size": 16, "patch_size": 8, "num_labels": 3},
            "pixel_values",
            (2, 3),
        ),
    ],
)
def test_networks_are_those_of_the_library(save, name, changes, names, shape):
    from tersor.ops.capture import capture

    folder, net = save(name, **changes)
    model = load(str(folder))
    assert (model.form, model.notes) == ("module", ())
    assert model.origin == f"huggingface:{folder}"
    assert " ".join(model.inputs.example) == names
    assert not model.net.training
    batch = other_batch(model)
    graph = capture(model.net, model.inputs)
    with torch.no_grad():
        assert model.net(**model.inputs.example).shape == shape
        wanted = net(**batch)[0]
        torch.testing.assert_close(model.net(**batch), wanted)
        torch.testing.assert_close(graph(**batch), wanted)  # batch and sequence are free


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertModel", "LlamaForCausalLM"])
def test_batch_and_sequence_stay_free_in_onnx(save, name):
    import onnxruntime

    from tersor.ops.lower import lower

    model = load(str(save(name)[0]))
    session = onnxruntime.InferenceSession(
        lower(model.net, "onnx", model.inputs).SerializeToString()
    )
    batch = other_batch(model)
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found), model.net(**batch), rtol=1e-4, atol=1e-5)


def test_shards_are_put_together(save):
    folder, net = save("BertModel", shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = load(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(
            model.net(**model.inputs.example), net(**model.inputs.example)[0]
        )


def test_half_precision_is_widened_and_said(save):
    folder, net = save("BertModel")
    net.half().save_pretrained(folder)
    model = load(str(folder))
    assert model.notes == ("weights converted from float16 to float32",)
    assert all(p.dtype == torch.float32 for p in model.net.parameters())


@pytest.mark.parametrize("how", ["none", "mean", "cls", "max", "mean_sqrt_len_tokens"])
def test_pooling(save, how):
    folder, net = save("BertModel")
    model = load(f"{folder}?pooling={how}")
    batch = other_batch(model)
    with torch.no_grad():
        found, vectors = model.net(**batch), net(**batch)[0].double()
    for i, mask in enumerate(batch["attention_mask"]):
        own = vectors[i][mask.bool()]
        wanted = {
            "none": vectors[i],
            "mean": own.mean(0),
            "cls": own[0],
            "max": own.amax(0),
            "mean_sqrt_len_tokens": own.sum(0) / len(own) ** 0.5,
        }[how]
        torch.testing.assert_close(found[i].double(), wanted, rtol=1e-5, atol=1e-5)


def sentence_transformer(folder, *steps):
    kinds = ["models.Transformer", *steps]
    places = {"models.Pooling": "1_Pooling"}
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "type": f"sentence_transformers.{kind}", "path": places.get(kind, "")}
                for i, kind in enumerate(kinds)
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    )


def test_modules_json_says_how_to_pool(save):
    folder, _ = save("BertModel")
    sentence_transformer(folder, "models.Pooling", "models.Normalize")
    model, mean = load(str(folder)), load(f"{folder}?pooling=mean")
    with torch.no_grad():
        found = model.net(**model.inputs.example)
        wanted = torch.nn.functional.normalize(mean.net(**model.inputs.example))
    torch.testing.assert_close(found, wanted)


def test_a_step_of_modules_json_that_is_not_known(save):
    folder, _ = save("BertModel")
    sentence_transformer(folder, "models.Pooling", "models.Dense")
    with pytest.raises(ModelError, match=r"has a step 'Dense', which is not read; ask for \?pool"):
        load(str(folder))
    load(f"{folder}?pooling=mean")
    with pytest.raises(ModelError, match=r"unknown pooling 'meam'\. Did you mean 'mean'\?"):
        load(f"{folder}?pooling=meam")


def test_the_weights_that_do_not_fit_are_explained(save):
    folder, _ = save("BertModel")
    edit(folder, hidden_size=64)
    with pytest.raises(
        ModelError,
        match=r"do not fit BertModel: (?s:.*)likely another width: 32 channels in the file where "
        "the network has 64",
    ):
        load(str(folder))
    edit(folder, hidden_size=32, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"'encoder.layer' has 2 blocks in the file, 4 in the net"):
        load(str(folder))
    edit(folder, num_hidden_layers=1)
    (note,) = load(str(folder)).notes
    assert "16 entries of the weights have no place in BertModel and are left out: " in note
    assert "'encoder.layer' has 2 blocks in the file, 1 in the network" in note


def test_a_missing_head(save):
    folder, _ = save("BertModel")
    edit(folder, architectures=["BertForSequenceClassification"])
    with pytest.raises(
        ModelError, match="likely only the head 'classifier' is missing in the file"
    ):
        load(str(folder))
    (note,) = load(str(folder), partial=True).notes
    assert "2 keep the values of the network's code. 2 missing: classifier.weight" in note


def test_nothing_is_run_or_downloaded(save, monkeypatch):
    import socket

    folder, _ = save("BertModel")
    canary = folder.parent / "canary"
    (folder / "modeling_own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    edit(folder, auto_map={"AutoModel": "modeling_own.Own"}, transformers_weights="../x.bin")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    (note,) = load(str(folder)).notes
    assert "names code of its own (auto_map), which is not run; BertModel of the tran" in note
    edit(folder, model_type="own")
    with pytest.raises(ModelError, match="for the network 'own', which is not run; write a facto"):
        load(str(folder))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "nothing"}, "knows no network 'nothing'; a newer version may"),
        ({"architectures": ["os.system"]}, "'os.system' is not a network that is read; of 'bert'"),
        (
            {"architectures": ["BertForNextSentencePrediction"]},
            "these are: BertModel, BertForSequenceClassification, ",
        ),
        ({"model_type": "t5", "is_encoder_decoder": True}, "has an encoder and a decoder"),
        ({"num_hidden_layers": 10**7}, "describes 10000000 layers, the files hold"),
        ({"intermediate_size": 10**7}, r"describes a network of 1,300,.* numbers, the files hold"),
        ({"hidden_size": "x"}, "config.json cannot be used: .*hidden_size"),
        ({"hidden_size": -32}, "config.json cannot be used: .*negative dimension"),
    ],
)
def test_configs_that_make_no_sense(save, changes, said):
    folder, _ = save("BertModel")
    edit(folder, **changes)
    with pytest.raises(ModelError, match=said):
        load(str(folder))


def test_nan_among_the_weights(save):
    folder, _ = save("BertModel")
    state = load_file(folder / "model.safetensors")
    state["encoder.layer.0.output.dense.bias"][3] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"NaN or infinite values in 1 tensor: model\.encoder\.laye"
    ):
        load(str(folder))


@pytest.mark.slow
def test_the_processor_travels_to_the_artifact_and_the_artifact_goes_on(save, tmp_path):
    folder, _ = save("BertForSequenceClassification", num_labels=3)
    for name in ("tokenizer.json", "vocab.txt", "README.md"):
        (folder / name).write_text("{}")
    torch.manual_seed(0)
    batches = [
        {"input_ids": torch.randint(99, (8, 12)), "attention_mask": torch.ones(8, 12).long()}
        for _ in range(4)
    ]
    model = tersor.load(f"huggingface:{folder}")
    made = tersor.compress(
        model,
        tersor.Recipe.parse({"steps": ["dynamic"], "target": "onnxruntime:cpu"}),
        data=tersor.Data(calibration=batches, validation=batches[:2], test=batches[2:]),
        metrics=("size", "fidelity"),
        out=tmp_path / "out",
    )
    own = sorted(name for name in made.files if name.startswith("processor/"))
    assert own == ["processor/config.json", "processor/tokenizer.json", "processor/vocab.txt"]
    (size,) = (m for m in made.report.after if m.metric == "size")
    assert size.value == sum(file.stat().st_size for file in made.model_files)
    assert made.manifest["inputs"]["input_ids"]["dynamic"] == {"0": "batch", "1": "sequence"}
    made.verify()
    runner = made.load()
    longer = {name: torch.ones(3, 30).long().numpy() for name in batches[0]}
    (found,) = runner.bind(longer)().values()
    runner.close()
    assert found.shape == (3, 3)
    again = tersor.load(f"huggingface:{folder}", weights=tmp_path / "out")
    assert "dynamic" in str({type(m).__name__.lower() for m in again.net.modules()})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no config.json; it is not a model of Hugging Face"),
        ({"config.json": "{"}, "config.json' is not JSON"),
        ({"config.json": "[]"}, "config.json' is not a JSON object but a list"),
        ({"config.json": ""}, "config.json' is an empty file"),
        ({"config.json": "<html>"}, "looks like an HTML page"),
        ({"config.json": "{}"}, "config.json has no model_type"),
        (
            {"config.json": {"model_type": "bert", "quantization_config": {"quant_method": "awq"}}},
            r"weights are quantized already \(awq\); give the folder of the float network",
        ),
        (
            {"config.json": {"model_type": "bert", "vocab_size": 10**12}},
            "impossible size: vocab_size 1000000000000",
        ),
        (
            {"config.json": {"model_type": "bert", "text": {"hidden_size": 10**12}}},
            "impossible size: text.hidden_size 1000000000000",
        ),
    ],
)
def test_folders_that_hold_no_network(tmp_path, files, said):
    folder = tmp_path / "net"
    folder.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    with pytest.raises(ModelError, match=said):
        load(str(folder))


def test_places_that_are_no_folder(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(ModelError, match="is a file, not a folder"):
        load(str(tmp_path / "x"))
    with pytest.raises(ModelError, match=r"does not exist$"):
        load(str(tmp_path / "y"))
    with pytest.raises(ModelError, match="models are not downloaded: give the folder of one that"):
        load("microsoft/resnet-50")


def test_a_weights_file_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="holds its own weights; leave --weights out"):
        load(str(tmp_path), weights=tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path)
