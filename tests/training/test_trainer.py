"""The Trainer for adapters: signals, objectives, checkpoints, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import AffineConfig
from transformers import TrainingArguments

import anyadapter as aa
from anyadapter.core.host import Host
from anyadapter.formats.native import restore
from anyadapter.training.causal_lm import Collator
from anyadapter.training.trainer import AdapterTrainer, last_checkpoint


def rows(count: int = 16, tasks: bool = False) -> list[dict]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(5, 200, (5 + i % 3,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": ids, **({"task": torch.tensor(i % 2)} if tasks else {})})
    return made


def arguments(folder, **settings) -> TrainingArguments:
    quiet = {
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
    }
    size = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0}
    return TrainingArguments(output_dir=str(folder), **{**quiet, **size, **settings})


def trained(model, folder, *, train_dataset=None, objective=None, groups=(), **settings) -> AdapterTrainer:
    trainer = AdapterTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=train_dataset or rows(),
        eval_dataset=rows(8),
        data_collator=Collator(0),
        objective=objective,
        groups=groups,
    )
    trainer.train()
    return trainer


def test_signals_of_a_batch_hold_for_forward_and_backward(model, tmp_path):
    losses = {}
    for checkpointing in (False, True):
        adapter = aa.attach(model, AffineConfig())
        trainer = trained(model, tmp_path, train_dataset=rows(tasks=True), gradient_checkpointing=checkpointing)
        losses[checkpointing] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert adapter.shift.abs().sum() > 0
        assert not Host.of(model).signals.values
        aa.detach(model)
    assert losses[True] == pytest.approx(losses[False], abs=1e-6)


def test_a_batch_without_the_signal_an_adapter_reads_is_an_error(model, tmp_path):
    aa.attach(model, AffineConfig())
    with pytest.raises(aa.SignalError, match="task"):
        trained(model, tmp_path)


def test_a_row_is_trained_under_its_own_signal(model, tmp_path):
    adapter = aa.attach(model, AffineConfig(tasks=3))
    trained(model, tmp_path, train_dataset=rows(tasks=True))
    moved = adapter.shift.abs().sum(dim=(0, 2))
    assert (moved > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_objective_takes_the_place_of_the_models_loss(model, tmp_path, accumulation):
    """The mean of the loss over a batch, as the model has it, so that both train the same: rows of equal length."""
    even = [row for row in rows(24) if len(row["input_ids"]) == 5]

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)

    runs = {}
    for name, objective in (("model", None), ("objective", loss)):
        torch.manual_seed(0)
        adapter = aa.attach(model, aa.LoRAConfig(rank=2))
        trainer = trained(
            model,
            tmp_path,
            train_dataset=even,
            objective=objective,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
        )
        evaluation = trainer.evaluate(even)["eval_loss"]
        runs[name] = evaluation, {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
        aa.detach(model)
    assert runs["objective"][0] == pytest.approx(runs["model"][0], abs=1e-5)
    for name, tensor in runs["model"][1].items():
        torch.testing.assert_close(runs["objective"][1][name], tensor, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_holds_the_adapter_and_the_trainers_state_only(model, tmp_path):
    adapter = aa.attach(model, aa.LoRAConfig(rank=2))
    trained(model, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-2"
    names = {p.name for p in checkpoint.iterdir()}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
        "trainer_state.json",
    }  # fmt: skip
    after = {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.zero_()
    restore(adapter, checkpoint)
    assert all(torch.equal(tensor, after[name]) for name, tensor in adapter.tensors().items())
    assert all(p.requires_grad for p in adapter.parameters())


def test_only_the_named_groups_are_trained(model, tmp_path):
    adapter = aa.attach(model, AffineConfig())
    trained(model, tmp_path, train_dataset=rows(tasks=True), groups=("shift",))
    assert adapter.factor.abs().sum() == 0
    assert adapter.shift.abs().sum() > 0


def test_what_no_checkpoint_would_hold_is_not_trained(model, tmp_path):
    aa.attach(model, aa.LoRAConfig(rank=2))
    model.lm_head.requires_grad_(True)
    with pytest.raises(aa.AttachError, match=r"lm_head\.weight.*lost"):
        trained(model, tmp_path)
    model.lm_head.requires_grad_(False)
    aa.attach(model, aa.LoRAConfig(rank=2), "second")
    with pytest.raises(aa.AttachError, match="second"):
        trained(model, tmp_path)
    aa.adapters(model)["second"].requires_grad_(False)
    trained(model, tmp_path, max_steps=1)


def test_no_such_adapter(model, tmp_path):
    with pytest.raises(aa.AttachError, match="No adapter named 'default'"):
        trained(model, tmp_path)


@pytest.mark.parametrize("through", [True, False])
def test_a_quantised_base_is_taken_where_gradients_pass_through_it(model, tmp_path, through):
    method = SimpleNamespace(quant_method="bitsandbytes")
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(is_trainable=through, is_qat_trainable=False, quantization_config=method)
    aa.attach(model, aa.LoRAConfig(rank=2))
    if through:
        trained(model, tmp_path, max_steps=1)
        assert not model._hf_peft_config_loaded
    else:
        with pytest.raises(aa.ConfigError, match="bitsandbytes"):
            trained(model, tmp_path)
