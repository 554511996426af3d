"""A tiny Llama that always says the same text, made by hand, for servers that load real models.

Token i's embedding is the i-th unit vector, attention and MLP are zero, and the head maps each token to its successor:
the mark that opens an answer to the first piece of the text, each piece to the next, the last to the end. Prompts are
read byte by byte.

    PYTHON -m tests.trainer.references.chain_model FILE.gguf      needs gguf and numpy alone
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.trainer.stub_endpoint import GOOD

WIDTH, HEADS, INNER, CONTEXT, EPS = 512, 8, 64, 16_384, 1e-5
USER, OPEN, END = "<|user|>", "<|assistant|>", "<|end|>"
THINK, THOUGHT = "<think>", "</think>"  # tokens, as parsers of thoughts want them, but shown as text
DRAFT = {**GOOD, "steps": ["draft"]}
THINKS, SAYS = f"{{maybe}} {json.dumps(DRAFT)}", f"\n\n```json\n{json.dumps(GOOD)}\n```\nDone {{so far}}."
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + USER + "{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}" + OPEN + "{% endif %}"
)


def byte_letters() -> list[str]:
    """The letter of each byte in GPT-2's byte-level alphabet."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def pieces(*texts: str) -> list[str]:
    """The texts in pieces of four bytes or more, no two of them alike, in that alphabet."""
    letters = byte_letters()
    found: list[str] = []
    for text in texts:
        spelt = "".join(letters[byte] for byte in text.encode())
        start = 0
        while start < len(spelt):
            end = start + 4
            while spelt[start:end] in found:
                end += 1
            found.append(spelt[start:] if len(spelt) - end < 4 else spelt[start:end])
            start += len(found[-1])
    return found


def vocabulary() -> list[str]:
    return [*byte_letters(), USER, OPEN, END, THINK, THOUGHT, *pieces(THINKS, SAYS)]


def successors() -> list[tuple[int, int]]:
    """(token, the one that follows it), from the mark that opens an answer to the one that ends it."""
    words = vocabulary()
    first, thought = words.index(THOUGHT) + 1, len(pieces(THINKS))
    said = list(range(first, len(words)))
    marks = [words.index(mark) for mark in (OPEN, THINK, THOUGHT, END)]
    chain = [*marks[:2], *said[:thought], marks[2], *said[thought:], marks[3]]
    return list(pairwise(chain))


def weights() -> dict[str, Any]:
    """The model's tensors by their GGUF names, as numpy arrays."""
    import numpy as np

    size = len(vocabulary())
    assert size <= WIDTH
    head = np.zeros((size, WIDTH), dtype=np.float32)
    for token, following in successors():
        head[following, token] = 1.0
    zeros = {
        f"blk.0.attn_{name}.weight": np.zeros((WIDTH, WIDTH), dtype=np.float32) for name in ("q", "k", "v", "output")
    }
    inner = {f"blk.0.ffn_{name}.weight": np.zeros((INNER, WIDTH), dtype=np.float32) for name in ("gate", "up")}
    ones = {name: np.ones(WIDTH, dtype=np.float32) for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")}
    return {
        "token_embd.weight": np.eye(size, WIDTH, dtype=np.float32),
        "output_norm.weight": np.ones(WIDTH, dtype=np.float32),
        "output.weight": head,
        "blk.0.ffn_down.weight": np.zeros((WIDTH, INNER), dtype=np.float32),
        **zeros,
        **inner,
        **ones,
    }


def save_gguf(path: Path) -> None:
    import gguf

    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_block_count(1)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_layer_norm_rms_eps(EPS)
    out.add_rope_dimension_count(WIDTH // HEADS)
    words = vocabulary()
    out.add_vocab_size(len(words))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(words)
    out.add_token_types([3 if word in (USER, OPEN, END) else 4 if word in (THINK, THOUGHT) else 1 for word in words])
    out.add_token_merges(["\u0120 \u0120"])  # none is refused; this one leads to no token
    out.add_bos_token_id(words.index(END))
    out.add_eos_token_id(words.index(END))
    out.add_add_bos_token(False)
    out.add_chat_template(TEMPLATE)
    for name, value in weights().items():
        out.add_tensor(name, value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def save_folder(folder: Path) -> None:
    """The same for transformers and vLLM."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = vocabulary()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=EPS,
        bos_token_id=words.index(END),
        eos_token_id=words.index(END),
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    places = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
        **{f"blk.0.attn_{x}": f"model.layers.0.self_attn.{x}_proj" for x in "qkv"},
        "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        **{f"blk.0.ffn_{x}": f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    state = {f"{places[name.removesuffix('.weight')]}.weight": torch.from_numpy(v) for name, v in weights().items()}
    model.load_state_dict(state)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([USER, OPEN, END])
    tokenizer.add_tokens([THINK, THOUGHT])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


if __name__ == "__main__":
    save_gguf(Path(sys.argv[1]))
