"""Train the built-in language model `builtin:tiny-lm` and its tokenizer on the running interpreter's own library.

    python scripts/train_tiny_lm.py OUT [--hours 2] [--threads 2]

The run ends after --hours: the learning rate is a function of the share of time that has passed (warm-up, constant, then
a linear fall to zero over the last third), so the model is a finished one whatever the machine. A killed run goes on from
OUT/state.pt. The result is a Hugging Face folder: bf16 safetensors and a byte-level BPE tokenizer.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewbits.data.standard_library import heldout_documents, training_documents

END = "<|end|>"
SEQUENCE = 512
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}


def train_tokenizer(documents, out: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=2048)
    fast.save_pretrained(out)
    return fast


def encode(tokenizer, documents) -> np.ndarray:
    end = tokenizer.convert_tokens_to_ids(END)
    rows = [[end, *encoding.ids] for encoding in tokenizer.backend_tokenizer.encode_batch(list(documents))]
    return np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows])


def learning_rate(progress: float, peak: float) -> float:
    return peak * min(progress / 0.02, 1.0, max(0.0, (1 - progress) / 0.35))


@torch.no_grad()
def heldout_loss(model, tokens: np.ndarray, windows: int = 64) -> float:
    model.eval()
    rows = torch.from_numpy(tokens[: windows * SEQUENCE].astype(np.int64)).view(windows, SEQUENCE)
    losses = []
    for batch in rows.split(16):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss_of(model, batch).item())
    model.train()
    return sum(losses) / len(losses)


def loss_of(model, batch):
    logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def optimizers_for(model, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms; one learning rate serves both."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def train(model, tokens, heldout, arguments) -> dict:
    optimizers = optimizers_for(model, arguments.learning_rate)
    state_file, spent, step = arguments.out / "state.pt", 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        spent, step = state["seconds"], state["step"]
    generator = torch.Generator().manual_seed(1000 + step)
    budget, began, saved, average = arguments.hours * 3600, time.monotonic() - spent, time.monotonic(), None
    while (elapsed := time.monotonic() - began) < budget:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(elapsed / budget, arguments.learning_rate)
        starts = torch.randint(len(tokens) - SEQUENCE - 1, (arguments.batch,), generator=generator).tolist()
        batch = torch.from_numpy(np.stack([tokens[s : s + SEQUENCE + 1] for s in starts]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if not math.isfinite(average):
            raise SystemExit(f"the loss is {average} at step {step}")
        if step % 50 == 0:
            rate = step * arguments.batch * SEQUENCE / elapsed
            print(f"step {step} {elapsed / 60:.1f} min loss {average:.4f} {rate:.0f} tokens/s", flush=True)
        if time.monotonic() - saved > 600:
            saved = time.monotonic()
            print(f"  held-out loss {heldout_loss(model, heldout):.4f}", flush=True)
            state = {"model": model.state_dict(), "seconds": elapsed, "step": step}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    return {"steps": step, "tokens": step * arguments.batch * SEQUENCE, "hours": arguments.hours, "train_loss": average}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents = list(training_documents())
    if (arguments.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.out)
    else:
        tokenizer = train_tokenizer(documents, arguments.out)
    tokens, heldout = encode(tokenizer, documents), encode(tokenizer, heldout_documents())
    print(f"{len(tokens)} training tokens, {len(heldout)} held-out tokens", flush=True)
    end = tokenizer.convert_tokens_to_ids(END)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, bos_token_id=end, eos_token_id=end))
    model.forward = torch.compile(model.forward) if arguments.compile else model.forward
    report = train(model, tokens, heldout, arguments)
    report["heldout_loss"] = heldout_loss(model, heldout)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(report)


if __name__ == "__main__":
    main()
