"""What is written to disk, what comes back, and what a process without this package makes of it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import rose_peft
from rose_peft import AdapterFileError, ROSEConfig, RoseError, attach_rose, get_selector
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import outputs, train, train_watched, trainable

LORA = {"r": 2, "target_modules": ["query", "value"]}


@pytest.fixture
def base_folder(tmp_path) -> Path:
    tiny_bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def from_disk(folder: Path) -> nn.Module:
    base = tiny_bert()
    return type(base).from_pretrained(folder, attn_implementation="eager")


@pytest.fixture
def trained(base_folder) -> PeftModel:
    config = ROSEConfig(task_type="SEQ_CLS", strategy="first_order", upper_quantile=0.6)
    model = get_peft_model(from_disk(base_folder), config)
    train(model, batch(model))
    return model


def run(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


# The folder ---------------------------------------------------------------------------------------------------------


def test_files_and_keys(trained, tmp_path) -> None:
    folder = tmp_path / "out"
    trained.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    weights = load_file(folder / "adapter_model.safetensors")
    head = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    expected = set()
    for name, _ in tiny_bert().named_parameters():
        path, _, parameter = name.rpartition(".")
        if not name.startswith("classifier"):
            expected.add(f"base_model.model.{path}.rose_copy.{parameter}")
    assert weights.keys() == expected | head
    base = tiny_bert()
    for name, tensor in weights.items():
        plain = name.removeprefix("base_model.model.").replace(".rose_copy", "")
        assert tensor.shape == base.get_parameter(plain).shape
    moved = [n for n, t in weights.items() if "query.rose_copy.weight" in n and t.abs().sum() > 0]
    assert len(moved) == 2


def test_weights_are_those_of_the_copies(trained, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    merged = trained.merge_and_unload().state_dict()
    for name, tensor in weights.items():
        assert torch.equal(merged[name.removeprefix("base_model.model.").replace(".rose_copy", "")], tensor)


def test_config_goes_round(tmp_path) -> None:
    config = ROSEConfig(
        strategy="ensemble",
        upper_quantile=0.6,
        lower_quantile=0.1,
        gamma=0.25,
        warmup_steps=7,
        dropout=0.2,
        target_modules=["value", "query"],
        exclude_modules=["layer.0"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "ROSE"
    assert sorted(saved["target_modules"]) == ["query", "value"]
    for loaded in (ROSEConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is ROSEConfig
        assert loaded.to_dict() | {"inference_mode": False} == config.to_dict()


def test_config_with_a_base_config_goes_round(tmp_path) -> None:
    config = ROSEConfig(base_config=LoraConfig(**LORA), task_type="SEQ_CLS")
    config.save_pretrained(tmp_path)
    loaded = ROSEConfig.from_pretrained(tmp_path)
    assert type(loaded.base_config) is LoraConfig
    assert loaded.base_config.r == 2
    assert loaded.base_config.target_modules == {"query", "value"}
    train_watched(get_peft_model(tiny_bert(), loaded), batch(tiny_bert()))


def test_unknown_fields_of_a_newer_version_are_no_obstacle(trained, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert ROSEConfig.from_pretrained(tmp_path / "out").upper_quantile == 0.6


def test_model_card_says_once_how_to_load(trained, tmp_path) -> None:
    card = tmp_path / "out" / "README.md"
    for _ in range(3):
        trained.save_pretrained(tmp_path / "out")
        text = card.read_text()
        assert text.count("import rose_peft  # registers ROSE with PEFT") == 1
        assert text.count("## Loading this adapter") == 1
        assert "KeyError: 'ROSE'" in text
    assert "library_name: peft" in text


def test_a_model_card_of_the_users_keeps_his_words(trained, tmp_path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags:\n- mine\n---\n# My model\nÜber alles geprüft.\n", encoding="utf-8")
    trained.save_pretrained(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "# My model\nÜber alles geprüft." in text
    assert text.count("## Loading this adapter") == 1


# Loading ------------------------------------------------------------------------------------------------------------


def test_loaded_for_inference(trained, base_folder, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out")
    assert torch.equal(outputs(loaded, batch(loaded)), outputs(trained, batch(trained)))
    assert not trainable(loaded)
    assert not loaded.training
    with pytest.raises(RoseError, match="not attached"):
        get_selector(loaded)


def test_loaded_to_train_on(trained, base_folder, tmp_path) -> None:
    """ROSE is attached again with the settings of the folder, and training goes on from the saved weights."""
    trained.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out", is_trainable=True)
    assert torch.equal(outputs(loaded, batch(loaded)), outputs(trained, batch(trained)))
    config = get_selector(loaded).config
    assert (config.strategy, config.upper_quantile) == ("first_order", 0.6)
    assert trainable(loaded) == trainable(trained)
    masks = torch.stack(train_watched(loaded, batch(loaded)))
    assert (masks == 0).any()


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_beside_another(trained, base_folder, is_trainable: bool, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    model = get_peft_model(from_disk(base_folder), ROSEConfig(task_type="SEQ_CLS"), adapter_name="mine")
    untouched = outputs(model, batch(model))
    model.load_adapter(tmp_path / "out", adapter_name="theirs", is_trainable=is_trainable)
    assert model.active_adapters == ["mine"]
    assert torch.equal(outputs(model, batch(model)), untouched)
    model.set_adapter("theirs")
    assert torch.equal(outputs(model, batch(model)), outputs(trained, batch(trained)))
    model.set_adapter("mine")
    train_watched(model, batch(model))


def test_loading_over_the_present_adapter(trained, base_folder, tmp_path) -> None:
    """What the Trainer does to go back to the best checkpoint."""
    trained.save_pretrained(tmp_path / "out")
    best = outputs(trained, batch(trained))
    train(trained, batch(trained))
    assert not torch.equal(outputs(trained, batch(trained)), best)
    trained.load_adapter(tmp_path / "out", adapter_name="default", is_trainable=True)
    assert torch.equal(outputs(trained, batch(trained)), best)
    train_watched(trained, batch(trained))


def test_auto_class(trained, tmp_path, base_folder) -> None:
    trained.save_pretrained(tmp_path / "out")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert isinstance(loaded, PeftModel)
    assert torch.equal(outputs(loaded, batch(loaded)), outputs(trained, batch(trained)))


def test_auto_class_of_a_causal_model(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "base")
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), ROSEConfig(task_type="CAUSAL_LM"))
    ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    train(model, inputs)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert loaded.get_base_model().lm_head.weight is loaded.get_base_model().transformer.wte.weight


def test_pickled_weights_instead_of_safetensors(trained, base_folder, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert (tmp_path / "out" / "adapter_model.bin").exists()
    loaded = PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out")
    assert torch.equal(outputs(loaded, batch(loaded)), outputs(trained, batch(trained)))


def test_merged_model_is_an_ordinary_one(trained, tmp_path) -> None:
    expected = outputs(trained, batch(trained))
    trained.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(from_disk(tmp_path / "merged"), batch(trained)), expected)


def test_another_head_than_was_trained_is_an_error(trained, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_bert(num_labels=3), tmp_path / "out")


# Broken and foreign files -------------------------------------------------------------------------------------------


def test_truncated_weights_are_an_error(trained, base_folder, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors cannot be read .* Copy it again"):
        PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out")


def test_truncated_config_is_an_error(trained, base_folder, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
        PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out")


def test_missing_weights_are_an_error(trained, base_folder, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(Exception, match=r"adapter_model|adapter weights|offline|Repo id"):
        PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out")


def test_settings_out_of_range_in_the_file_are_refused(trained, base_folder, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"upper_quantile": 70}))
    with pytest.raises(rose_peft.RoseConfigError, match=r"upper_quantile=70 .*70 percent is 0\.7"):
        PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out")


def test_weights_of_another_method_are_no_silent_success(trained, base_folder, tmp_path) -> None:
    """A LoRA file under a ROSE config: every copy would stay what the base is."""
    trained.save_pretrained(tmp_path / "out")
    lora = get_peft_model(from_disk(base_folder), LoraConfig(**LORA, task_type="SEQ_CLS"))
    lora.save_pretrained(tmp_path / "lora")
    foreign = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    save_file(foreign, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors holds .* none is ROSE's"):
        PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out")


def test_weights_of_fewer_layers_are_no_silent_success(trained, base_folder, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if ".layer.1." not in name}, path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out")


# Fresh processes ----------------------------------------------------------------------------------------------------


LOAD = """
    import sys, warnings
    from peft import PeftModel
    from transformers import BertForSequenceClassification
    warnings.simplefilter("ignore")
    base = BertForSequenceClassification.from_pretrained(sys.argv[1], attn_implementation="eager")
    model = PeftModel.from_pretrained(base, sys.argv[2])
    """


def test_without_the_package_a_full_adapter_ends_in_a_key_error(trained, base_folder, tmp_path) -> None:
    """What the README and the model card say. PEFT looks the type up before it reads anything of ours."""
    trained.save_pretrained(tmp_path / "out")
    done = run(LOAD, base_folder, tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "KeyError: 'ROSE'"


def test_with_the_package_a_full_adapter_gives_the_same_logits(trained, base_folder, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "out")
    inputs = {name: tensor for name, tensor in batch(trained).items() if name != "labels"}
    torch.save((inputs, outputs(trained, inputs)), tmp_path / "expected.pt")
    code = f"""
    import torch, transformers, peft
    torch.set_num_threads(1)
    import sys
    sys.path.insert(0, {str(Path(rose_peft.__file__).parent.parent)!r})
    import rose_peft
    {LOAD}
    inputs, expected = torch.load("expected.pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, expected)
    print("same")
    """
    done = run(code, base_folder, tmp_path / "out", cwd=tmp_path)
    assert done.stdout.strip().endswith("same"), done.stderr


# Registration -------------------------------------------------------------------------------------------------------


def test_registered_in_every_mapping() -> None:
    assert PeftType("ROSE") is PeftType.ROSE is PeftType["ROSE"]
    assert PeftType.ROSE.value == PeftType.ROSE.name == "ROSE" == PeftType.ROSE
    assert list(PeftType).count("ROSE") == 1
    assert isinstance(PeftType.ROSE, PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROSE] is ROSEConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ROSE] is rose_peft.ROSEModel


def test_importing_again_changes_nothing() -> None:
    members = list(PeftType)
    importlib.import_module("rose_peft")
    importlib.reload(rose_peft)
    importlib.reload(sys.modules["rose_peft.registration"]).add_peft_type()
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROSE] is ROSEConfig
    model = get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS", base_config=LoraConfig(**LORA)))
    assert model.peft_type == PeftType.LORA


def in_a_fresh_process(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path.insert(0, {str(Path(rose_peft.__file__).parent.parent)!r})\n"
    return run(path + textwrap.dedent(code), cwd=tmp_path)


def test_import_before_peft_and_with_warnings_as_errors(tmp_path) -> None:
    """Importing it after peft is what the other tests do; each process costs seconds."""
    code = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import rose_peft, pickle
    from peft import PeftType, get_peft_config
    assert pickle.loads(pickle.dumps(PeftType.ROSE)) is PeftType.ROSE
    assert type(get_peft_config({"peft_type": "ROSE"})) is rose_peft.ROSEConfig
    assert "rose_peft.callbacks" not in sys.modules, "the callback is imported when it is asked for"
    assert rose_peft.RoseCallback.__name__ == "RoseCallback"
    """
    root = Path(rose_peft.__file__).parent.parent
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_rose_of_peft_itself_is_not_overwritten(tmp_path) -> None:
    """Should PEFT ever bring a ROSE of its own, two methods under one name would load each other's files."""
    code = """
    import peft
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    import rose_peft.registration as registration

    class Upstream(PeftConfig):
        pass

    for name in [name for name in sys.modules if name.startswith("rose_peft")]:
        del sys.modules[name]
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROSE] = Upstream
    try:
        import rose_peft
    except ImportError as error:
        print(error)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROSE] is Upstream
    """
    done = in_a_fresh_process(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "peft already has a method ROSE" in done.stdout


def test_attach_to_an_adapter_loaded_without_rose(trained, base_folder, tmp_path) -> None:
    """Loaded for inference, then made trainable by hand: attach_rose is the way to have it steered."""
    trained.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(from_disk(base_folder), tmp_path / "out")
    loaded.set_requires_grad("default", True)
    selector: Any = attach_rose(loaded, ROSEConfig(strategy="first_order"))
    assert len(selector.units) == 16
    train_watched(loaded, batch(loaded))
