"""With `[transformers]`: steer a Llama of random weights while it generates, and record it."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import steerlib as sl

torch.manual_seed(0)
shape: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
shape |= {"num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
model: Any = LlamaForCausalLM(LlamaConfig(**shape)).eval()
bank = sl.ConceptBank.from_directions({"a": torch.randn(32)}, site="layers.0", base=model)
prompt = {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


def write() -> torch.Tensor:
    return model.generate(**prompt, max_new_tokens=8, do_sample=False)


plain = write()
with sl.steer(model, bank, {"a": 20.0}, allow_ood=True) as session:
    steered = write()
assert not torch.equal(plain, steered) and torch.equal(plain, write())
assert "layers.0" in str(session.report())
with sl.record(model, bank) as tape:
    write()
assert tape["a"]
