"""The time of one GRPO step in TRL: 128 completions of 46 new tokens from a model of 0.9 million random weights.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python trl_grpo.py --fulgurite ../../target/release/fulgurite

16 prompts with 8 completions each, one optimiser step on them, no reference model, on the CPU. The reward is arithmetic on the
completion's length, so that nothing but TRL is measured. Prints a line of JSON with the median of the steps' seconds (the
first two, which warm up, left out). With `--fulgurite` the run of `grpo/grpo.toml` is timed before and after; its steps are
of as many rollouts, sandboxed, graded and recorded, and `ratio` is its median over TRL's. Its completions may end earlier,
with an end token that random weights draw: `tokens_ratio` says how many tokens of TRL's it trained on.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

WORDS = "room people meeting whiteboard screen seats eight twelve floor near lift booked from until before after needs quiet".split()
NEW_TOKENS = 46
CONFIG = Path(__file__).parent / "grpo" / "grpo.toml"


def prompts(count):
    return [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(20 + i % 9)) for i in range(count)]


def tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet)
    inner.train_from_iterator(prompts(2_000), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)


def reward(completions, **_):
    return [float(len(text) % 7) for text in completions]


def fulgurite(binary):
    """Seconds and trained tokens of each step of a run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "train", CONFIG, "--run", Path(folder) / "run", "--output", "json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = lambda name: [json.loads(line) for line in (Path(folder) / "run" / name).read_text().splitlines()]
        seconds = [line["seconds"]["step"] for line in lines("timings.jsonl") if "step" in line.get("seconds", {})]
        scalars = [line["scalars"] for line in lines("metrics.jsonl") if line.get("stage") == "grpo"]
    tokens = [each["trained_tokens"] for each in scalars if "trained_tokens" in each]
    return seconds[2:], tokens[2:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps, two of which warm up")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    parser.add_argument("--fulgurite", metavar="BINARY", help="time this binary's steps beside TRL's")
    arguments = parser.parse_args()
    own = [fulgurite(arguments.fulgurite)] if arguments.fulgurite else []
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    processing = tokenizer()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=processing.eos_token_id,
        pad_token_id=processing.pad_token_id,
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=LlamaForCausalLM(config),
            processing_class=processing,
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": prompts(512)}),
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=128,
                num_generations=8,
                num_iterations=1,
                max_completion_length=NEW_TOKENS,
                generation_kwargs={"min_new_tokens": NEW_TOKENS},
                temperature=1.0,
                beta=0.0,
                learning_rate=3e-4,
                max_steps=arguments.steps,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_num_workers=0,
            ),
        )
        trainer.train()
    steps = clock.seconds[2:]
    result = dict(torch=torch.__version__, threads=torch.get_num_threads(), new_tokens=128 * NEW_TOKENS)
    result |= dict(step_seconds=statistics.median(steps), steps=[round(s, 4) for s in steps])
    if own:
        own.append(fulgurite(arguments.fulgurite))
        seconds = statistics.median([second for seconds, _ in own for second in seconds])
        tokens = statistics.median([token for _, tokens in own for token in tokens])
        result |= dict(fulgurite_step_seconds=seconds, ratio=seconds / result["step_seconds"])
        result |= dict(tokens_ratio=tokens / result["new_tokens"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
