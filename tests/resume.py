"""Train, and go on from a checkpoint in the middle: the same numbers."""

import torch
import transformers


def trains_and_resumes(model, folder):
    """Four steps at once, and the last two again from what the Trainer saved after two."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (16, 7))]
    options = {"max_steps": 4, "save_steps": 2, "report_to": [], "per_device_train_batch_size": 4, "use_cpu": True}
    args = transformers.TrainingArguments(str(folder), **options)
    transformers.Trainer(model, args, train_dataset=rows).train()
    again = type(model).from_pretrained(folder / "checkpoint-2")
    transformers.Trainer(again, args, train_dataset=rows).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, atol=1e-6, rtol=0)
