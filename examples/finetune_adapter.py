"""Compress a model, fine-tune its adapter with PEFT and a plain Hugging Face Trainer, and keep the codes as they were.

    pip install 'fewbits[peft]'
    python examples/finetune_adapter.py OUTPUT [--model builtin:tiny-lm] [--method apiq] [--steps 60]

OUTPUT/base is the compressed folder, OUTPUT/start the adapter that the method learned, OUTPUT/adapter the fine-tuned one; all
three can be used without this file.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import fewbits
from fewbits.core.config import configure
from fewbits.core.registry import get_method
from fewbits.export.peft import load_with_adapter, write_adapter
from fewbits.models.source import open_model


class Windows(torch.utils.data.Dataset):
    """Token windows, as a Trainer reads them: the labels are the tokens themselves."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def mean_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(float(model(input_ids=one[None], labels=one[None]).loss) for one in tokens) / len(tokens)


def main(output: Path, model: str, method: str, fields: dict, sizes: dict) -> dict:
    text = fewbits.TextSample("builtin:calibration", count=sizes["windows"], length=sizes["length"])
    made = fewbits.compress(model, configure(get_method(method), fields), output / "base", calibration=text, probe=None)
    write_adapter(output / "base", output / "start")
    peft_model = load_with_adapter(output / "base", output / "start", trainable=True)
    peft_model.print_trainable_parameters()

    tokens = text.windows(open_model(model).tokenizer())
    before = mean_loss(peft_model.eval(), tokens)
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=sizes["steps"],
        per_device_train_batch_size=4,
        learning_rate=sizes["rate"],
        lr_scheduler_type="cosine",
        warmup_steps=max(1, sizes["steps"] // 30),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    Trainer(model=peft_model, args=arguments, train_dataset=Windows(tokens)).train()
    after = mean_loss(peft_model.eval(), tokens)
    peft_model.save_pretrained(output / "adapter")
    return {"bits_per_weight": made["results"]["bits_per_weight"], "loss_before": before, "loss_after": after}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="builtin:tiny-lm")
    parser.add_argument("--method", default="apiq")
    parser.add_argument("--fields", type=json.loads, default={}, help="the method's fields, as JSON")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    given = vars(parser.parse_args())
    sizes = {name: given[name] for name in ("steps", "rate", "windows", "length")}
    print(json.dumps(main(given["output"], given["model"], given["method"], given["fields"], sizes), indent=1))
