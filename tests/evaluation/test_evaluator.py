"""An evaluator inside the trainer, and the best checkpoint by its numbers."""

import pytest
import torch
from small import SMALL, processor, rows_of, wrapped

from shapadapter import Evaluator, ShapleyTrainer, ShapleyTrainingArguments, evaluate

pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("quick_evaluation")

EVALUATOR = Evaluator(images=2, truth_evaluations=256, budgets=(16, 64))


def trainer_of(folder, evaluator=EVALUATOR, **options):
    settings = {
        "max_steps": 3,
        "learning_rate": 0.05,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        **options,
    }
    return ShapleyTrainer(
        wrapped(),
        ShapleyTrainingArguments(str(folder), **settings),
        train_dataset=rows_of(),
        eval_dataset=rows_of(),
        processing_class=processor(),
        evaluator=evaluator,
    )


def test_its_numbers_are_those_of_evaluate(tmp_path):
    model = wrapped()
    expected = evaluate(model, rows_of(), processor(), methods=(), **SMALL).metrics()
    found = EVALUATOR(model, rows_of(), processor())
    assert {"error", "equivalent_evaluations", "insertion", "deletion", "sensitivity_n"} <= set(found)
    assert "accuracy" not in found, "the trainer's own"
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-5), name
    logged = trainer_of(tmp_path).evaluate()
    for name, value in found.items():
        assert logged[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


def test_predict_uses_its_own_prefix(tmp_path):
    assert "test_error" in trainer_of(tmp_path).predict(rows_of()).metrics


def test_the_checkpoint_that_explains_best_is_kept(tmp_path):
    trainer = trainer_of(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_error",
        greater_is_better=False,
    )
    trainer.train()
    errors = {logs["step"]: logs["eval_error"] for logs in trainer.state.log_history if "eval_error" in logs}
    assert len(errors) == 3
    best = min(errors, key=errors.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.state.best_metric == pytest.approx(errors[best])
    assert trainer.evaluate()["eval_error"] == pytest.approx(errors[best], rel=1e-4)


def test_training_goes_on_as_without(tmp_path):
    with_it, without = (
        trainer_of(tmp_path / str(place), evaluator, eval_strategy="steps", eval_steps=1)
        for place, evaluator in enumerate((EVALUATOR, None))
    )
    with_it.train()
    without.train()
    assert with_it.model.training == without.model.training
    for (name, one), other in zip(with_it.model.named_parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_any_function_of_model_data_and_collator_will_do(tmp_path):
    def evaluator(model, dataset, collator):
        return {"mine": float(len(dataset) + len(collator([dataset[0]])["labels"]))}

    assert trainer_of(tmp_path, evaluator).evaluate()["eval_mine"] == 9
