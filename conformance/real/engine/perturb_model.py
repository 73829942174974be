"""A copy of a model that answers as fast as the model, and wrong.  usage: perturb_model.py FROM TO

Noise in the weights of some layers, as of memory that lost bits: the size, the names and the tokenizer stay.
"""
import os
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file

LAYERS = (8, 9, 10, 11, 12, 13)
NOISE = 0.6  # of each matrix's own standard deviation

source, target = sys.argv[1:3]
shutil.rmtree(target, ignore_errors=True)
shutil.copytree(source, target)
torch.manual_seed(1)
file = os.path.join(target, "model.safetensors")
weights = load_file(file)
for name, weight in weights.items():
    if any(name.startswith(f"model.layers.{layer}.mlp.") for layer in LAYERS):
        noise = torch.randn(weight.shape) * weight.float().std() * NOISE
        weights[name] = (weight.float() + noise).to(weight.dtype)
save_file(weights, file, metadata={"format": "pt"})
