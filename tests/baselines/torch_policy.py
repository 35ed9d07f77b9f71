"""What PyTorch does with the shapes of `fulgurite bench policy`.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    fulgurite bench policy --baseline venv/bin/python      # both, in turns: the figures to compare
    venv/bin/python torch_policy.py                        # this side alone

Eager PyTorch in float32, written as one would by hand who wants it fast: query, key and value in one product, gate and up in
one, fused attention, a cache of keys and values that is allocated once, the fused AdamW. `generate` is transformers' own on
`LlamaForCausalLM` of the same sizes. Each process reads requests as lines of JSON and answers with a line each.

Two processes of one thread each train a half of the rows each and exchange no gradients, so their figure is above what they
could reach together: it is a bound that favours PyTorch.
"""

import argparse
import json
import os
import subprocess
import sys
import time

SHAPES = {
    "d128": dict(name="d128", d_model=128, layers=4, heads=4, d_ff=352, vocabulary=512, context=1024),
    "d384": dict(name="d384", d_model=384, layers=6, heads=6, d_ff=848, vocabulary=512, context=1024),
}
NEW_TOKENS = 46


def serve(threads):
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self, d, heads):
            super().__init__()
            self.heads, self.dim = heads, d // heads
            self.query_key_value = nn.Linear(d, 3 * d, bias=False)
            self.out = nn.Linear(d, d, bias=False)

        def forward(self, x, cosine, sine, cache, mask):
            batch, length, d = x.shape
            q, k, v = self.query_key_value(x).view(batch, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
            if cache is not None:
                keys, values, end = cache
                keys[:, :, end - length : end] = k
                values[:, :, end - length : end] = v
                k, v = keys[:, :, :end], values[:, :, :end]
            causal = mask is None and length > 1
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            return self.out(mixed.transpose(1, 2).reshape(batch, length, d))

    def rotate(x, cosine, sine):
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)

    class Layer(nn.Module):
        def __init__(self, d, heads, ff):
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
            self.attention = Attention(d, heads)
            self.gate_up, self.down = nn.Linear(d, 2 * ff, bias=False), nn.Linear(ff, d, bias=False)

        def forward(self, x, *rest):
            x = x + self.attention(self.attention_norm(x), *rest)
            gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)

    class Llama(nn.Module):
        def __init__(self, name, d_model, layers, heads, d_ff, vocabulary, context):
            super().__init__()
            self.heads, self.dim, self.vocabulary = heads, d_model // heads, vocabulary
            self.embedding = nn.Embedding(vocabulary, d_model)
            self.layers = nn.ModuleList(Layer(d_model, heads, d_ff) for _ in range(layers))
            self.norm = nn.RMSNorm(d_model, eps=1e-5)
            self.head = nn.Linear(d_model, vocabulary, bias=False)
            for weight in self.parameters():
                if weight.dim() == 2:
                    nn.init.normal_(weight, std=0.02)
            frequency = 10_000.0 ** (-torch.arange(0, self.dim, 2) / self.dim)
            angles = torch.arange(context)[:, None] * frequency[None]
            self.register_buffer("cosines", angles.cos())
            self.register_buffer("sines", angles.sin())

        def trunk(self, ids, positions=None, caches=None, mask=None):
            x = self.embedding(ids)
            if positions is None:
                cosine, sine = self.cosines[: ids.shape[1]], self.sines[: ids.shape[1]]
            else:
                cosine, sine = self.cosines[positions][:, None], self.sines[positions][:, None]
            for index, layer in enumerate(self.layers):
                x = layer(x, cosine, sine, caches and caches[index], mask)
            return self.norm(x)

    models, optimisers, generators = {}, {}, {}

    def model(sizes):
        name = sizes["name"]
        if name not in models:
            models[name] = Llama(**sizes)
        return models[name]

    def train_step(net, optimiser, ids):
        logits = net.head(net.trunk(ids)[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, net.vocabulary), ids[:, 1:].reshape(-1))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()

    def timed(seconds, step):
        step()
        start, work = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or work == 0:
            work += step()
        return dict(tokens=work, seconds=time.perf_counter() - start)

    def train(sizes, rows, tokens, seconds):
        net, name = model(sizes), sizes["name"]
        if name not in optimisers:
            optimisers[name] = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
        ids = torch.randint(0, net.vocabulary, (rows, tokens))

        def step():
            train_step(net, optimisers[name], ids)
            return rows * tokens

        return timed(seconds, step)

    def padded(prompts, vocabulary):
        """Prompts that end in the same column, and what of them is padding."""
        longest = max(prompts)
        ids = torch.randint(1, vocabulary, (len(prompts), longest))
        pad = torch.tensor([longest - length for length in prompts])
        return ids, pad, torch.arange(longest)[None] >= pad[:, None]

    @torch.inference_mode()
    def decode_once(net, prompts, seed):
        ids, pad, real = padded(prompts, net.vocabulary)
        batch, longest = ids.shape
        total = longest + NEW_TOKENS
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, net.heads, total, net.dim)
        storage = [(torch.zeros(shape), torch.zeros(shape)) for _ in net.layers]
        ragged = bool((pad > 0).any())
        seen = torch.cat((real, torch.ones(batch, NEW_TOKENS, dtype=torch.bool)), dim=1)
        mask = None
        if ragged:
            # A row of padding sees itself, or its softmax would have nothing to sum.
            causal = torch.ones(longest, longest, dtype=torch.bool).tril()
            mask = (causal[None] & real[:, None]) | torch.eye(longest, dtype=torch.bool)[None]
            mask = mask[:, None]
        positions = (torch.arange(longest)[None] - pad[:, None]).clamp(min=0)
        caches = [(keys, values, longest) for keys, values in storage]
        hidden = net.trunk(ids, positions, caches, mask)[:, -1]
        drawn, log_probs = [], []
        for step in range(NEW_TOKENS):
            scores = F.log_softmax(net.head(hidden), dim=-1)
            token = torch.multinomial(scores.exp(), 1, generator=generator)
            drawn.append(token)
            log_probs.append(scores.gather(1, token))
            if step + 1 == NEW_TOKENS:
                break
            at = longest + step
            caches = [(keys, values, at + 1) for keys, values in storage]
            mask = seen[:, None, None, : at + 1] if ragged else None
            hidden = net.trunk(token, (at - pad)[:, None], caches, mask)[:, -1]
        torch.cat(drawn, 1).tolist(), torch.cat(log_probs, 1).tolist()
        return batch * NEW_TOKENS

    def decode(sizes, prompts, seconds):
        net, seeds = model(sizes), iter(range(1 << 30))
        return timed(seconds, lambda: decode_once(net, prompts, next(seeds)))

    def generate(sizes, prompts, seconds):
        from transformers import LlamaConfig, LlamaForCausalLM

        name = sizes["name"]
        if name not in generators:
            config = LlamaConfig(
                vocab_size=sizes["vocabulary"],
                hidden_size=sizes["d_model"],
                intermediate_size=sizes["d_ff"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                max_position_embeddings=sizes["context"],
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=0,
            )
            generators[name] = LlamaForCausalLM(config).eval()
        net = generators[name]

        @torch.inference_mode()
        def step():
            ids, _, real = padded(prompts, sizes["vocabulary"])
            out = net.generate(
                ids,
                attention_mask=real.long(),
                do_sample=True,
                top_k=0,
                max_new_tokens=NEW_TOKENS,
                return_dict_in_generate=True,
                output_logits=True,
            )
            new = out.sequences[:, ids.shape[1] :]
            scores = torch.stack(out.logits, 1).log_softmax(-1).gather(2, new[..., None])
            new.tolist(), scores.tolist()
            return new.numel()

        return timed(seconds, step)

    def hello():
        return dict(torch=torch.__version__, threads=torch.get_num_threads())

    operations = dict(train=train, decode=decode, generate=generate, hello=hello)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(operations[request.pop("operation")](**request)), flush=True)


class Server:
    def __init__(self, threads):
        command = [sys.executable, __file__, "--serve", "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())


def alone(seconds):
    """All measurements of `fulgurite bench policy`, without the other side."""
    modes = {"1x2": [Server(2)], "2x1": [Server(1), Server(1)]}
    requests = [
        (f"train {shape} {rows}x{tokens}", dict(operation="train", sizes=sizes, rows=rows, tokens=tokens))
        for shape, sizes in SHAPES.items()
        for rows, tokens in [(32, 64), (8, 256)]
    ]
    prompts = lambda batch: [15 + (7 * index) % 26 for index in range(batch)]
    requests += [
        (f"{operation} {shape} batch {batch}", dict(operation=operation, sizes=sizes, prompts=prompts(batch)))
        for shape, sizes in SHAPES.items()
        for operation in ["decode", "generate"]
        for batch in [1, 32, 128]
    ]
    for name, request in requests:
        figures = {}
        for mode, servers in modes.items():
            servers = servers[: max(1, min(len(servers), len(request.get("prompts", [0, 0]))))]
            for index, server in enumerate(servers):
                part = dict(request, seconds=seconds)
                if "rows" in part:
                    part["rows"] //= len(servers)
                else:
                    part["prompts"] = part["prompts"][index :: len(servers)]
                server.send(part)
            answers = [server.answer() for server in servers]
            figures[mode] = round(sum(a["tokens"] / a["seconds"] for a in answers), 1)
        print(json.dumps(dict(name=name, tokens_per_second=figures)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="answer requests on standard input")
    parser.add_argument("--threads", type=int, default=2, help="threads of the serving process")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.threads)
    else:
        alone(arguments.seconds)
