"""Writes rotary.json: cosines and sines of the rotary embedding as transformers computes them, at a few positions.

    python tests/parity/make_rotary.py

The Rust side is `host/policy/src/rotary.rs`. Needs what requirements.txt names.
"""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).resolve().parent
POSITIONS = [0, 1, 63, 2_390, 8_191, 40_000]
CASES = [
    (16, 10_000.0, {"rope_type": "default"}),
    (64, 500_000.0, {"rope_type": "default"}),
    (32, 1_000_000.0, {"rope_type": "linear", "factor": 3.0}),
    (
        64,
        500_000.0,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8_192,
        },
    ),
]


def case(head_dim, theta, scaling):
    rope = {**scaling, "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=rope, max_position_embeddings=50_000
    )
    table = LlamaRotaryEmbedding(config)
    cosines, sines = table(torch.zeros(1), torch.tensor([POSITIONS]))
    half = head_dim // 2
    return {
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "positions": POSITIONS,
        "cosines": cosines[0, :, :half].tolist(),
        "sines": sines[0, :, :half].tolist(),
    }


def main():
    torch.set_num_threads(1)
    lines = [json.dumps(case(*each)) for each in CASES]
    (HERE / "rotary.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
