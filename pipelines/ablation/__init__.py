"""Ablations: small models trained on mixtures that differ in one thing, and what can be said about the difference.

`pipelines run ablation -c FILE`. config.py reads the file, design.py makes a pipeline of it, trials.py trains and evaluates each
arm under each seed, result.py compares them (with `mixtures.compare`), writes and prints. The paper's own ablations fix a token
budget and judge by held-out compression (arXiv 2602.10604, appendix C); so do these.
"""
