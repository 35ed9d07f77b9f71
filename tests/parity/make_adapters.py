"""Makes random LoRA adapters with PEFT over some of the fixtures and writes down what PEFT computes with them.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python make_adapters.py [--out adapters]
    venv/bin/python make_adapters.py --check BASE ADAPTER OTHER

Each adapter is a folder as `save_pretrained` writes it, plus `expected.json`: ids of a prompt with some tokens behind it,
how many of them are the prompt's, the logits at its last position, the mean cross-entropy of the tokens behind it and the
norm of its gradient over the adapter's weights. `A` and `B` are drawn wide enough that leaving out a matrix or the scale
moves the logits by far more than the tolerance.

With `--check` nothing is written: it loads ADAPTER over BASE, and the plain model OTHER (an adapter that was merged), and
prints the largest difference of their logits.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
# All projections over biases, some over norms of heads.
ADAPTERS = {
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "up_proj", "down_proj"],
}
TOKENS = 24


def base_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def make(name, targets, out):
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.0)
    model = get_peft_model(base_model(HERE / "fixtures" / name), config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.eval()
    expected = json.loads((HERE / "fixtures" / name / "expected.json").read_text())
    prompt = expected["prompts"][0]
    ids = torch.tensor([prompt["prompt_ids"] + prompt["tokens"][:TOKENS]])
    start = len(prompt["prompt_ids"])
    logits = model(ids).logits[0]
    log_probs = torch.log_softmax(logits[start - 1 : -1], dim=-1)
    loss = -log_probs.gather(1, ids[0, start:, None]).mean()
    loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    norm = torch.sqrt(sum((gradient.double() ** 2).sum() for gradient in gradients))
    # PEFT writes down where the base was on this machine.
    model.peft_config["default"].base_model_name_or_path = f"../../fixtures/{name}"
    model.save_pretrained(out / name)
    (out / name / "README.md").unlink(missing_ok=True)
    result = {
        "ids": ids[0].tolist(),
        "prompt_tokens": start,
        "last_logits": [round(value, 6) for value in logits[start - 1].tolist()],
        "cross_entropy": loss.item(),
        "grad_norm": norm.item(),
    }
    (out / name / "expected.json").write_text(json.dumps(result) + "\n")


def check(base, adapter, other):
    adapted = PeftModel.from_pretrained(base_model(base), adapter).eval()
    plain = base_model(other).eval()
    ids = torch.arange(40)[None, :] * 7 % adapted.config.vocab_size
    with torch.no_grad():
        difference = (adapted(ids).logits - plain(ids).logits).abs().max().item()
        moved = (plain(ids).logits - base_model(base)(ids).logits).abs().max().item()
    print(json.dumps({"difference": difference, "moved_from_base": moved}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--check", nargs=3, metavar=("BASE", "ADAPTER", "OTHER"))
    arguments = parser.parse_args()
    if arguments.check:
        check(*arguments.check)
    else:
        for name, targets in ADAPTERS.items():
            make(name, targets, arguments.out)
