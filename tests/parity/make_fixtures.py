"""Makes tiny random models with transformers and writes down what transformers computes with them.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python make_fixtures.py [--out fixtures] [--only NAME]

Each fixture is a folder as `save_pretrained` writes it, plus `expected.json`:

* `parameters`: number of weights.
* `chats`: the text and the ids that `apply_chat_template` makes of each conversation of `conversations.json`, with and
  without its tools.
* `prompts`: for some conversations the logits at the last position of the prompt, 64 greedy tokens with their log-probs (nats),
  the mean cross-entropy of these tokens and the norm of its gradient over all weights. Everything is computed in float32 with
  eager attention, whatever the type in the file. A prompt is only taken when the two largest logits are at least 1e-3
  apart at every greedy step and no token ends the text, so that rounding cannot turn the path.

Weights are drawn with a spread that makes every part matter (norms and biases included): what is left out or applied
twice moves the logits by far more than the tolerance.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

HERE = Path(__file__).parent
GREEDY = 64
GAP = 1e-3
VOCABULARY = 320

LLAMA_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
]
MISTRAL_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
]
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Matched in text, but kept when special tokens are skipped.
QWEN_MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]

CORPUS = [
    "the quick brown fox jumps over the lazy dog while the small cat sleeps in the warm room",
    "user assistant system function name arguments parameters type object string number description required",
    "what is the weather in Paris today? It is sunny with 21 degrees and a light wind from the west.",
    "book a room for four people at 10:30 tomorrow, please. The room R07 is free until 12:00.",
] * 4

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, <now> & here. \"Quoted\", with 'both' kinds.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Zürich, 東京, …"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "default": None},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
BOOK = {
    "type": "function",
    "function": {
        "name": "book_room",
        "description": "Books a room.",
        "parameters": {"type": "object", "properties": {"room": {"type": "string"}, "share": {"type": "number"}}},
    },
}


def call(number, name, **arguments):
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "one turn": ([message("user", "What is the weather in Paris?")], None),
    "system": ([message("system", "  You are terse.\n"), message("user", " Hi there \n")], None),
    "several turns": (
        [
            message("system", "You book rooms."),
            message("user", "A room for 4, please."),
            message("assistant", " R07 is free. "),
            message("user", "Zoë & 東京 <b>'said'</b> \"no\" 🙂\n\tthen:  two  spaces"),
            message("assistant", "<think>\nhm, which?\n</think>\n\nR08 then."),
            message("user", "Good."),
        ],
        None,
    ),
    "tools": ([message("system", "You have tools."), message("user", "Weather in Paris?")], [WEATHER, BOOK]),
    "tool call and result": (
        [
            message("user", "Weather in 東京?"),
            message("assistant", "", tool_calls=[call(1, "get_weather", city="東京", days=3, unit=None)]),
            message("tool", '{"degrees": 21.5, "text": "<sunny> & dry"}', tool_call_id="call00001", name="get_weather"),
        ],
        [WEATHER],
    ),
    "after a tool result": (
        [
            message("system", "You have tools."),
            message("user", "Weather here?"),
            message(
                "assistant",
                "<think>\nI look.\n</think>\nOne moment.",
                tool_calls=[call(1, "get_weather", city="O'Hara's \"Inn\"", exact=True, at=[1, 2.0, 1e-7, 1e16], near={"km": 0.5})],
            ),
            message("tool", "21 degrees", tool_call_id="call00001", name="get_weather"),
            message("assistant", "It is 21 degrees."),
            message("user", "Thanks! And tomorrow?"),
            message("assistant", "Let me see.", tool_calls=[call(2, "get_weather", city="Paris"), call(3, "book_room")]),
            message("tool", "rain", tool_call_id="call00002", name="get_weather"),
            message("tool", "done", tool_call_id="call00003", name="book_room"),
        ],
        [WEATHER, BOOK],
    ),
}


def byte_level(special, marks, split, normalizer=None):
    """A byte-level BPE with merges from the corpus; added tokens come after them, as Llama 3 and Qwen have them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in marks])
    assert tokenizer.get_vocab_size() <= VOCABULARY
    return tokenizer


WORDS_LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS_QWEN = WORDS_LLAMA.replace("{1,3}", "")


def tokenizer_of(family):
    """Tokenizer with its template; encoding plain text adds a bos token where the family does."""
    if family == "llama":
        inner = byte_level(LLAMA_TOKENS, [], WORDS_LLAMA)
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    elif family == "mistral":
        inner = byte_level(MISTRAL_TOKENS, [], WORDS_LLAMA)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        inner = byte_level(QWEN_TOKENS, QWEN_MARKS, WORDS_QWEN, normalizers.NFC())
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if "bos_token" in names:
        bos = names["bos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=2048, clean_up_tokenization_spaces=False, **names
    )
    tokenizer.chat_template = (HERE / "templates" / f"{family}.jinja").read_text()
    return tokenizer


SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 2048}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Of the 8 wavelengths of a head, 1 stays, 1 is blended and 6 are stretched.
    "original_max_position_embeddings": 32,
}


def fixtures():
    """Name, tokenizer family, config, type in the file, bytes of a shard, spelling of the rope keys."""
    llama = {**SMALL, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1}
    yield "llama3", "llama", LlamaConfig(
        **{**SMALL, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
        tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5,
    ), "float32", None, "new"  # fmt: skip
    yield "llama3-old-keys-bf16", "llama", LlamaConfig(
        **llama, rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5
    ), "bfloat16", None, "old"  # fmt: skip
    yield "llama-sharded-f16", "llama", LlamaConfig(
        **llama, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-6
    ), "float16", "60KB", "new"  # fmt: skip
    yield "mistral", "mistral", MistralConfig(
        **SMALL, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        sliding_window=12, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ), "float32", None, "old"  # fmt: skip
    yield "qwen2", "qwen2", Qwen2Config(
        **SMALL, hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        # Given and not in use, as Qwen's own files have it.
        use_sliding_window=False, sliding_window=16, max_window_layers=1,
    ), "float32", None, "new"  # fmt: skip
    yield "qwen3", "qwen3", Qwen3Config(
        **SMALL, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ), "float32", None, "new"  # fmt: skip
    yield "qwen3-sharded-bf16", "qwen3", Qwen3Config(
        **SMALL, hidden_size=48, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ), "bfloat16", "40KB", "old"  # fmt: skip


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            value = 0.35 * noise
        else:
            value = 1.3 * noise / parameter.shape[-1] ** 0.5
        with torch.no_grad():
            parameter.copy_(value)


def old_rope_keys(folder):
    """Spells rope as files of 2024 do."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2) + "\n")


def chats(tokenizer):
    all_chats = []
    for name, (messages, tools) in CONVERSATIONS.items():
        for with_tools in [tools] if tools is None else [tools, None]:
            for add in (False, True):
                options = {"tools": with_tools, "add_generation_prompt": add}
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                ids = tokenizer.apply_chat_template(messages, return_dict=False, **options)
                chat = {"conversation": name, "tools": with_tools is not None, "add_generation_prompt": add}
                all_chats.append({**chat, "text": text, "ids": ids})
    return all_chats


def greedy(model, prompt, ends):
    """The greedy path and its logits, or none when rounding or an end token could turn it."""
    tokens = []
    first = cache = None
    with torch.no_grad():
        for _ in range(GREEDY):
            ids = tokens[-1:] or prompt
            output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            logits, cache = output.logits[0, -1], output.past_key_values
            first = logits if first is None else first
            best = torch.topk(logits, 2)
            if best.values[0] - best.values[1] < GAP or best.indices[0].item() in ends:
                return None
            tokens.append(best.indices[0].item())
    return first, tokens


def prompt_of(model, tokenizer, messages, tools, ends):
    prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    found = greedy(model, prompt, ends)
    # A path of few tokens would not tell whether positions are right.
    if found is None or len(set(found[1])) < 8:
        return None
    first, tokens = found
    model.zero_grad()
    logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    log_probs = torch.log_softmax(logits, -1)[torch.arange(GREEDY), torch.tensor(tokens)]
    loss = -log_probs.mean()
    loss.backward()
    norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters()))
    return {
        "messages": messages,
        "tools": tools,
        "prompt_ids": prompt,
        "last_logits": first.tolist(),
        "tokens": tokens,
        "logprobs": log_probs.tolist(),
        "cross_entropy": loss.item(),
        "grad_norm": norm.item(),
    }


def prompts(model, tokenizer, ends, seed):
    """One long prompt with tools and two short ones of random words."""
    words = sorted(set(" ".join(CORPUS).split()))
    chooser = random.Random(seed)
    found = []
    for tools in ([BOOK], None, None):
        for _ in range(1000):
            text = " ".join(chooser.choices(words, k=chooser.randint(3, 20)))
            prompt = prompt_of(model, tokenizer, [message("user", text)], tools, ends)
            if prompt is not None:
                found.append(prompt)
                break
        else:
            raise SystemExit("no prompt with clear gaps was found; change the spread of the weights")
    return found


def make(out, name, family, config, dtype, shard, spelling, seed):
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = tokenizer_of(family)
    ids = tokenizer.convert_tokens_to_ids
    config.bos_token_id = ids(tokenizer.bos_token) if tokenizer.bos_token else None
    config.eos_token_id = ids(tokenizer.eos_token)
    config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    ends = [config.eos_token_id]
    if family == "llama":
        ends = [ids(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    elif family == "qwen3":
        ends = [ids("<|im_end|>"), ids("<|endoftext|>")]
    # Several end tokens stand in generation_config.json alone.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=ends if len(ends) > 1 else ends[0]
    )
    model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    tokenizer.save_pretrained(folder)
    if spelling == "old":
        old_rope_keys(folder)

    # What is expected is computed from the files, not from what was written to them.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    expected = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(p.numel() for p in model.parameters()),
        "end_tokens": sorted(ends),
        "chats": chats(tokenizer),
        "prompts": prompts(model, tokenizer, ends, seed),
    }
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=None) + "\n")
    print(f"{name}: {sum(f.stat().st_size for f in folder.iterdir()) // 1024} KB, {expected['parameters']} weights")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "fixtures")
    parser.add_argument("--only", help="the name of one fixture")
    parser.add_argument("--seed", type=int, default=0, help="for other weights and prompts than the committed ones")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    conversations = {name: {"messages": messages, "tools": tools} for name, (messages, tools) in CONVERSATIONS.items()}
    (arguments.out / "conversations.json").write_text(json.dumps(conversations, ensure_ascii=False, indent=1) + "\n")
    for number, fixture in enumerate(fixtures()):
        if arguments.only in (None, fixture[0]):
            make(arguments.out, *fixture, seed=1000 * arguments.seed + number)


if __name__ == "__main__":
    main()
