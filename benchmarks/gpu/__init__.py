"""Benchmarks of `moe` on one GPU: training, the MoE layer and attention, decoding, drafts, the server, parity; on two, scaling.

`python -m benchmarks.gpu.NAME --out FOLDER` writes FOLDER/NAME.jsonl, one line a contender, each with date, machine, torch
version and command. They need a CUDA device, torch with Triton, for the contenders named `hf_` transformers, and for `serving`
the server's extra and openai; no other package.
"""
