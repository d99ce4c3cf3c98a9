"""transformers' Trainer and plain accelerate: dict batches, hidden states as stages, all trained and restored."""

import pytest
import torch

from gkd_fast import GraphDistiller
from gkd_fast.distiller import MetaSettings
from tests.test_distiller import batch, distiller_of, moved, state

PARTS = ("student.", "criterion.", "pair_weights.student_projections.0.weight")


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, k):
        generator = torch.Generator().manual_seed(k)
        mask = torch.ones(6, dtype=torch.int64)
        mask[4 + k % 3 :] = 0
        ids = torch.randint(1, 30, (6,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": k % 3}


def bert_distiller() -> GraphDistiller:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    from gkd_fast.integrations.huggingface import HiddenStates

    def bert(width: int, layers: int):
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_labels=3,
            intermediate_size=2 * width, max_position_embeddings=8,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)

    torch.manual_seed(1)
    sample = torch.utils.data.default_collate([Tokens()[k] for k in range(8)])
    del sample["labels"]
    networks = HiddenStates(bert(8, 2), [1, 2]), HiddenStates(bert(12, 3), [1, 3])
    return GraphDistiller(
        *networks, num_classes=3, sample=sample, embed_dim=8, meta=MetaSettings(width=8, inner_lr=0.01, lr=5.0)
    )


def trainer_of(folder, steps: int):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    from gkd_fast.integrations.huggingface import DistillationTrainer

    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, save_steps=2, logging_steps=1,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    return DistillationTrainer(
        bert_distiller(), meta_interval=1, args=args, train_dataset=Tokens(), eval_dataset=Tokens()
    )


def test_the_mean_is_over_the_tokens_that_count():
    distiller = bert_distiller().eval()
    inputs = torch.utils.data.default_collate([Tokens()[k] for k in range(8)])
    labels = inputs.pop("labels")
    padded = inputs | {"input_ids": inputs["input_ids"].where(inputs["attention_mask"] > 0, 7)}
    torch.testing.assert_close(distiller(padded, labels).loss, distiller(inputs, labels).loss)


def test_the_trainer_moves_everything_and_goes_on_from_a_checkpoint(tmp_path):
    trainer = trainer_of(tmp_path / "a", 2)
    before = state(trainer.distiller)
    trainer.train()
    for part in PARTS:
        names = [n for n, _ in trainer.distiller.named_parameters() if n.startswith(part)]
        assert any(not torch.equal(before[n], trainer.distiller.state_dict()[n]) for n in names), part
    assert {"kd", "node", "relation", "loss"} <= trainer.state.log_history[0].keys()
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.distiller.criterion.parameters()} <= optimized
    assert trainer.predict(Tokens()).predictions.shape == (16, 3)

    resumed = trainer_of(tmp_path / "a", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    straight = trainer_of(tmp_path / "b", 4)  # a trainer sets the seed when it is made
    straight.train()
    for name, x in straight.distiller.state_dict().items():
        torch.testing.assert_close(resumed.distiller.state_dict()[name], x, rtol=0, atol=1e-6, msg=name)


def test_plain_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared():
        distiller = distiller_of()
        return accelerator.prepare(distiller, torch.optim.SGD(distiller.parameters(), lr=0.1, weight_decay=1e-3))

    def step(distiller, optimizer):
        loss, _, _ = distiller(*batch())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.unwrap_model(distiller).meta_step(*batch())

    distiller, optimizer = prepared()
    before = state(accelerator.unwrap_model(distiller))
    step(distiller, optimizer)
    step(distiller, optimizer)
    for part in PARTS:
        assert moved(before, accelerator.unwrap_model(distiller), part), part
    accelerator.save_state(str(tmp_path))
    expected = state(distiller)
    step(distiller, optimizer)
    accelerator.load_state(str(tmp_path))
    for name, x in distiller.state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0, msg=name)
