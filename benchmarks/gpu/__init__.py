"""Benchmarks of `moe` on one GPU: training steps, the MoE layer and attention, decoding, parity; on two, scaling.

`python -m benchmarks.gpu.NAME --out FOLDER` writes FOLDER/NAME.jsonl, one line a contender, each with date, machine, torch
version and command. They need a CUDA device, torch with Triton, and for the contenders named `hf_` transformers; no other
package.
"""
