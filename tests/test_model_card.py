"""The model card says how a model was trained and how it is loaded, whoever writes the card last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers.trainer
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from rose_peft import ROSEConfig, RoseConfigError, attach_rose, get_selector, update_model_card
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import train

SETTINGS = {"strategy": "ensemble", "upper_quantile": 0.6, "gamma": 0.25, "task_type": "SEQ_CLS"}
LORA = {"r": 2, "target_modules": ["query", "value"]}


def trained(base_config: LoraConfig | None = None) -> PeftModel:
    model = get_peft_model(tiny_bert(), ROSEConfig(**SETTINGS, base_config=base_config))
    train(model, batch(model), steps=2)
    return model


def trainer_of(model: torch.nn.Module, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_steps=1
    )
    inputs = batch(model)
    rows = [{name: column[row] for name, column in inputs.items()} for row in range(4)]
    return Trainer(model=model, args=arguments, train_dataset=rows)


def read(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_metadata_and_settings(tmp_path) -> None:
    trained().save_pretrained(tmp_path)
    card = read(tmp_path)
    assert {"rose", "peft"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "peft"
    assert card.data.to_dict()["rose"] == {
        "strategy": "ensemble",
        "upper_quantile": 0.6,
        "lower_quantile": 0.0,
        "warmup_steps": 0,
        "gamma": 0.25,
        "risk_pass": "paired",
    }
    assert "`upper_quantile=0.6`" in card.text
    assert "In 2 steps" in card.text


def test_settings_without_effect_are_left_out(tmp_path) -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(strategy="second_order", task_type="TOKEN_CLS"))
    model.save_pretrained(tmp_path)
    card = read(tmp_path)
    assert set(card.data.to_dict()["rose"]) == {"strategy", "upper_quantile", "lower_quantile", "warmup_steps"}
    assert card.data.pipeline_tag == "token-classification"
    assert "In 0 steps" not in card.text


@pytest.mark.parametrize("base_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_the_trainers_own_card_keeps_the_note(tmp_path, base_config) -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(**SETTINGS, base_config=base_config))
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card(dataset="SST-2", dataset_tags="glue", tags="mine")
        card = read(tmp_path)
        assert card.text.count("## Trained with ROSE") == 1
        assert {"rose", "peft"} <= set(card.data.tags)
        assert card.data.to_dict()["rose"]["upper_quantile"] == 0.6
        assert "In 2 steps" in card.text
        assert "generated automatically" in card.text, "the Trainer's own words stay"
        assert ("KeyError: 'ROSE'" in card.text) is (base_config is None)


def test_the_card_that_the_trainer_pushes_has_the_note(tmp_path, monkeypatch) -> None:
    pushed = []

    def upload_folder(*args, folder_path, **_) -> None:
        pushed.append(folder_path)

    if hasattr(transformers.trainer, "upload_folder"):
        monkeypatch.setattr(transformers.trainer, "upload_folder", upload_folder)
    else:  # transformers 5
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    trainer = trainer_of(trained(), tmp_path)
    trainer.hub_model_id = "someone/model"
    trainer.push_to_hub()
    assert pushed == [str(tmp_path)]
    assert "## Trained with ROSE" in read(tmp_path).text


def test_every_checkpoint_of_a_trainer_has_a_card(tmp_path) -> None:
    trainer_of(trained(), tmp_path).train()
    assert all("## Trained with ROSE" in read(tmp_path / f"checkpoint-{step}").text for step in (1, 2))


def test_over_a_base_config_the_card_is_of_a_plain_adapter(tmp_path) -> None:
    trained(LoraConfig(**LORA)).save_pretrained(tmp_path)
    card = read(tmp_path)
    assert "plain adapter of type `LORA`" in card.text
    assert "lora" in card.data.tags and "rose" in card.data.tags
    assert "import rose_peft" not in card.text


def test_full_weights_are_best_published_merged(tmp_path) -> None:
    trained().save_pretrained(tmp_path)
    assert "merge_and_unload" in read(tmp_path).text


def test_without_rose_cards_are_as_they_were(tmp_path) -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(**LORA, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    card = read(tmp_path)
    assert "rose" not in card.text.lower() and "rose" not in (card.data.tags or [])


def test_data_set_and_figures_outlive_the_next_save(tmp_path) -> None:
    model = trained()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        update_model_card(tmp_path, get_selector(model).config, dataset="nyu-mll/glue", metrics={"accuracy": 0.5})
    model.save_pretrained(tmp_path)
    card = read(tmp_path)
    assert card.data.datasets == ["nyu-mll/glue"]
    assert card.data.metrics == ["accuracy"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.5, "nyu-mll/glue")
    assert card.text.count("## Trained with ROSE") == 1
    assert "In 2 steps" in card.text


def test_a_loaded_adapter_keeps_what_its_card_says_of_the_training(tmp_path) -> None:
    trained().save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_bert(), tmp_path).save_pretrained(tmp_path)
    card = read(tmp_path)
    assert card.text.count("In 2 steps") == 1
    assert card.text.count("## Trained with ROSE") == 1


def test_a_merged_model_is_a_plain_one(tmp_path) -> None:
    model = trained()
    config = get_selector(model).config
    model.merge_and_unload().save_pretrained(tmp_path)
    update_model_card(tmp_path, config)
    card = read(tmp_path)
    assert "It is a plain model" in card.text
    assert card.data.tags == ["rose"]


def test_attached_to_another_methods_adapter(tmp_path) -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(**LORA, task_type="SEQ_CLS"))
    attach_rose(model, ROSEConfig(strategy="first_order"))
    model.save_pretrained(tmp_path)
    assert "`strategy='first_order'`" in read(tmp_path).text


def test_metrics_need_a_data_set(tmp_path) -> None:
    with pytest.raises(RoseConfigError, match="dataset="):
        update_model_card(tmp_path, ROSEConfig(), metrics={"accuracy": 1.0})
    assert not list(tmp_path.iterdir())


def test_peft_is_changed_once() -> None:
    from rose_peft.model_card import write_cards_with_peft

    before = PeftModel.create_or_update_model_card
    write_cards_with_peft()
    assert PeftModel.create_or_update_model_card is before
